// Registers of NEON on 64-bit ARM, where every processor has them. See vec.h for what each function means.
#pragma once

#include <arm_neon.h>

#include "../core/half.h"

namespace bnext::cpu {
namespace {

template <class A> struct native;
template <> struct native<float> { using type = float32x4_t; };
template <> struct native<double> { using type = float64x2_t; };

inline float32x4_t broadcast(float v) { return vdupq_n_f32(v); }
inline float64x2_t broadcast(double v) { return vdupq_n_f64(v); }

inline float32x4_t add(float32x4_t a, float32x4_t b) { return vaddq_f32(a, b); }
inline float32x4_t sub(float32x4_t a, float32x4_t b) { return vsubq_f32(a, b); }
inline float32x4_t mul(float32x4_t a, float32x4_t b) { return vmulq_f32(a, b); }
inline float32x4_t div(float32x4_t a, float32x4_t b) { return vdivq_f32(a, b); }
inline float32x4_t fma(float32x4_t a, float32x4_t b, float32x4_t c) { return vfmaq_f32(c, a, b); }
inline float32x4_t fnma(float32x4_t a, float32x4_t b, float32x4_t c) { return vfmsq_f32(c, a, b); }
inline float64x2_t add(float64x2_t a, float64x2_t b) { return vaddq_f64(a, b); }
inline float64x2_t sub(float64x2_t a, float64x2_t b) { return vsubq_f64(a, b); }
inline float64x2_t mul(float64x2_t a, float64x2_t b) { return vmulq_f64(a, b); }
inline float64x2_t div(float64x2_t a, float64x2_t b) { return vdivq_f64(a, b); }
inline float64x2_t fma(float64x2_t a, float64x2_t b, float64x2_t c) { return vfmaq_f64(c, a, b); }
inline float64x2_t fnma(float64x2_t a, float64x2_t b, float64x2_t c) { return vfmsq_f64(c, a, b); }

// By comparison and selection: the maximum instructions treat zeros of either sign in another way than x86 does.
inline float32x4_t max_keep_nan(float32x4_t low, float32x4_t v) { return vbslq_f32(vcgtq_f32(low, v), low, v); }
inline float64x2_t max_keep_nan(float64x2_t low, float64x2_t v) { return vbslq_f64(vcgtq_f64(low, v), low, v); }
inline float32x4_t select_le(float32x4_t a, float32x4_t b, float32x4_t r, float32x4_t s) {
  return vbslq_f32(vcleq_f32(a, b), r, s);
}
inline float64x2_t select_le(float64x2_t a, float64x2_t b, float64x2_t r, float64x2_t s) {
  return vbslq_f64(vcleq_f64(a, b), r, s);
}

inline float32x4_t keep(uint32x4_t mask, float32x4_t v) {
  return vreinterpretq_f32_u32(vandq_u32(mask, vreinterpretq_u32_f32(v)));
}
inline float64x2_t keep(uint64x2_t mask, float64x2_t v) {
  return vreinterpretq_f64_u64(vandq_u64(mask, vreinterpretq_u64_f64(v)));
}
// "Not less or equal" is true of NaN.
inline uint32x4_t positive(float32x4_t v) { return vmvnq_u32(vclezq_f32(v)); }
inline uint64x2_t positive(float64x2_t v) {
  return vreinterpretq_u64_u32(vmvnq_u32(vreinterpretq_u32_u64(vclezq_f64(v))));
}
inline float32x4_t relu_gate(float32x4_t v, float32x4_t dy) { return keep(positive(v), dy); }
inline float64x2_t relu_gate(float64x2_t v, float64x2_t dy) { return keep(positive(v), dy); }

inline uint32x4_t each_bit_f32() { return uint32x4_t{1, 2, 4, 8}; }
inline uint64x2_t each_bit_f64() { return uint64x2_t{1, 2}; }
inline uint32_t positive_bits(float32x4_t v) { return vaddvq_u32(vandq_u32(positive(v), each_bit_f32())); }
inline uint32_t positive_bits(float64x2_t v) {
  return static_cast<uint32_t>(vaddvq_u64(vandq_u64(positive(v), each_bit_f64())));
}
inline float32x4_t select_or_zero(uint32_t bits, float32x4_t dy) {
  return keep(vtstq_u32(vdupq_n_u32(bits), each_bit_f32()), dy);
}
inline float64x2_t select_or_zero(uint32_t bits, float64x2_t dy) {
  return keep(vtstq_u64(vdupq_n_u64(bits), each_bit_f64()), dy);
}

inline float32x4_t shift_to_exponent(float32x4_t v) {
  const uint32x4_t exponent = vshlq_n_u32(vreinterpretq_u32_f32(v), 23);
  return vreinterpretq_f32_u32(vaddq_u32(exponent, vreinterpretq_u32_f32(vdupq_n_f32(1))));
}
inline float64x2_t shift_to_exponent(float64x2_t v) {
  const uint64x2_t exponent = vshlq_n_u64(vreinterpretq_u64_f64(v), 52);
  return vreinterpretq_f64_u64(vaddq_u64(exponent, vreinterpretq_u64_f64(vdupq_n_f64(1))));
}

// 4 values of 16 bits <-> 4 floats.
inline float32x4_t widen(uint16x4_t v, const f16*) { return vcvt_f32_f16(vreinterpret_f16_u16(v)); }
inline float32x4_t widen(uint16x4_t v, const bf16*) { return vreinterpretq_f32_u32(vshll_n_u16(v, 16)); }
inline uint16x4_t narrow(float32x4_t v, const f16*) { return vreinterpret_u16_f16(vcvt_f16_f32(v)); }
// Integer rounding to nearest even: adds 0x7fff, and 1 where the last bit that stays is set. A NaN stays one.
inline uint16x4_t narrow(float32x4_t v, const bf16*) {
  const uint32x4_t u = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  const uint16x4_t rounded = vaddhn_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint16x4_t quiet = vorr_u16(vshrn_n_u32(u, 16), vdup_n_u16(0x40));
  return vbsl_u16(vmovn_u32(vceqq_f32(v, v)), rounded, quiet);
}

inline float32x4_t load(const float* p) { return vld1q_f32(p); }
inline float64x2_t load(const double* p) { return vld1q_f64(p); }
template <class T> float32x4_t load(const T* p) { return widen(vld1_u16(&p->bits), p); }
inline float64x2_t load_double(const float* p) { return vcvt_f64_f32(vld1_f32(p)); }
inline float64x2_t load_double(const double* p) { return vld1q_f64(p); }

inline void store(float* p, float32x4_t v) { vst1q_f32(p, v); }
inline void store(double* p, float64x2_t v) { vst1q_f64(p, v); }
inline void store(float* p, float64x2_t v) { vst1_f32(p, vcvt_f32_f64(v)); }
template <class T> void store(T* p, float32x4_t v) { vst1_u16(&p->bits, narrow(v, p)); }

// There is no masked access: the first n lanes go one by one, at the end of a row.
template <class T, class R = typename native<acc_t<T>>::type>
R load(const T* p, int64_t n) {
  constexpr int64_t kLanes = sizeof(R) / sizeof(acc_t<T>);
  T lanes[kLanes] = {};
  for (int64_t i = 0; i < kLanes && i < n; i++) lanes[i] = p[i];
  return load(lanes);
}
template <class T, class R>
void store(T* p, int64_t n, R v) {
  constexpr int64_t kLanes = sizeof(R) / sizeof(acc_t<T>);
  T lanes[kLanes];
  store(lanes, v);
  for (int64_t i = 0; i < kLanes && i < n; i++) p[i] = lanes[i];
}

// The caches are left to themselves: stores past them come in pairs of registers, and promise nothing.
constexpr bool kHasStreams = false;
inline void stream_fence() {}
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace
}  // namespace bnext::cpu
