// Statistics of a set of numbers, mergeable in any grouping without cancellation.
//
// The mean is kept as shift + offset, where shift is one of the numbers or near their mean: differences
// to it are exact or nearly so (Sterbenz), so that |mean| / std of 1e4 costs float32 nothing, and a constant
// set has offset and variance exactly 0. The variance is kept as such, not as a sum of squares,
// so that values of 1e18 do not overflow float32. Merging is Chan, Golub and LeVeque's pairwise
// update ("Updating formulae and a pairwise algorithm for computing sample variances", 1979,
// eq. 2.1), divided by the count. docs/math.md derives it.
#pragma once

#include <cmath>

#include "types.h"

namespace bnext {

// 1 / v of a count, for the weights of a merge. To half a unit in the last place, or hardly more: weights that are all
// off to the same side, by two units, would make a mean or a variance that much smaller at each of a dozen merges.
template <class A>
BNEXT_HD A reciprocal(A v) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(A) == 4) {
    const float r = __fdividef(1.0f, v);  // a step of Newton's method, without the division's branch for subnormals
    return fmaf(r, fmaf(-v, r, 1.0f), r);
  }
#endif
  return A(1) / v;
}

// Aligned so that it moves 16 bytes at a time.
template <class A>
struct alignas(16) Welford {
  A count;  // 0: the empty set; the other fields are then ignored
  A shift;
  A offset;
  A var;  // biased

  BNEXT_HD A mean() const { return shift + offset; }
  // What rounding takes from the mean, where it is kept as a B.
  template <class B>
  BNEXT_HD B mean_rest(B rounded) const {
    return static_cast<B>((shift - rounded) + offset);
  }

  // Moves the shift to the mean, as far as that can be represented, and leaves the rest as offset, exactly (TwoSum:
  // Knuth, "The Art of Computer Programming", volume 2, section 4.2.2). The offset to a first element is as large as
  // the numbers' spread, and each merge would round it: so it is done before a state is merged with many others.
  BNEXT_HD void recentre() {
    const A sum = shift + offset, part = sum - shift;
    const A rest = (shift - (sum - part)) + (offset - part);
    if (!(rest == rest)) return;  // of infinite numbers
    shift = sum;
    offset = rest;
  }

  // Adds a set of `n` numbers whose mean is shift + mean_offset, for a count that stays above 0.
  BNEXT_HD void add(A n, A mean_offset, A n_var) {
    A total = count + n;
    A f = n * reciprocal(total);
    A delta = mean_offset - offset;
    offset += delta * f;
    var += f * ((n_var - var) + delta * delta * (A(1) - f));
    count = total;
  }

  BNEXT_HD void merge(const Welford& other) {
    if (other.count == A(0)) return;
    if (count == A(0)) {
      *this = other;
      return;
    }
    add(other.count, (other.shift - shift) + other.offset, other.var);
  }
};

template <class A>
BNEXT_HD A inverse_std(A var, double eps) {
  // 1 / sqrt, both correctly rounded: rsqrt's approximation is the largest error it would make.
  return A(1) / std::sqrt(var + static_cast<A>(eps));
}

// What forward does to the running statistics of one channel. The batch variance enters
// unbiased, unless `biased`; for one element a channel that is 0 / 0, which torch.nn refuses before it comes here.
template <class A>
struct RunningUpdate {
  A factor;      // weight of the new batch
  A correction;  // of its variance: m / (m - 1), or 1

  // For a batch of m numbers a channel. momentum=None (`cumulative`) weighs all batches alike, num_batches_tracked of
  // which went before; without a counter there is nothing to update either.
  template <class Params>
  static BNEXT_HD RunningUpdate of(const Params& p, int64_t m) {
    const int64_t* batches = p.num_batches_tracked;
    const bool averages = p.cumulative && batches != nullptr;
    const A factor = averages ? A(1) / static_cast<A>(*batches + 1) : static_cast<A>(p.momentum);
    // m / (m - 1), to half a unit in the last place, without numbers of double width: GPUs are slow at these, and all
    // blocks wait for this.
    return {factor, p.biased ? A(1) : A(1) + A(1) / static_cast<A>(m - 1)};
  }

  BNEXT_HD A mean(A running, A batch) const { return (A(1) - factor) * running + factor * batch; }
  BNEXT_HD A var(A running, A batch) const { return (A(1) - factor) * running + factor * (batch * correction); }
};

}  // namespace bnext
