// 16-bit floats: exact widening, round-to-nearest-even narrowing (NaN stays NaN, overflow becomes
// infinity). On the device these are single instructions; the host twins are portable integer code.
#pragma once

#include <cstring>

#include "types.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace bnext {

template <class To, class From>
BNEXT_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

BNEXT_HD float to_float(bf16 v) { return bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }

BNEXT_HD bf16 to_bf16(float v) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
#else
  uint32_t u = bit_cast<uint32_t>(v);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((u >> 16) | 0x40u)};  // quiet NaN
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
#endif
}

BNEXT_HD float to_float(f16 v) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(v.bits));
#else
  uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  uint32_t magnitude = v.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x400u) return bit_cast<float>(sign | ((magnitude << 13) + 0x38000000u));
  float subnormal = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // 2^-24, exact
  return sign ? -subnormal : subnormal;
#endif
}

BNEXT_HD f16 to_f16(float v) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(v))};
#else
  uint32_t u = bit_cast<uint32_t>(v);
  uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};   // NaN
  if (u >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds past the largest f16
  if (u < 0x38800000u) {  // below 2^-14: let the float adder round to a multiple of 2^-24
    float shifted = bit_cast<float>(u) + 0.5f;
    return {static_cast<uint16_t>(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u))};
  }
  uint32_t rounded = u + 0xfffu + ((u >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
#endif
}

// The same by type: load<T>() widens to the accumulation type, store<T>() narrows from it.
BNEXT_HD float widen(float v) { return v; }
BNEXT_HD double widen(double v) { return v; }
BNEXT_HD float widen(f16 v) { return to_float(v); }
BNEXT_HD float widen(bf16 v) { return to_float(v); }

template <class T> BNEXT_HD T narrow(acc_t<T> v);
template <> BNEXT_HD float narrow<float>(float v) { return v; }
template <> BNEXT_HD double narrow<double>(double v) { return v; }
template <> BNEXT_HD f16 narrow<f16>(float v) { return to_f16(v); }
template <> BNEXT_HD bf16 narrow<bf16>(float v) { return to_bf16(v); }

// One element of a [c] vector whose dtype is known at run time only; `fallback` where it is null.
template <class A>
BNEXT_HD A load_scalar(const void* p, DType t, int64_t i, A fallback) {
  if (p == nullptr) return fallback;
  return with_dtype(t, [=](auto type) { return static_cast<A>(widen(static_cast<const decltype(type)*>(p)[i])); });
}

template <class A>
BNEXT_HD void store_scalar(void* p, DType t, int64_t i, A v) {
  if (p == nullptr) return;
  with_dtype(t, [=](auto type) {
    using T = decltype(type);
    static_cast<T*>(p)[i] = narrow<T>(static_cast<acc_t<T>>(v));
  });
}

}  // namespace bnext
