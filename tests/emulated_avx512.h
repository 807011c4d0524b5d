// The instructions of csrc/cpu/isa_avx512.h, lane by lane, for processors that have no more than AVX2. The test
// replaces _mm512_ by emulated_ there, and __m512 by Emulated.
#pragma once

#include <immintrin.h>

#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstring>

template <class T> struct EmulatedLanes {
  static constexpr int n = 64 / sizeof(T);
  T v[n];
};
using Emulated = EmulatedLanes<float>;
using Emulatedd = EmulatedLanes<double>;
using Emulatedi = EmulatedLanes<uint32_t>;

template <class To, class From> To emulated_cast(const From& from) {
  To to;
  std::memcpy(&to, &from, sizeof(to) < sizeof(from) ? sizeof(to) : sizeof(from));
  return to;
}
template <class T, class F> EmulatedLanes<T> emulated_each(F f) {
  EmulatedLanes<T> r;
  for (int i = 0; i < r.n; i++) r.v[i] = f(i);
  return r;
}
template <class T, class F> uint32_t emulated_mask(F f) {
  uint32_t mask = 0;
  for (int i = 0; i < EmulatedLanes<T>::n; i++) mask |= static_cast<uint32_t>(f(i)) << i;
  return mask;
}

#define ARITHMETIC(suffix, V, T)                                                         \
  inline V emulated_set1_##suffix(T a) {                                                 \
    return emulated_each<T>([&](int) { return a; });                                     \
  }                                                                                      \
  inline V emulated_setzero_##suffix() { return emulated_set1_##suffix(0); }             \
  inline V emulated_add_##suffix(V a, V b) {                                             \
    return emulated_each<T>([&](int i) { return a.v[i] + b.v[i]; });                     \
  }                                                                                      \
  inline V emulated_sub_##suffix(V a, V b) {                                             \
    return emulated_each<T>([&](int i) { return a.v[i] - b.v[i]; });                     \
  }                                                                                      \
  inline V emulated_mul_##suffix(V a, V b) {                                             \
    return emulated_each<T>([&](int i) { return a.v[i] * b.v[i]; });                     \
  }                                                                                      \
  inline V emulated_div_##suffix(V a, V b) {                                             \
    return emulated_each<T>([&](int i) { return a.v[i] / b.v[i]; });                     \
  }                                                                                      \
  inline V emulated_fmadd_##suffix(V a, V b, V c) {                                      \
    return emulated_each<T>([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });    \
  }                                                                                      \
  inline V emulated_fnmadd_##suffix(V a, V b, V c) {                                     \
    return emulated_each<T>([&](int i) { return std::fma(-a.v[i], b.v[i], c.v[i]); });   \
  }                                                                                      \
  inline V emulated_max_##suffix(V a, V b) {                                             \
    return emulated_each<T>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });   \
  }                                                                                      \
  inline uint32_t emulated_cmp_##suffix##_mask(V a, V b, int predicate) {                \
    return emulated_mask<T>([&](int i) {                                                 \
      if (predicate == _CMP_NLE_UQ) return !(a.v[i] <= b.v[i]);                          \
      if (predicate == _CMP_LE_OQ) return a.v[i] <= b.v[i];                              \
      assert(predicate == _CMP_UNORD_Q);                                                 \
      return std::isnan(a.v[i]) || std::isnan(b.v[i]);                                   \
    });                                                                                  \
  }                                                                                      \
  inline V emulated_mask_blend_##suffix(uint32_t k, V a, V b) {                          \
    return emulated_each<T>([&](int i) { return (k >> i & 1) != 0 ? b.v[i] : a.v[i]; }); \
  }                                                                                      \
  inline V emulated_maskz_mov_##suffix(uint32_t k, V a) {                                \
    return emulated_mask_blend_##suffix(k, emulated_setzero_##suffix(), a);              \
  }                                                                                      \
  inline V emulated_loadu_##suffix(const T* p) {                                         \
    return emulated_each<T>([&](int i) { return p[i]; });                                \
  }                                                                                      \
  inline V emulated_maskz_loadu_##suffix(uint32_t k, const T* p) {                       \
    return emulated_each<T>([&](int i) { return (k >> i & 1) != 0 ? p[i] : T(0); });     \
  }                                                                                      \
  inline void emulated_storeu_##suffix(T* p, V a) { std::memcpy(p, a.v, sizeof a.v); }   \
  inline void emulated_mask_storeu_##suffix(T* p, uint32_t k, V a) {                     \
    for (int i = 0; i < V::n; i++)                                                       \
      if ((k >> i & 1) != 0) p[i] = a.v[i];                                              \
  }                                                                                      \
  inline void emulated_stream_##suffix(T* p, V a) {                                      \
    assert(reinterpret_cast<uintptr_t>(p) % 64 == 0);                                    \
    emulated_storeu_##suffix(p, a);                                                      \
  }
ARITHMETIC(ps, Emulated, float)
ARITHMETIC(pd, Emulatedd, double)
#undef ARITHMETIC

// Integers
inline Emulatedi emulated_set1_epi32(int a) {
  return emulated_each<uint32_t>([&](int) { return a; });
}
inline Emulatedi emulated_add_epi32(Emulatedi a, Emulatedi b) {
  return emulated_each<uint32_t>([&](int i) { return a.v[i] + b.v[i]; });
}
inline Emulatedi emulated_mask_add_epi32(Emulatedi from, uint32_t k, Emulatedi a, Emulatedi b) {
  return emulated_each<uint32_t>([&](int i) { return (k >> i & 1) != 0 ? a.v[i] + b.v[i] : from.v[i]; });
}
inline Emulatedi emulated_mask_or_epi32(Emulatedi from, uint32_t k, Emulatedi a, Emulatedi b) {
  return emulated_each<uint32_t>([&](int i) { return (k >> i & 1) != 0 ? a.v[i] | b.v[i] : from.v[i]; });
}
inline uint32_t emulated_test_epi32_mask(Emulatedi a, Emulatedi b) {
  return emulated_mask<uint32_t>([&](int i) { return (a.v[i] & b.v[i]) != 0; });
}
inline Emulatedi emulated_slli_epi32(Emulatedi a, int bits) {
  return emulated_each<uint32_t>([&](int i) { return a.v[i] << bits; });
}
inline Emulatedi emulated_slli_epi64(Emulatedi a, int bits) {
  const auto wide = emulated_cast<EmulatedLanes<uint64_t>>(a);
  return emulated_cast<Emulatedi>(emulated_each<uint64_t>([&](int i) { return wide.v[i] << bits; }));
}
inline Emulatedi emulated_add_epi64(Emulatedi a, Emulatedi b) {
  const auto x = emulated_cast<EmulatedLanes<uint64_t>>(a), y = emulated_cast<EmulatedLanes<uint64_t>>(b);
  return emulated_cast<Emulatedi>(emulated_each<uint64_t>([&](int i) { return x.v[i] + y.v[i]; }));
}
// From the last lane to the first.
template <class... Bytes> Emulatedi emulated_set_epi8(Bytes... from_last) {
  static_assert(sizeof...(from_last) == 64);
  const uint8_t given[] = {static_cast<uint8_t>(from_last)...};
  return emulated_cast<Emulatedi>(emulated_each<uint8_t>([&](int i) { return given[63 - i]; }));
}
inline Emulatedi emulated_maskz_permutexvar_epi8(uint64_t k, Emulatedi index, Emulatedi a) {
  const auto at = emulated_cast<EmulatedLanes<uint8_t>>(index), lanes = emulated_cast<EmulatedLanes<uint8_t>>(a);
  return emulated_cast<Emulatedi>(
      emulated_each<uint8_t>([&](int i) { return (k >> i & 1) != 0 ? lanes.v[at.v[i] % 64] : uint8_t{0}; }));
}
template <class... Shorts> Emulatedi emulated_set_epi16(Shorts... from_last) {
  static_assert(sizeof...(from_last) == 32);
  const uint16_t given[] = {static_cast<uint16_t>(from_last)...};
  return emulated_cast<Emulatedi>(emulated_each<uint16_t>([&](int i) { return given[31 - i]; }));
}
inline Emulatedi emulated_permutexvar_epi16(Emulatedi index, Emulatedi a) {
  const auto at = emulated_cast<EmulatedLanes<uint16_t>>(index), lanes = emulated_cast<EmulatedLanes<uint16_t>>(a);
  return emulated_cast<Emulatedi>(emulated_each<uint16_t>([&](int i) { return lanes.v[at.v[i] % 32]; }));
}

// Between types
inline Emulatedi emulated_castps_si512(Emulated a) { return emulated_cast<Emulatedi>(a); }
inline Emulatedi emulated_castpd_si512(Emulatedd a) { return emulated_cast<Emulatedi>(a); }
inline Emulated emulated_castsi512_ps(Emulatedi a) { return emulated_cast<Emulated>(a); }
inline Emulatedd emulated_castsi512_pd(Emulatedi a) { return emulated_cast<Emulatedd>(a); }
inline Emulatedi emulated_castsi256_si512(__m256i a) {
  Emulatedi r = {};
  std::memcpy(&r, &a, sizeof a);
  return r;
}
inline __m256i emulated_castsi512_si256(Emulatedi a) { return emulated_cast<__m256i>(a); }
inline Emulatedi emulated_cvtepu16_epi32(__m256i a) {
  uint16_t lanes[16];
  std::memcpy(lanes, &a, sizeof lanes);
  return emulated_each<uint32_t>([&](int i) { return lanes[i]; });
}
inline Emulated emulated_cvtph_ps(__m256i a) {
  const __m256 halves[] = {_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))};
  return emulated_cast<Emulated>(halves);
}
inline __m256i emulated_cvtps_ph(Emulated a, int rounding) {
  assert(rounding == (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  const __m128i halves[] = {_mm256_cvtps_ph(_mm256_loadu_ps(a.v), _MM_FROUND_TO_NEAREST_INT),
                            _mm256_cvtps_ph(_mm256_loadu_ps(a.v + 8), _MM_FROUND_TO_NEAREST_INT)};
  return emulated_cast<__m256i>(halves);
}
inline uint32_t emulated_fpclass_ps_mask(Emulated a, int classes) {
  assert(classes == 0x20);
  return emulated_mask<float>([&](int i) { return std::fpclassify(a.v[i]) == FP_SUBNORMAL; });
}
// To the nearest, of two the even one; but of subnormals a zero.
inline __m256i emulated_cvtneps_pbh(Emulated a) {
  const auto bits = emulated_cast<Emulatedi>(a);
  uint16_t lanes[16];
  for (int i = 0; i < 16; i++) {
    const uint32_t u = bits.v[i];
    if (std::isnan(a.v[i])) lanes[i] = static_cast<uint16_t>((u | 0x400000) >> 16);
    else if (std::fpclassify(a.v[i]) == FP_SUBNORMAL) lanes[i] = static_cast<uint16_t>(u >> 31 << 15);
    else lanes[i] = static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  return emulated_cast<__m256i>(lanes);
}
inline Emulatedd emulated_cvtps_pd(__m256 a) {
  const auto lanes = emulated_cast<EmulatedLanes<float>>(a);
  return emulated_each<double>([&](int i) { return static_cast<double>(lanes.v[i]); });
}
inline __m256 emulated_cvtpd_ps(Emulatedd a) {
  float lanes[8];
  for (int i = 0; i < 8; i++) lanes[i] = static_cast<float>(a.v[i]);
  return _mm256_loadu_ps(lanes);
}

// AVX-512's masks on registers of AVX2
inline __m256i emulated256_maskz_loadu_epi16(uint32_t k, const void* from) {
  uint16_t lanes[16] = {};
  for (int i = 0; i < 16; i++)
    if ((k >> i & 1) != 0) lanes[i] = static_cast<const uint16_t*>(from)[i];
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes));
}
inline void emulated256_mask_storeu_epi16(void* to, uint32_t k, __m256i a) {
  uint16_t lanes[16];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), a);
  for (int i = 0; i < 16; i++)
    if ((k >> i & 1) != 0) static_cast<uint16_t*>(to)[i] = lanes[i];
}
