// The table of kernels of the instruction set whose isa_*.h was included before.
#pragma once

#include "backward_kernel.h"
#include "normalize_kernel.h"
#include "stats_kernel.h"

namespace bnext::cpu {
namespace {

// In the order of the fields of Kernels; arrays in the order of their enumerations, then false and true.
template <class T>
constexpr Kernels<acc_t<T>> kernels_of() {
  return {
      centre<T>,
      moments<T>,
      column_moments<T>,
      // y and the mask.
      {{normalize<T, Epilogue::none, false>, normalize<T, Epilogue::none, true>},
       {normalize<T, Epilogue::relu, false>, normalize<T, Epilogue::relu, true>},
       {normalize<T, Epilogue::add, false>, normalize<T, Epilogue::add, true>},
       {normalize<T, Epilogue::add_relu, false>, normalize<T, Epilogue::add_relu, true>},
       {normalize_general<T, false>, normalize_general<T, true>}},
      // Sums, which no other kernel needs: of a block, and of each of its columns.
      {sums<T, Derivative::none>, sums<T, Derivative::relu>, sums<T, Derivative::mask>, sums<T, Derivative::general>},
      {column_sums<T, Derivative::none>, column_sums<T, Derivative::relu>, column_sums<T, Derivative::mask>,
       column_sums<T, Derivative::general>},
      // dx, in eval mode and in training.
      {{{gradient<T, Derivative::none, false, false>, gradient<T, Derivative::none, false, true>},
        {gradient<T, Derivative::none, true, false>, gradient<T, Derivative::none, true, true>}},
       {{gradient<T, Derivative::relu, false, false>, gradient<T, Derivative::relu, false, true>},
        {gradient<T, Derivative::relu, true, false>, gradient<T, Derivative::relu, true, true>}},
       {{gradient<T, Derivative::mask, false, false>, gradient<T, Derivative::mask, false, true>},
        {gradient<T, Derivative::mask, true, false>, gradient<T, Derivative::mask, true, true>}},
       {{gradient<T, Derivative::general, false, false>, gradient<T, Derivative::general, false, true>},
        {gradient<T, Derivative::general, true, false>, gradient<T, Derivative::general, true, true>}}},
  };
}

constexpr KernelSet table = {kernels_of<float>(), kernels_of<f16>(), kernels_of<bf16>(), kernels_of<double>()};

}  // namespace
}  // namespace bnext::cpu
