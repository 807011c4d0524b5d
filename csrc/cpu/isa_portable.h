// Registers of any machine: 16 bytes in the vector extension of GCC and Clang, which becomes SSE2,
// NEON or whatever the target flags allow; single numbers elsewhere. See vec.h for what each
// function means.
#pragma once

#include <cmath>
#include <cstring>

#include "../core/half.h"

#if defined(__GNUC__)
#define BNEXT_VECTOR __attribute__((vector_size(16)))
#else
#define BNEXT_VECTOR
#endif

namespace bnext::cpu {
namespace {

template <class A> struct native;
template <> struct native<float> { typedef float type BNEXT_VECTOR; };
template <> struct native<double> { typedef double type BNEXT_VECTOR; };
using Floats = native<float>::type;
using Doubles = native<double>::type;

// The lanes of a register, where there is no operator for what is to be done with them.
template <class A> struct Lanes {
  static constexpr int n = sizeof(typename native<A>::type) / sizeof(A);
  A v[n];
  Lanes() = default;
  explicit Lanes(const typename native<A>::type& r) { memcpy(v, &r, sizeof v); }
  typename native<A>::type pack() const {
    typename native<A>::type r;
    memcpy(&r, v, sizeof v);
    return r;
  }
};

inline Floats broadcast(float v) { return v - Floats{}; }
inline Doubles broadcast(double v) { return v - Doubles{}; }

template <class R> R add(const R& a, const R& b) { return a + b; }
template <class R> R sub(const R& a, const R& b) { return a - b; }
template <class R> R mul(const R& a, const R& b) { return a * b; }
template <class R> R div(const R& a, const R& b) { return a / b; }

// Where the target has no fused multiply-add, std::fma is a library call, and a compiler cannot
// fuse behind our back either: forward and backward still agree bit for bit.
inline Floats fma(const Floats& a, const Floats& b, const Floats& c) {
#if defined(__FP_FAST_FMAF)
  Lanes<float> l(a), m(b), n(c);
  for (int i = 0; i < l.n; i++) l.v[i] = std::fma(l.v[i], m.v[i], n.v[i]);
  return l.pack();
#else
  return a * b + c;
#endif
}
inline Doubles fma(const Doubles& a, const Doubles& b, const Doubles& c) {
#if defined(__FP_FAST_FMA)
  Lanes<double> l(a), m(b), n(c);
  for (int i = 0; i < l.n; i++) l.v[i] = std::fma(l.v[i], m.v[i], n.v[i]);
  return l.pack();
#else
  return a * b + c;
#endif
}
template <class R> R fnma(const R& a, const R& b, const R& c) { return fma(-a, b, c); }

template <class R> R max_keep_nan(const R& low, const R& v) { return low > v ? low : v; }
template <class R> R relu_gate(const R& z, const R& dy) { return z <= R{} ? R{} : dy; }
template <class R> R select_le(const R& a, const R& b, const R& r, const R& s) { return a <= b ? r : s; }
template <class Bits, class A> typename native<A>::type shift_lanes(Lanes<A> l, int mantissa_bits) {
  for (A& v : l.v) v = bit_cast<A>((bit_cast<Bits>(v) << mantissa_bits) + bit_cast<Bits>(A(1)));
  return l.pack();
}
inline Floats shift_to_exponent(const Floats& v) { return shift_lanes<uint32_t>(Lanes<float>(v), 23); }
inline Doubles shift_to_exponent(const Doubles& v) { return shift_lanes<uint64_t>(Lanes<double>(v), 52); }
template <class A> typename native<A>::type keep_lanes(uint32_t bits, Lanes<A> dy) {
  for (int i = 0; i < dy.n; i++) dy.v[i] = bits >> i & 1u ? dy.v[i] : A(0);
  return dy.pack();
}
inline Floats select_or_zero(uint32_t bits, const Floats& dy) { return keep_lanes(bits, Lanes<float>(dy)); }
inline Doubles select_or_zero(uint32_t bits, const Doubles& dy) { return keep_lanes(bits, Lanes<double>(dy)); }
template <class A> uint32_t lane_bits(const Lanes<A>& v) {
  uint32_t bits = 0;
  for (int i = 0; i < v.n; i++) bits |= (v.v[i] <= A(0) ? 0u : 1u) << i;
  return bits;
}
inline uint32_t positive_bits(const Floats& v) { return lane_bits(Lanes<float>(v)); }
inline uint32_t positive_bits(const Doubles& v) { return lane_bits(Lanes<double>(v)); }

// What takes a loop over lanes, which is also some twenty instructions a lane to convert 16 bits, is
// not worth a copy in every kernel.
template <class T, class R = typename native<acc_t<T>>::type>
[[gnu::noinline]] R load_lanes(const T* p, int64_t n) {
  Lanes<acc_t<T>> l(R{});
  for (int i = 0; i < l.n && i < n; i++) l.v[i] = widen(p[i]);
  return l.pack();
}
template <class T, class R>
[[gnu::noinline]] void store_lanes(T* p, int64_t n, const R& v) {
  const Lanes<acc_t<T>> l(v);
  for (int i = 0; i < l.n && i < n; i++) p[i] = narrow<T>(l.v[i]);
}

inline Floats load(const float* p) {
  Floats r;
  memcpy(&r, p, sizeof r);
  return r;
}
inline Doubles load(const double* p) {
  Doubles r;
  memcpy(&r, p, sizeof r);
  return r;
}
template <class T> Floats load(const T* p) { return load_lanes(p, Lanes<float>::n); }
template <class T> auto load(const T* p, int64_t n) { return load_lanes(p, n); }
template <class A> Doubles load_double(const A* p) {
  Lanes<double> l;
  for (int i = 0; i < l.n; i++) l.v[i] = static_cast<double>(p[i]);
  return l.pack();
}

inline void store(float* p, const Floats& v) { memcpy(p, &v, sizeof v); }
inline void store(double* p, const Doubles& v) { memcpy(p, &v, sizeof v); }
template <class T> void store(T* p, const Floats& v) { store_lanes(p, Lanes<float>::n, v); }
template <class T, class R> void store(T* p, int64_t n, const R& v) { store_lanes(p, n, v); }
inline void store(float* p, const Doubles& v) {
  const Lanes<double> l(v);
  for (int i = 0; i < l.n; i++) p[i] = static_cast<float>(l.v[i]);
}

// The caches are left to themselves.
constexpr bool kHasStreams = false;
inline void stream_fence() {}
inline void prefetch(const void*) {}

}  // namespace
}  // namespace bnext::cpu
