// Registers of AVX2 with FMA and F16C (x86 since 2013). See vec.h for what each function means.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "../core/types.h"

namespace bnext::cpu {
namespace {

template <class A> struct native;
template <> struct native<float> { using type = __m256; };
template <> struct native<double> { using type = __m256d; };

inline __m256 broadcast(float v) { return _mm256_set1_ps(v); }
inline __m256d broadcast(double v) { return _mm256_set1_pd(v); }

inline __m256 add(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
inline __m256 sub(__m256 a, __m256 b) { return _mm256_sub_ps(a, b); }
inline __m256 mul(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
inline __m256 div(__m256 a, __m256 b) { return _mm256_div_ps(a, b); }
inline __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
inline __m256 fnma(__m256 a, __m256 b, __m256 c) { return _mm256_fnmadd_ps(a, b, c); }
inline __m256d add(__m256d a, __m256d b) { return _mm256_add_pd(a, b); }
inline __m256d sub(__m256d a, __m256d b) { return _mm256_sub_pd(a, b); }
inline __m256d mul(__m256d a, __m256d b) { return _mm256_mul_pd(a, b); }
inline __m256d div(__m256d a, __m256d b) { return _mm256_div_pd(a, b); }
inline __m256d fma(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
inline __m256d fnma(__m256d a, __m256d b, __m256d c) { return _mm256_fnmadd_pd(a, b, c); }

// The instruction gives its second operand where either is NaN, or both are zeros.
inline __m256 max_keep_nan(__m256 low, __m256 v) { return _mm256_max_ps(low, v); }
inline __m256d max_keep_nan(__m256d low, __m256d v) { return _mm256_max_pd(low, v); }
// NLE, "not less or equal", is true of NaN, whose gradient is dy, as in torch. UQ: without an exception.
inline __m256 relu_gate(__m256 v, __m256 dy) {
  return _mm256_and_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NLE_UQ), dy);
}
inline __m256d relu_gate(__m256d v, __m256d dy) {
  return _mm256_and_pd(_mm256_cmp_pd(v, _mm256_setzero_pd(), _CMP_NLE_UQ), dy);
}
inline uint32_t positive_bits(__m256 v) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NLE_UQ)));
}
inline uint32_t positive_bits(__m256d v) {
  return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd(v, _mm256_setzero_pd(), _CMP_NLE_UQ)));
}
// Without mask registers: each lane looks at its own bit of all.
inline __m256 select_or_zero(uint32_t bits, __m256 dy) {
  const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), each);
  return _mm256_and_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(set, each)), dy);
}
inline __m256d select_or_zero(uint32_t bits, __m256d dy) {
  const __m256i each = _mm256_setr_epi64x(1, 2, 4, 8);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi64x(static_cast<int64_t>(bits)), each);
  return _mm256_and_pd(_mm256_castsi256_pd(_mm256_cmpeq_epi64(set, each)), dy);
}

inline __m256 select_le(__m256 a, __m256 b, __m256 r, __m256 s) {
  return _mm256_blendv_ps(s, r, _mm256_cmp_ps(a, b, _CMP_LE_OQ));
}
inline __m256d select_le(__m256d a, __m256d b, __m256d r, __m256d s) {
  return _mm256_blendv_pd(s, r, _mm256_cmp_pd(a, b, _CMP_LE_OQ));
}
// Adding n to the exponent of 1 makes 2^n; the shift drops all of v but n.
inline __m256 shift_to_exponent(__m256 v) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(v), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_castps_si256(_mm256_set1_ps(1))));
}
inline __m256d shift_to_exponent(__m256d v) {
  const __m256i exponent = _mm256_slli_epi64(_mm256_castpd_si256(v), 52);
  return _mm256_castsi256_pd(_mm256_add_epi64(exponent, _mm256_castpd_si256(_mm256_set1_pd(1))));
}

// 8 values of 16 bits <-> 8 floats.
inline __m256 widen(__m128i v, const f16*) { return _mm256_cvtph_ps(v); }
// A bf16 is the upper half of a float. The 8 values go to both halves of the register, which a load does by the way,
// and from there each to its place: a conversion to 32 bits and a shift would be two instructions.
inline __m256 widen(__m128i v, const bf16*) {
  const __m256i upper_halves = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                                                -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(v), upper_halves));
}
inline __m128i narrow(__m256 v, const f16*) {
  return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// Integer rounding to nearest even, of what is no NaN: adds 0x7fff, and 1 where the last bit that stays is set. (A
// comparison gives -1, in place of a shift: some processors have but one unit for shifts.)
inline __m256i rounded(__m256 v) {
  const __m256i u = _mm256_castps_si256(v), last = _mm256_set1_epi32(0x10000);
  const __m256i odd = _mm256_cmpeq_epi32(_mm256_and_si256(u, last), last);
  return _mm256_sub_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
}
// The same, and a NaN stays one.
inline __m256i rounded_or_nan(__m256 v) {
  const __m256i quiet = _mm256_or_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded(v), quiet, nan);
}
inline __m128i narrow(__m256 v, const bf16*) {
  const __m256i bits = _mm256_srli_epi32(rounded_or_nan(v), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
}
// Two registers take less together: one comparison tells whether there is a NaN in either, which is rare.
inline __m256i narrow(const __m256 (&v)[2], const bf16*) {
  const bool nan = _mm256_movemask_ps(_mm256_cmp_ps(v[0], v[1], _CMP_UNORD_Q)) != 0;
  const __m256i a = nan ? rounded_or_nan(v[0]) : rounded(v[0]), b = nan ? rounded_or_nan(v[1]) : rounded(v[1]);
  const __m256i halves = _mm256_packus_epi32(_mm256_srli_epi32(a, 16), _mm256_srli_epi32(b, 16));
  return _mm256_permute4x64_epi64(halves, 0b11011000);
}

inline __m256 load(const float* p) { return _mm256_loadu_ps(p); }
inline __m256d load(const double* p) { return _mm256_loadu_pd(p); }
template <class T> __m256 load(const T* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), p); }
inline __m256d load_double(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
inline __m256d load_double(const double* p) { return _mm256_loadu_pd(p); }

inline void store(float* p, __m256 v) { _mm256_storeu_ps(p, v); }
inline void store(double* p, __m256d v) { _mm256_storeu_pd(p, v); }
inline void store(float* p, __m256d v) { _mm_storeu_ps(p, _mm256_cvtpd_ps(v)); }
template <class T> void store(T* p, __m256 v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v, p)); }

template <int> void store_all(bf16* p, const __m256 (&v)[2]) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v, p));
}
template <int> void stream_all(bf16* p, const __m256 (&v)[2]) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(v, p));
}

constexpr bool kHasStreams = true;
inline void stream(float* p, __m256 v) { _mm256_stream_ps(p, v); }
inline void stream(double* p, __m256d v) { _mm256_stream_pd(p, v); }
template <class T> void stream(T* p, __m256 v) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow(v, p)); }
inline void stream_fence() { _mm_sfence(); }
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

inline __m256i first_floats(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256i first_doubles(int64_t n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
template <class Int> Int read(const uint16_t* p) {
  Int bits;
  memcpy(&bits, p, sizeof(bits));
  return bits;
}
template <class Int> void write(uint16_t* p, uint64_t bits) {
  const Int low = static_cast<Int>(bits);
  memcpy(p, &low, sizeof(low));
}
// There is no masked access to 16-bit lanes. The first n of 8 come in two parts that overlap, and go in powers of two:
// by integer registers, as a vector that is read right after parts of it were written waits for them.
inline __m128i load_halves(const void* from, int64_t n) {
  const uint16_t* p = static_cast<const uint16_t*>(from);
  if (n <= 0) return _mm_setzero_si128();
  if (n >= 8) return _mm_loadu_si128(static_cast<const __m128i*>(from));
  if (n == 1) return _mm_cvtsi32_si128(*p);
  if (n < 4) {
    const uint64_t rest = n == 2 ? 0 : p[2];
    return _mm_cvtsi64_si128(static_cast<int64_t>(rest << 32 | read<uint32_t>(p)));
  }
  const uint64_t rest = n == 4 ? 0 : read<uint64_t>(p + n - 4) >> (16 * (8 - n));
  return _mm_set_epi64x(static_cast<int64_t>(rest), read<int64_t>(p));
}
inline void store_halves(void* to, int64_t n, __m128i v) {
  uint16_t* p = static_cast<uint16_t*>(to);
  if (n <= 0) return;
  if (n >= 8) return _mm_storeu_si128(static_cast<__m128i*>(to), v);
  uint64_t bits = static_cast<uint64_t>(_mm_cvtsi128_si64(v));
  if ((n & 4) != 0) {
    write<uint64_t>(p, bits);
    bits = static_cast<uint64_t>(_mm_extract_epi64(v, 1));
    p += 4;
  }
  if ((n & 2) != 0) {
    write<uint32_t>(p, bits);
    bits >>= 32;
    p += 2;
  }
  if ((n & 1) != 0) write<uint16_t>(p, bits);
}

inline __m256 load(const float* p, int64_t n) { return _mm256_maskload_ps(p, first_floats(n)); }
inline __m256d load(const double* p, int64_t n) { return _mm256_maskload_pd(p, first_doubles(n)); }
template <class T> __m256 load(const T* p, int64_t n) { return widen(load_halves(p, n), p); }
inline void store(float* p, int64_t n, __m256 v) { _mm256_maskstore_ps(p, first_floats(n), v); }
inline void store(double* p, int64_t n, __m256d v) { _mm256_maskstore_pd(p, first_doubles(n), v); }
template <class T> void store(T* p, int64_t n, __m256 v) { store_halves(p, n, narrow(v, p)); }

}  // namespace
}  // namespace bnext::cpu
