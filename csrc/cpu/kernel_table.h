// The table of kernels of the instruction set whose isa_*.h was included before.
#pragma once

#include "backward_kernel.h"
#include "normalize_kernel.h"
#include "stats_kernel.h"

namespace bnext::cpu {
namespace {

template <class T>
constexpr Kernels<acc_t<T>> kernels_of() {
  return {
      moments<T>,
      column_moments<T>,
      {{normalize<T, Addend::none, false>, normalize<T, Addend::none, true>},
       {normalize<T, Addend::residual, false>, normalize<T, Addend::residual, true>},
       {normalize<T, Addend::residual_with_mask, false>, normalize<T, Addend::residual_with_mask, true>},
       {normalize_general<T, false>, normalize_general<T, true>}},
      {sums<T, Gate::none>, sums<T, Gate::recompute>, sums<T, Gate::mask>, sums<T, Gate::general>},
      {column_sums<T, Gate::none>, column_sums<T, Gate::recompute>, column_sums<T, Gate::mask>,
       column_sums<T, Gate::general>},
      {{{gradient<T, Gate::none, false, false>, gradient<T, Gate::none, false, true>},
        {gradient<T, Gate::none, true, false>, gradient<T, Gate::none, true, true>}},
       {{gradient<T, Gate::recompute, false, false>, gradient<T, Gate::recompute, false, true>},
        {gradient<T, Gate::recompute, true, false>, gradient<T, Gate::recompute, true, true>}},
       {{gradient<T, Gate::mask, false, false>, gradient<T, Gate::mask, false, true>},
        {gradient<T, Gate::mask, true, false>, gradient<T, Gate::mask, true, true>}},
       {{gradient<T, Gate::general, false, false>, gradient<T, Gate::general, false, true>},
        {gradient<T, Gate::general, true, false>, gradient<T, Gate::general, true, true>}}},
  };
}

constexpr KernelSet table = {kernels_of<float>(), kernels_of<f16>(), kernels_of<bf16>(), kernels_of<double>()};

}  // namespace
}  // namespace bnext::cpu
