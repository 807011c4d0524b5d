// exp, tanh and what else core/activation.h asks of a vector, once for all instruction sets: they round alike wherever
// there is a fused multiply-add, so that AVX2 and AVX-512 give the same bits. Over the whole range, subnormal results
// included, exp is within 1.1 units in the last place and tanh within 2.5: tests/test_vec_math.py measures it.
#pragma once

#include "vec.h"

namespace bnext::cpu {
namespace {

template <class A> Vec<A> constant_like(const Vec<A>&, double v) { return Vec<A>(static_cast<A>(v)); }

template <class A> Vec<A> select_le(const Vec<A>& a, const Vec<A>& b, const Vec<A>& then, const Vec<A>& otherwise) {
  return Vec<A>::each([&](int i) { return select_le(a.r[i], b.r[i], then.r[i], otherwise.r[i]); });
}
template <class A> Vec<A> where_le(const Vec<A>& z, double limit, const Vec<A>& a, const Vec<A>& b) {
  return select_le(z, constant_like(z, limit), a, b);
}
template <class A> Vec<A> where_ge(const Vec<A>& z, double limit, const Vec<A>& a, const Vec<A>& b) {
  return select_le(constant_like(z, limit), z, a, b);
}

template <class A> struct ExpConstants;
template <> struct ExpConstants<float> {
  static constexpr float round = 0x1.8p23f;                                  // n + round has n in its lowest bits
  static constexpr float ln2_high = 0x1.63p-1f, ln2_low = -0x1.bd0106p-13f;  // n * ln2_high is exact
  static constexpr float lowest = -104, highest = 89;                        // exp rounds to 0, is infinity
  static constexpr int degree = 7;  // the next term of the series is below 2^-27
  static constexpr float tanh_is_one = 10, tanh_is_argument = 0x1p-13f;
};
template <> struct ExpConstants<double> {
  static constexpr double round = 0x1.8p52;
  static constexpr double ln2_high = 0x1.62e4p-1, ln2_low = 0x1.7f7d1cf79abcap-20;
  static constexpr double lowest = -746, highest = 710;
  static constexpr int degree = 13;  // 2^-57
  static constexpr double tanh_is_one = 20, tanh_is_argument = 0x1p-28;
};

template <class A> struct InverseFactorials {
  A at[ExpConstants<A>::degree + 1];
  constexpr InverseFactorials() : at() {
    double factorial = 1;
    for (int k = 0; k <= ExpConstants<A>::degree; k++) {
      if (k > 0) factorial *= k;
      at[k] = static_cast<A>(1 / factorial);
    }
  }
};
template <class A> constexpr InverseFactorials<A> kInverseFactorials;

// e^x = 2^n e^r with |r| <= ln(2) / 2, after Cody and Waite ("Software Manual for the Elementary Functions", 1980,
// chapter 6): ln(2) comes in two parts, so that r has hardly an error. This is n. (It is no field of one result with
// the next function's: GCC copies a struct of registers through memory.)
template <class A> Vec<A> exponent_of_exp(const Vec<A>& x) {
  const Vec<A> round(ExpConstants<A>::round);
  return fma(x, Vec<A>(A(1.4426950408889634)), round) - round;
}

// e^r - 1, by its Taylor series.
template <class A> Vec<A> fraction_of_exp(const Vec<A>& x, const Vec<A>& n) {
  using C = ExpConstants<A>;
  using V = Vec<A>;
  const V r = fnma(n, V(C::ln2_low), fnma(n, V(C::ln2_high), x));
  V sum(kInverseFactorials<A>.at[C::degree]);
  for (int k = C::degree - 1; k >= 2; k--) sum = fma(sum, r, V(kInverseFactorials<A>.at[k]));
  return fma(sum, r * r, r);
}

// 2^n, for n an integer and 2^n a normal number.
template <class A> Vec<A> power_of_two(const Vec<A>& n) {
  const Vec<A> low_bits = n + Vec<A>(ExpConstants<A>::round);
  return Vec<A>::each([&](int i) { return shift_to_exponent(low_bits.r[i]); });
}

template <class A> Vec<A> exp(const Vec<A>& x) {
  using C = ExpConstants<A>;
  using V = Vec<A>;
  const V bounded = where_le(x, C::lowest, V(C::lowest), where_ge(x, C::highest, V(C::highest), x));
  const V n = exponent_of_exp(bounded), fraction = fraction_of_exp(bounded, n);
  // In two steps, as 2^n may be infinite or subnormal where the result is not; only the last one rounds.
  const V round(C::round), half = fma(n, V(A(0.5)), round) - round;
  return (V(A(1)) + fraction) * power_of_two(half) * power_of_two(n - half);
}

// (e^2a - 1) / (e^2a + 1) of the magnitude a, where e^2a - 1 keeps the digits of a small a.
template <class A> Vec<A> tanh(const Vec<A>& z) {
  using C = ExpConstants<A>;
  using V = Vec<A>;
  const V a = where_le(z, 0, -z, z), bounded = where_ge(a, C::tanh_is_one, V(C::tanh_is_one), a);
  const V x = bounded + bounded, n = exponent_of_exp(x), fraction = fraction_of_exp(x, n);
  const V scale = power_of_two(n), e = fma(scale, fraction, scale - V(A(1)));
  const V t = e / (e + V(A(2)));
  return where_le(a, C::tanh_is_argument, z, where_le(z, 0, -t, t));
}

}  // namespace
}  // namespace bnext::cpu
