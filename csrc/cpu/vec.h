// One vector type for all kernels: 64 bytes of the accumulation type on every machine, as one
// AVX-512 register, two AVX2 registers or 16 numbers. The same lanes add up in the same order
// everywhere, and a multiplication is fused into an addition where it says fma, and nowhere else (the flags of
// bnext/_toolchain.py see to that), so that AVX2 and AVX-512 give the same bits, and the backward recomputes the
// forward's signs exactly.
//
// Include after exactly one isa_*.h, which supplies these on a native register r:
//   broadcast(a)                        every lane a
//   add sub mul div                     + - * /
//   fma(a,b,c) fnma(a,b,c)              a*b + c, c - a*b
//   select_le(a, b, r, s)               a <= b ? r : s, hence s where either is NaN
//   shift_to_exponent(v)                2^n for v = n + 1.5 * 2^23 (double: 2^52), whose low bits are n's
//   max_keep_nan(low, v)                low > v ? low : v, so that NaN passes
//   relu_gate(z, dy)                    z <= 0 ? 0 : dy
//   positive_bits(z)                    a bit for each lane: 0 where z <= 0
//   select_or_zero(bits, dy)            a lane's bit ? dy : 0
//   load(p) store(p, r)                 of any storage type, with its conversion
//   load(p, n) store(p, n, r)           of the first n lanes only; the others are 0, untouched
//   load_double(p) store(float*, r)     a double register from and to floats
//   kHasStreams, and if so stream(p, r)  a store past the caches, to a multiple of its size
//   stream_fence()                      must follow those before another thread may look
//   store_all(p, r[]) stream_all(p, r[])  optional: of a vector, where that takes less than its registers
//   prefetch(p)                         of any address, into the second-level cache
//
// All of it has internal linkage: each instruction set's object file carries a version of the same names, and
// none of them may leak into another.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "../core/types.h"
#include "kernels.h"

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
// As in core/activation.h, with one instruction each. (Of -0 relu is -0 here, which is as good as 0.)
template <class A> Vec<A> relu(const Vec<A>& z) { return max_keep_nan(Vec<A>(0), z); }
template <class A> Vec<A> relu_gate(const Vec<A>& z, const Vec<A>& dy) {
  return Vec<A>::each([&](int i) { return relu_gate(z.r[i], dy.r[i]); });
}
template <class A> Vec<A> select_or_zero(uint32_t bits, const Vec<A>& dy) {
  return Vec<A>::each([&](int i) { return select_or_zero(bits >> (i * Vec<A>::lanes_each), dy.r[i]); });
}
template <class A> uint32_t positive_bits(const Vec<A>& v) {
  uint32_t bits = 0;
  for (int i = 0; i < Vec<A>::registers; i++) bits |= positive_bits(v.r[i]) << (i * Vec<A>::lanes_each);
  return bits;
}

// How much of a vector lies inside the data. Kernels are written once and called with any of these.
struct Full {};
struct Streamed {};  // all of it, and stores go past the caches: to whole cache lines
// The same of a vector that two rows share: the first n lanes are the end of one, the others the beginning of the next.
struct Seam { int64_t n; };
// The first n lanes, 0 < n <= lanes.
struct Partial { int64_t n; };
// All of it, but only the last n lanes, 0 < n < lanes, are new: the end of a row that is no whole number of vectors.
// To load and store the others a second time takes less than to leave them out.
struct Overlapping { int64_t n; };
// The same of one register, for rows that end in no more: 49 elements take 3 vectors and one of AVX2's registers.
struct OneRegister {};

template <class A> constexpr int64_t lanes_of(Full) { return Vec<A>::lanes; }
template <class A> constexpr int64_t lanes_of(Streamed) { return Vec<A>::lanes; }
template <class A> constexpr int64_t lanes_of(Seam) { return Vec<A>::lanes; }
template <class A> constexpr int64_t lanes_of(Partial part) { return part.n; }
template <class A> constexpr int64_t lanes_of(Overlapping) { return Vec<A>::lanes; }
template <class A> constexpr int64_t lanes_of(OneRegister) { return Vec<A>::lanes_each; }

// v in the lanes that count in a sum, 0 in the others.
template <class A> Vec<A> zero_inactive(Full, const Vec<A>& v) { return v; }
template <class A> Vec<A> zero_inactive(Partial part, const Vec<A>& v) {
  return select_or_zero((1u << part.n) - 1u, v);
}
template <class A> Vec<A> zero_inactive(Overlapping part, const Vec<A>& v) {
  return select_or_zero(~0u << (Vec<A>::lanes - part.n), v);
}

template <class T, class P, class V = Vec<acc_t<T>>>
V load(const T* p, P) {
  return V::each([&](int i) { return load(p + i * V::lanes_each); });
}
template <class T, class V = Vec<acc_t<T>>>
V load(const T* p, Partial part) {
  return V::each([&](int i) { return load(p + i * V::lanes_each, part.n - i * V::lanes_each); });
}
template <class T, class V = Vec<acc_t<T>>>
V load(const T* p, OneRegister) {
  V v(0);  // of whose other registers nothing comes, so that no instruction is made
  v.r[0] = load(p);
  return v;
}
template <int lanes_each, class T, class R, int n>
void store_all(T* p, const R (&r)[n]) {
  for (int i = 0; i < n; i++) store(p + i * lanes_each, r[i]);
}
template <int lanes_each, class T, class R, int n>
void stream_all(T* p, const R (&r)[n]) {
  for (int i = 0; i < n; i++) stream(p + i * lanes_each, r[i]);
}
template <class T, class P, class A>
void store(T* p, P, const Vec<A>& v) {
  store_all<Vec<A>::lanes_each>(p, v.r);
}
template <class T, class A>
void store(T* p, Partial part, const Vec<A>& v) {
  for (int i = 0; i < Vec<A>::registers; i++)
    store(p + i * Vec<A>::lanes_each, part.n - i * Vec<A>::lanes_each, v.r[i]);
}
template <class T, class A>
void store(T* p, OneRegister, const Vec<A>& v) {
  store(p, v.r[0]);
}
template <class T, class A>
void store(T* p, Streamed, const Vec<A>& v) {
  stream_all<Vec<A>::lanes_each>(p, v.r);
}

template <class T, class A>
void store(T* p, Seam, const Vec<A>& v) {
  store(p, Streamed{}, v);
}

// The numbers of a vector's lanes.
template <class A> struct LaneNumbers {
  A at[Vec<A>::lanes];
  constexpr LaneNumbers() : at() {
    for (int i = 0; i < Vec<A>::lanes; i++) at[i] = static_cast<A>(i);
  }
};
// The first n lanes of a, and the others of b.
template <class A>
Vec<A> joined(const Vec<A>& a, const Vec<A>& b, int64_t n) {
  static constexpr LaneNumbers<A> lanes;
  const Vec<A> lane = load(lanes.at, Full{}), last(static_cast<A>(n - 1));
  return Vec<A>::each([&](int i) { return select_le(lane.r[i], last.r[i], a.r[i], b.r[i]); });
}

// As double, whatever A is.
template <class A>
Vec<double> load_as_double(const A* p) {
  return Vec<double>::each([&](int i) { return load_double(p + i * Vec<double>::lanes_each); });
}

// The sum of two or four vectors in double, by a fixed tree.
template <class A, int count>
double sum(const Vec<A> (&v)[count]) {
  A lanes[count][Vec<A>::lanes];
  for (int k = 0; k < count; k++) store(lanes[k], Full{}, v[k]);
  Vec<double> total(0.0);
  for (int i = 0; i < Vec<A>::lanes; i += Vec<double>::lanes) {
    Vec<double> some = load_as_double(lanes[0] + i) + load_as_double(lanes[1] + i);
    if constexpr (count == 4) some = some + (load_as_double(lanes[2] + i) + load_as_double(lanes[3] + i));
    total = total + some;
  }
  double t[Vec<double>::lanes];
  store(t, Full{}, total);
  return ((t[0] + t[1]) + (t[2] + t[3])) + ((t[4] + t[5]) + (t[6] + t[7]));
}

// Every n-th of a vector's lanes, added up as a tree. By a loop, which compilers leave in memory, it would take longer
// than to load and add a short row.
template <class A, int64_t n>
A sum_of_every(const A* lanes) {
  if constexpr (n == Vec<A>::lanes) return *lanes;
  else return sum_of_every<A, 2 * n>(lanes) + sum_of_every<A, 2 * n>(lanes + n);
}
// The same to within some roundings of A, in half the time.
template <class A>
A fast_sum(const Vec<A> (&v)[4]) {
  A lanes[Vec<A>::lanes];
  store(lanes, Full{}, (v[0] + v[1]) + (v[2] + v[3]));
  return sum_of_every<A, 1>(lanes);
}

// For rows [0, rows) of `width` elements, which are summed up: calls begin(row), and for the row's vectors
// f(what begin returned, i, which, part). `which` says in which of 4 accumulators, so that additions need not wait for
// each other. It is a constant type: an array indexed by a variable would live in memory. Short rows have a constant
// number of vectors, so that accumulators stay in registers from row to row.
template <int i> struct Index { static constexpr int value = i; };
template <class A, int fulls, class Begin, class F>
void sum_short_rows(int64_t rows, int64_t width, Begin begin, F f) {
  constexpr int64_t lanes = Vec<A>::lanes;
  const int64_t left = width % lanes;
  for (int64_t r = 0; r < rows; r++) {
    const auto row = begin(r);
    f(row, int64_t{0}, Index<0>{}, Full{});
    if constexpr (fulls >= 2) f(row, lanes, Index<1>{}, Full{});
    if constexpr (fulls >= 3) f(row, 2 * lanes, Index<2>{}, Full{});
    if (left != 0) f(row, width - lanes, Index<3>{}, Overlapping{left});
  }
}
template <class A, class Begin, class F>
void sum_rows(int64_t rows, int64_t width, Begin begin, F f) {
  constexpr int64_t lanes = Vec<A>::lanes;
  if (width < lanes) {
    for (int64_t r = 0; r < rows; r++) f(begin(r), int64_t{0}, Index<0>{}, Partial{width});
    return;
  }
  // Where a vector takes four registers, accumulators are in memory either way.
  if constexpr (Vec<A>::registers <= 2) {
    switch (width / lanes) {
      case 1: return sum_short_rows<A, 1>(rows, width, begin, f);
      case 2: return sum_short_rows<A, 2>(rows, width, begin, f);
      case 3: return sum_short_rows<A, 3>(rows, width, begin, f);
    }
  }
  for (int64_t r = 0; r < rows; r++) {
    const auto row = begin(r);
    int64_t i = 0;
    for (; i + 4 * lanes <= width; i += 4 * lanes) {
      f(row, i, Index<0>{}, Full{});
      f(row, i + lanes, Index<1>{}, Full{});
      f(row, i + 2 * lanes, Index<2>{}, Full{});
      f(row, i + 3 * lanes, Index<3>{}, Full{});
    }
    const int64_t left = width - i;
    if (left >= lanes) f(row, i, Index<0>{}, Full{});
    if (left >= 2 * lanes) f(row, i + lanes, Index<1>{}, Full{});
    if (left >= 3 * lanes) f(row, i + 2 * lanes, Index<2>{}, Full{});
    if (left % lanes != 0) f(row, width - lanes, Index<3>{}, Overlapping{left % lanes});
  }
}

// Calls f(i, part) for the vectors of [begin, width). Where f works in place, or writes past the caches, nothing is to
// be taken a second time: then the last vector is partial.
enum class Tail { overlapping, partial };
template <class A, class F>
void for_each_vector(int64_t width, Tail tail, F f, int64_t begin = 0) {
  constexpr int64_t lanes = Vec<A>::lanes;
  int64_t i = begin;
  for (; i + lanes <= width; i += lanes) f(i, Full{});
  if (i == width) return;
  if (tail == Tail::partial || width < lanes) return f(i, Partial{width - i});
  constexpr int64_t lanes_each = Vec<A>::lanes_each;
  if constexpr (lanes_each < lanes) {
    if (width - i <= lanes_each) return f(width - lanes_each, OneRegister{});
  }
  f(width - lanes, Overlapping{width - i});
}
// The bits of elements [i, i + n) of a sign mask, n <= 16, of no byte but those that these lie in. Writing leaves the
// bits of a byte below i as they are and clears those above, so that a task which goes through whole bytes in
// ascending order needs no cleared memory.
inline uint32_t get_bits(const uint8_t* mask, int64_t i, int64_t n) {
  const uint8_t* p = mask + i / 8;
  const int64_t shift = i % 8, last = (shift + n - 1) / 8;
  return (p[0] | static_cast<uint32_t>(p[last > 0]) << 8 | static_cast<uint32_t>(p[last]) << (8 * last)) >> shift;
}
inline void put_bits(uint8_t* mask, int64_t i, int64_t n, uint32_t bits) {
  uint8_t* p = mask + i / 8;
  const int64_t shift = i % 8, last = (shift + n - 1) / 8;
  const uint32_t below = shift == 0 ? 0u : p[0] & ((1u << shift) - 1u);
  const uint32_t all = below | (bits & ((1u << n) - 1u)) << shift;
  p[0] = static_cast<uint8_t>(all);
  if (last >= 1) p[1] = static_cast<uint8_t>(all >> 8);
  if (last == 2) p[2] = static_cast<uint8_t>(all >> 16);
}

}  // namespace
}  // namespace bnext::cpu
