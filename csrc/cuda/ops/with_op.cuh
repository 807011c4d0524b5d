// From run-time values to an operation's template arguments. What is not told apart here is not compiled for each plan
// either.
//
// Each operation, known by its parameters, has in its file:
//   with_op(p, f)           f(Op{}) of the parameters' dtype and of what is fused
//   with_reduction(p, f)    the same for the reduction on its own, which may depend on less
//   RunTimeOp<Params, T, N> the operation that reads what is fused from the parameters, for vectors of N elements
#pragma once

#include <type_traits>

#include "../../core/types.h"
#include "../device/cuda_compat.h"

namespace bnext::cuda {

// The simulated device of the tests does without one of the 16-bit types, for the time that its kernels take to
// compile: they differ from those of the other in a conversion.
#if !defined(BNEXT_WITHOUT)
#define BNEXT_WITHOUT void
#endif

// f(T{}), of what there are kernels for.
template <class F>
cudaError_t with_element(DType dtype, F&& f) {
  return with_dtype(dtype, [&](auto element) -> cudaError_t {
    if constexpr (!std::is_same_v<decltype(element), BNEXT_WITHOUT>) return f(element);
    else return cudaErrorInvalidValue;
  });
}

template <class Params, class T, int N> struct RunTime;
template <class Params, class T, int N>
using RunTimeOp = typename RunTime<Params, T, N>::Op;

}  // namespace bnext::cuda
