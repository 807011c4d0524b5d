// Registers of AVX-512 (F, BW, DQ, VL: every such server since 2017). See vec.h for what each
// function means.
#pragma once

#include <immintrin.h>

#include "../core/types.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of the deliberately undefined registers inside its own intrinsics (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace bnext::cpu {
namespace {

template <class A> struct native;
template <> struct native<float> { using type = __m512; };
template <> struct native<double> { using type = __m512d; };

inline __m512 broadcast(float v) { return _mm512_set1_ps(v); }
inline __m512d broadcast(double v) { return _mm512_set1_pd(v); }

inline __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
inline __m512 sub(__m512 a, __m512 b) { return _mm512_sub_ps(a, b); }
inline __m512 mul(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
inline __m512 div(__m512 a, __m512 b) { return _mm512_div_ps(a, b); }
inline __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
inline __m512 fnma(__m512 a, __m512 b, __m512 c) { return _mm512_fnmadd_ps(a, b, c); }
inline __m512d add(__m512d a, __m512d b) { return _mm512_add_pd(a, b); }
inline __m512d sub(__m512d a, __m512d b) { return _mm512_sub_pd(a, b); }
inline __m512d mul(__m512d a, __m512d b) { return _mm512_mul_pd(a, b); }
inline __m512d div(__m512d a, __m512d b) { return _mm512_div_pd(a, b); }
inline __m512d fma(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
inline __m512d fnma(__m512d a, __m512d b, __m512d c) { return _mm512_fnmadd_pd(a, b, c); }

// The instruction gives its second operand where either is NaN, or both are zeros.
inline __m512 max_keep_nan(__m512 low, __m512 v) { return _mm512_max_ps(low, v); }
inline __m512d max_keep_nan(__m512d low, __m512d v) { return _mm512_max_pd(low, v); }
// NLE, "not less or equal", is true of NaN, whose gradient is dy, as in torch. UQ: without an exception.
inline uint32_t positive_bits(__m512 v) { return _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NLE_UQ); }
inline uint32_t positive_bits(__m512d v) { return _mm512_cmp_pd_mask(v, _mm512_setzero_pd(), _CMP_NLE_UQ); }
inline __m512 select_or_zero(uint32_t bits, __m512 dy) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), dy); }
inline __m512d select_or_zero(uint32_t bits, __m512d dy) {
  return _mm512_maskz_mov_pd(static_cast<__mmask8>(bits), dy);
}
inline __m512 relu_gate(__m512 v, __m512 dy) { return select_or_zero(positive_bits(v), dy); }
inline __m512d relu_gate(__m512d v, __m512d dy) { return select_or_zero(positive_bits(v), dy); }

inline __m512 select_le(__m512 a, __m512 b, __m512 r, __m512 s) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LE_OQ), s, r);
}
inline __m512d select_le(__m512d a, __m512d b, __m512d r, __m512d s) {
  return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(a, b, _CMP_LE_OQ), s, r);
}
// Adding n to the exponent of 1 makes 2^n; the shift drops all of v but n.
inline __m512 shift_to_exponent(__m512 v) {
  const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(v), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_castps_si512(_mm512_set1_ps(1))));
}
inline __m512d shift_to_exponent(__m512d v) {
  const __m512i exponent = _mm512_slli_epi64(_mm512_castpd_si512(v), 52);
  return _mm512_castsi512_pd(_mm512_add_epi64(exponent, _mm512_castpd_si512(_mm512_set1_pd(1))));
}

// 16 values of 16 bits <-> 16 floats.
inline __m512 widen(__m256i v, const f16*) { return _mm512_cvtph_ps(v); }
#if BNEXT_AVX512_BF16
// Bytes 2i and 2i + 1 of v become the upper half of float i, and its lower half 0, in one instruction (VBMI).
inline __m512 widen(__m256i v, const bf16*) {
  const __m512i bytes = _mm512_set_epi8(31, 30, 0, 0, 29, 28, 0, 0, 27, 26, 0, 0, 25, 24, 0, 0,  //
                                        23, 22, 0, 0, 21, 20, 0, 0, 19, 18, 0, 0, 17, 16, 0, 0,  //
                                        15, 14, 0, 0, 13, 12, 0, 0, 11, 10, 0, 0, 9, 8, 0, 0,    //
                                        7, 6, 0, 0, 5, 4, 0, 0, 3, 2, 0, 0, 1, 0, 0, 0);
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi8(0xcccccccccccccccc, bytes, _mm512_castsi256_si512(v)));
}
#else
inline __m512 widen(__m256i v, const bf16*) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
#endif
inline __m256i narrow(__m512 v, const f16*) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// Integer rounding to nearest even.
inline __m256i rounded(__m512 v) {
  const __m512i u = _mm512_castps_si512(v);
  const __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  __m512i r = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
  r = _mm512_mask_add_epi32(r, odd, r, _mm512_set1_epi32(1));
  r = _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x400000));
  const __m512i high_halves = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1,  //
                                               31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_castsi512_si256(_mm512_permutexvar_epi16(high_halves, r));
}
#if BNEXT_AVX512_BF16
// The instruction does the same, but makes zeros of subnormals, which are rare.
inline __m256i narrow(__m512 v, const bf16*) {
  constexpr int kSubnormal = 0x20;
  if (_mm512_fpclass_ps_mask(v, kSubnormal) != 0) return rounded(v);
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
}
#else
inline __m256i narrow(__m512 v, const bf16*) { return rounded(v); }
#endif

inline __m512 load(const float* p) { return _mm512_loadu_ps(p); }
inline __m512d load(const double* p) { return _mm512_loadu_pd(p); }
template <class T> __m512 load(const T* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), p); }
inline __m512d load_double(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
inline __m512d load_double(const double* p) { return _mm512_loadu_pd(p); }

inline void store(float* p, __m512 v) { _mm512_storeu_ps(p, v); }
inline void store(double* p, __m512d v) { _mm512_storeu_pd(p, v); }
inline void store(float* p, __m512d v) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(v)); }
template <class T> void store(T* p, __m512 v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v, p)); }

constexpr bool kHasStreams = true;
inline void stream(float* p, __m512 v) { _mm512_stream_ps(p, v); }
inline void stream(double* p, __m512d v) { _mm512_stream_pd(p, v); }
template <class T> void stream(T* p, __m512 v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(v, p)); }
inline void stream_fence() { _mm_sfence(); }
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

inline __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline __m512 load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline __m512d load(const double* p, int64_t n) { return _mm512_maskz_loadu_pd(static_cast<__mmask8>(first(n)), p); }
template <class T> __m512 load(const T* p, int64_t n) { return widen(_mm256_maskz_loadu_epi16(first(n), p), p); }
inline void store(float* p, int64_t n, __m512 v) { _mm512_mask_storeu_ps(p, first(n), v); }
inline void store(double* p, int64_t n, __m512d v) { _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first(n)), v); }
template <class T> void store(T* p, int64_t n, __m512 v) { _mm256_mask_storeu_epi16(p, first(n), narrow(v, p)); }

}  // namespace
}  // namespace bnext::cpu
