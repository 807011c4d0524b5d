// One vector type for all kernels: 64 bytes of the accumulation type on every machine, as one
// AVX-512 register, two AVX2 registers or 16 numbers. The same lanes add up in the same order
// everywhere, and every multiplication that feeds an addition is an explicit fma, so that AVX2 and
// AVX-512 give the same bits, and the backward recomputes the forward's signs exactly.
//
// Include after exactly one isa_*.h, which supplies these on a native register r:
//   broadcast(a)                        every lane a
//   add sub mul div                     + - * /
//   fma(a,b,c) fnma(a,b,c)              a*b + c, c - a*b
//   select_le(a, b, r, s)               a <= b ? r : s, hence s where either is NaN
//   shift_to_exponent(v)                2^n for v = n + 1.5 * 2^23 (double: 2^52), whose low bits are n's
//   max_keep_nan(low, v)                low > v ? low : v, so that NaN passes: relu with low 0 (its
//                                       -0 is as good as 0), nothing with low -infinity
//   positive_bits(v)                    a bit for each lane: epilogue.h's is_positive(v)
//   select_if_positive(v, dy)           is_positive(v) ? dy : 0
//   select_or_zero(bits, dy)            the same by bits
//   load(p) store(p, r)                 of any storage type, with its conversion
//   load(p, n, fill) store(p, n, r)     of the first n lanes only; the others are `fill`, untouched
//   store_all(p, r[]) stream_all(p, r[])  of a whole vector, where that is more than a store for each register:
//   optional load_double(p) store(float*, r)     a double register from and to floats stream(p, r) stream_fence() a
//   store past the caches, to a multiple of its size, and the
//                                       fence that must follow before another thread may look
//   prefetch(p)                         of any address
//
// All of it has internal linkage: three object files carry three versions of the same names, and
// none of them may leak into another.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../core/types.h"

namespace bnext::cpu {
namespace {

template <class A>
struct Vec {
  using Register = typename native<A>::type;
  static constexpr int64_t lanes = 64 / sizeof(A);
  static constexpr int registers = 64 / sizeof(Register);
  static constexpr int lanes_each = static_cast<int>(lanes) / registers;

  Register r[registers];

  Vec() = default;
  explicit Vec(A a) {
    for (Register& i : r) i = broadcast(a);
  }
  // The vector whose i-th register is f(i).
  template <class F>
  static Vec each(F f) {
    Vec v;
    for (int i = 0; i < registers; i++) v.r[i] = f(i);
    return v;
  }

  friend Vec operator+(const Vec& a, const Vec& b) {
    return each([&](int i) { return add(a.r[i], b.r[i]); });
  }
  friend Vec operator-(const Vec& a, const Vec& b) {
    return each([&](int i) { return sub(a.r[i], b.r[i]); });
  }
  friend Vec operator*(const Vec& a, const Vec& b) {
    return each([&](int i) { return mul(a.r[i], b.r[i]); });
  }
  friend Vec operator/(const Vec& a, const Vec& b) {
    return each([&](int i) { return div(a.r[i], b.r[i]); });
  }
  friend Vec operator-(const Vec& a) { return Vec(A(-0.0)) - a; }
};

template <class A> Vec<A> fma(const Vec<A>& a, const Vec<A>& b, const Vec<A>& c) {
  return Vec<A>::each([&](int i) { return fma(a.r[i], b.r[i], c.r[i]); });
}
template <class A> Vec<A> fnma(const Vec<A>& a, const Vec<A>& b, const Vec<A>& c) {
  return Vec<A>::each([&](int i) { return fnma(a.r[i], b.r[i], c.r[i]); });
}
template <class A> Vec<A> max_keep_nan(const Vec<A>& low, const Vec<A>& v) {
  return Vec<A>::each([&](int i) { return max_keep_nan(low.r[i], v.r[i]); });
}
template <class A> Vec<A> select_if_positive(const Vec<A>& v, const Vec<A>& dy) {
  return Vec<A>::each([&](int i) { return select_if_positive(v.r[i], dy.r[i]); });
}
template <class A> Vec<A> select_or_zero(uint32_t bits, const Vec<A>& dy) {
  return Vec<A>::each([&](int i) { return select_or_zero(bits >> (i * Vec<A>::lanes_each), dy.r[i]); });
}
template <class A> uint32_t positive_bits(const Vec<A>& v) {
  uint32_t bits = 0;
  for (int i = 0; i < Vec<A>::registers; i++) bits |= positive_bits(v.r[i]) << (i * Vec<A>::lanes_each);
  return bits;
}

// How much of a vector lies inside the data. Kernels are written once and called with either.
struct Full {};
struct Partial {
  int64_t n;  // 0 < n < lanes
};

template <class T, class V = Vec<acc_t<T>>>
V load(const T* p, Full, const V& = V(0)) {
  return V::each([&](int i) { return load(p + i * V::lanes_each); });
}
template <class T, class V = Vec<acc_t<T>>>
V load(const T* p, Partial part, const V& fill = V(0)) {
  return V::each([&](int i) { return load(p + i * V::lanes_each, part.n - i * V::lanes_each, fill.r[i]); });
}
template <int lanes_each, class T, class R, int n>
void store_all(T* p, const R (&r)[n]) {
  for (int i = 0; i < n; i++) store(p + i * lanes_each, r[i]);
}
template <int lanes_each, class T, class R, int n>
void stream_all(T* p, const R (&r)[n]) {
  for (int i = 0; i < n; i++) stream(p + i * lanes_each, r[i]);
}
template <class T, class A>
void store(T* p, Full, const Vec<A>& v) {
  store_all<Vec<A>::lanes_each>(p, v.r);
}
template <class T, class A>
void store(T* p, Partial part, const Vec<A>& v) {
  for (int i = 0; i < Vec<A>::registers; i++)
    store(p + i * Vec<A>::lanes_each, part.n - i * Vec<A>::lanes_each, v.r[i]);
}
// A store that goes past the caches on demand, where p is a multiple of its size.
template <class T, class P, class A>
void store(T* p, P part, const Vec<A>& v, bool past_caches) {
  if constexpr (std::is_same_v<P, Full>) {
    if (past_caches) {
      stream_all<Vec<A>::lanes_each>(p, v.r);
      return;
    }
  }
  store(p, part, v);
}
template <class T>
bool can_stream(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (Vec<acc_t<T>>::lanes * sizeof(T)) == 0;
}

// As double, whatever A is.
template <class A>
Vec<double> wide(const A* p) {
  return Vec<double>::each([&](int i) { return load_double(p + i * Vec<double>::lanes_each); });
}

// The sum of four vectors in double, by a fixed tree.
template <class A>
double sum(const Vec<A> (&v)[4]) {
  A lanes[4][Vec<A>::lanes];
  for (int k = 0; k < 4; k++) store(lanes[k], Full{}, v[k]);
  Vec<double> total(0.0);
  for (int i = 0; i < Vec<A>::lanes; i += Vec<double>::lanes)
    total = total + ((wide(lanes[0] + i) + wide(lanes[1] + i)) + (wide(lanes[2] + i) + wide(lanes[3] + i)));
  double t[Vec<double>::lanes];
  store(t, Full{}, total);
  return ((t[0] + t[1]) + (t[2] + t[3])) + ((t[4] + t[5]) + (t[6] + t[7]));
}

// Calls f(i, which, Whole or Part) for the vectors of [0, width); `which` says which of 4
// accumulators to use, so that additions need not wait for each other. It is a constant type:
// an array indexed by a variable would live in memory.
template <int i> struct Index { static constexpr int value = i; };
template <class A, class F>
void sweep(int64_t width, F f) {
  constexpr int64_t lanes = Vec<A>::lanes;
  int64_t i = 0;
  for (; i + 4 * lanes <= width; i += 4 * lanes) {
    f(i, Index<0>{}, Full{});
    f(i + lanes, Index<1>{}, Full{});
    f(i + 2 * lanes, Index<2>{}, Full{});
    f(i + 3 * lanes, Index<3>{}, Full{});
  }
  const int64_t left = width - i;
  if (left >= lanes) f(i, Index<0>{}, Full{});
  if (left >= 2 * lanes) f(i + lanes, Index<1>{}, Full{});
  if (left >= 3 * lanes) f(i + 2 * lanes, Index<2>{}, Full{});
  if (left % lanes != 0) f(i + left / lanes * lanes, Index<3>{}, Partial{left % lanes});
}

// The same where the bits of a sign mask go along: `first` is the element that i = 0 stands for,
// and every vector but the first begins on a byte of the mask.
template <class A, class F>
void sweep_bytes(int64_t first, int64_t width, F f) {
  constexpr int64_t lanes = Vec<A>::lanes;
  const int64_t to_byte = -first & 7;
  int64_t i = to_byte < width ? to_byte : width;
  if (i > 0) f(int64_t{0}, Index<0>{}, Partial{i});
  for (; i + lanes <= width; i += lanes) f(i, Index<0>{}, Full{});
  if (i < width) f(i, Index<0>{}, Partial{width - i});
}

// Elements that will be read soon, fetched into cache. They may lie beyond the tensor: nobody
// dereferences them.
template <class T> struct Ahead {
  // How far to fetch ahead in data that is read in order, where other loads distract the hardware.
  static constexpr int64_t distance = 2048 / sizeof(T);
  uintptr_t row;
  Ahead(const void* base, int64_t first) : row(reinterpret_cast<uintptr_t>(base) + first * sizeof(T)) {}
  void fetch(int64_t i) const { prefetch(reinterpret_cast<const void*>(row + i * sizeof(T))); }
};

// The bits of elements [i, i + lanes) or [i, i + n), as sweep_bytes cuts them. Writing leaves the
// bits of a byte below i as they are and clears those above, so that a task which goes through
// whole bytes in ascending order needs no cleared memory.
inline uint32_t get_bits(const uint8_t* mask, int64_t i, int64_t n) {
  const uint8_t* p = mask + i / 8;
  return (n > 8 ? static_cast<uint32_t>(p[0] | p[1] << 8) : p[0]) >> (i % 8);
}
inline void put_bits(uint8_t* mask, int64_t i, int64_t n, uint32_t bits) {
  uint8_t* p = mask + i / 8;
  bits &= (1u << n) - 1u;
  const uint32_t below = i % 8 == 0 ? 0u : p[0] & ((1u << i % 8) - 1u);
  p[0] = static_cast<uint8_t>(below | bits << (i % 8));
  if (n > 8) p[1] = static_cast<uint8_t>(bits >> 8);
}
template <class A> constexpr int64_t lanes_of(Full) { return Vec<A>::lanes; }
template <class A> constexpr int64_t lanes_of(Partial part) { return part.n; }

}  // namespace
}  // namespace bnext::cpu
