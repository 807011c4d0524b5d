// Units: what a thread moves at once. Every access of the kernels to a tensor goes through here.
#pragma once

#include "../core/half.h"
#include "dialect.h"

namespace bnext::cuda {

// Elements of a unit: 16 bytes of T, or 8 elements where a byte of sign mask goes with them.
template <class T, bool MASKED> constexpr int kUnit = MASKED ? 8 : 16 / static_cast<int>(sizeof(T));

// Units that `bytes` of registers hold, for each tensor that a thread has in flight.
template <class T, int UNIT>
constexpr int units_in(int bytes) {
  const int units = bytes / (UNIT * static_cast<int>(sizeof(T)));
  return units > 0 ? units : 1;
}

// Whether a kernel that follows reads the data again, of which the L2 cache should keep some (see
// Pass::retained_steps); or this is the last time.
enum class Reuse { again, last };

// A unit as it came from memory: 32-bit words, of which a 16-bit type has two elements each, so that
// widening and narrowing take an instruction an element.
template <class T, int UNIT>
struct alignas(16) Unit {
  static constexpr int words = UNIT * static_cast<int>(sizeof(T)) / 4;
  uint32_t word[words];

  __device__ __forceinline__ acc_t<T> operator[](int e) const {
    if constexpr (sizeof(T) == 2) return widen_half(word[e / 2], e % 2);
    else if constexpr (sizeof(T) == 4) return bit_cast<float>(word[e]);
    else return bit_cast<double>(static_cast<uint64_t>(word[2 * e + 1]) << 32 | word[2 * e]);
  }

  __device__ __forceinline__ static float widen_half(uint32_t pair, int high) {
    if constexpr (dtype_of<T>::value == DType::bf16) return bit_cast<float>(high ? pair & 0xffff0000u : pair << 16);
#if defined(__CUDA_ARCH__)
    return high ? __high2float(bit_cast<__half2>(pair)) : __low2float(bit_cast<__half2>(pair));
#else
    return to_float(f16{static_cast<uint16_t>(high ? pair >> 16 : pair)});
#endif
  }
};

template <Reuse REUSE>
__device__ __forceinline__ uint4 load_word(const uint4* p, bool retain) {
  if constexpr (REUSE == Reuse::last) return __ldcs(p);
  else return load_retained(p, retain);
}

template <Reuse REUSE, class T, int UNIT>
__device__ __forceinline__ Unit<T, UNIT> load_unit(const T* p, bool retain) {
  Unit<T, UNIT> unit;
#pragma unroll
  for (int i = 0; i < unit.words / 4; ++i) {
    const uint4 w = load_word<REUSE>(reinterpret_cast<const uint4*>(p) + i, retain);
    unit.word[4 * i] = w.x;
    unit.word[4 * i + 1] = w.y;
    unit.word[4 * i + 2] = w.z;
    unit.word[4 * i + 3] = w.w;
  }
  return unit;
}

template <class T, int UNIT>
__device__ __forceinline__ void store_unit(T* p, const Unit<T, UNIT>& unit) {
  // Outputs are not read again by the kernel that writes them: leave the cache to the inputs.
#pragma unroll
  for (int i = 0; i < unit.words / 4; ++i) {
    __stcs(reinterpret_cast<uint4*>(p) + i,
           uint4{unit.word[4 * i], unit.word[4 * i + 1], unit.word[4 * i + 2], unit.word[4 * i + 3]});
  }
}

template <class T, int UNIT>
__device__ __forceinline__ void widen_unit(const Unit<T, UNIT>& unit, acc_t<T> (&a)[UNIT]) {
#pragma unroll
  for (int e = 0; e < UNIT; ++e) a[e] = unit[e];
}

// Two accumulators as two 16-bit floats: one instruction, where two singles take three.
template <class T>
__device__ __forceinline__ uint32_t narrow_pair(float low, float high) {
#if defined(__CUDA_ARCH__)
  if constexpr (dtype_of<T>::value == DType::bf16) return bit_cast<uint32_t>(__floats2bfloat162_rn(low, high));
  else return bit_cast<uint32_t>(__floats2half2_rn(low, high));
#else
  return narrow<T>(low).bits | static_cast<uint32_t>(narrow<T>(high).bits) << 16;
#endif
}

template <class T, int UNIT>
__device__ __forceinline__ Unit<T, UNIT> narrow_unit(const acc_t<T> (&a)[UNIT]) {
  Unit<T, UNIT> unit;
#pragma unroll
  for (int e = 0; e < UNIT; ++e) {
    if constexpr (sizeof(T) == 2) {
      if (e % 2 == 0) unit.word[e / 2] = narrow_pair<T>(a[e], a[e + 1]);
    } else if constexpr (sizeof(T) == 4) {
      unit.word[e] = bit_cast<uint32_t>(a[e]);
    } else {
      unit.word[2 * e] = static_cast<uint32_t>(bit_cast<uint64_t>(a[e]));
      unit.word[2 * e + 1] = static_cast<uint32_t>(bit_cast<uint64_t>(a[e]) >> 32);
    }
  }
  return unit;
}

// The unit of p that starts at element `offset` of `numel`; what lies past the end is zero.
template <Reuse REUSE, int UNIT, class T>
__device__ __forceinline__ Unit<T, UNIT> load_within(const T* p, int64_t offset, int64_t numel, bool retain) {
  if (offset + UNIT <= numel) return load_unit<REUSE, T, UNIT>(p + offset, retain);
  acc_t<T> a[UNIT];
#pragma unroll
  for (int e = 0; e < UNIT; ++e) a[e] = offset + e < numel ? widen(p[offset + e]) : acc_t<T>(0);
  return narrow_unit<T, UNIT>(a);
}

}  // namespace bnext::cuda
