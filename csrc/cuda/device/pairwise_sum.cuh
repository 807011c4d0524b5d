// Sums of a few numbers of one thread.
#pragma once

#include "cuda_compat.h"

namespace bnext::cuda {

// f(begin) + ... + f(begin + COUNT - 1) in halves: the order is fixed, and rounding errors and dependent additions grow
// with log2(COUNT), as do the registers that it takes.
template <int COUNT, class F>
__device__ __forceinline__ auto pairwise_sum(const F& f, int begin = 0) {
  if constexpr (COUNT == 1) {
    return f(begin);
  } else {
    auto low = pairwise_sum<COUNT / 2>(f, begin);
    return low + pairwise_sum<COUNT / 2>(f, begin + COUNT / 2);
  }
}

}  // namespace bnext::cuda
