// The table of kernels of the instruction set whose isa_*.h was included before.
#pragma once

#include <utility>

#include "backward_kernel.h"
#include "normalize_kernel.h"
#include "stats_kernel.h"

namespace bnext::cpu {
namespace {

template <class T, Epilogue epilogue, bool by_column>
constexpr auto normalize_kernel() {
  if constexpr (epilogue == Epilogue::general) return normalize_general<T, by_column>;
  else return normalize<T, epilogue, by_column>;
}

// In the order of the fields of Kernels; arrays in the order of their enumerations, then false and true.
template <class T, int... e, int... d>
constexpr Kernels<acc_t<T>> kernels_of(std::integer_sequence<int, e...>, std::integer_sequence<int, d...>) {
  return {
      centre<T>,
      moments<T>,
      column_moments<T>,
      {{normalize_kernel<T, Epilogue{e}, false>(), normalize_kernel<T, Epilogue{e}, true>()}...},
      {sums<T, Derivative{d}>...},
      {column_sums<T, Derivative{d}>...},
      {{{gradient<T, Derivative{d}, false, false>, gradient<T, Derivative{d}, false, true>},
        {gradient<T, Derivative{d}, true, false>, gradient<T, Derivative{d}, true, true>}}...},
      stream_fence,
  };
}

template <class T>
constexpr Kernels<acc_t<T>> kernels_of() {
  return kernels_of<T>(std::make_integer_sequence<int, kEpilogues>(), std::make_integer_sequence<int, kDerivatives>());
}

#define BNEXT_KERNELS(name, type, python) kernels_of<type>(),
constexpr KernelSet table = {BNEXT_DTYPES(BNEXT_KERNELS)};
#undef BNEXT_KERNELS

}  // namespace
}  // namespace bnext::cpu
