// From run-time values to template arguments, for the launchers.
#pragma once

#include <type_traits>
#include <utility>

#include "backward.cuh"
#include "dialect.h"
#include "launch.h"

namespace bnext::cuda {

template <class F>
cudaError_t with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::f64: return f(double{});
    case DType::f16: return f(f16{});
    case DType::bf16: return f(bf16{});
  }
  return cudaErrorInvalidValue;
}

template <class F>
cudaError_t with_dtype_and_gate(const BackwardParams& p, F&& f) {
  return with_dtype(p.dtype, [&](auto element) {
    switch (gate_of(p)) {
      case Gate::none: return f(element, std::integral_constant<Gate, Gate::none>{});
      case Gate::relu: return f(element, std::integral_constant<Gate, Gate::relu>{});
      case Gate::mask: return f(element, std::integral_constant<Gate, Gate::mask>{});
    }
    return cudaErrorInvalidValue;
  });
}

// The units that a small plan may have: 16 bytes, 8 elements with a mask, 1 element.
template <class T, class F>
cudaError_t with_unit(int32_t unit, F&& f) {
  constexpr int kWide = 16 / static_cast<int>(sizeof(T));
  if (unit == 1) return f(std::integral_constant<int, 1>{});
  if (unit == kWide) return f(std::integral_constant<int, kWide>{});
  if (unit == 8) return f(std::integral_constant<int, 8>{});
  return cudaErrorInvalidValue;
}

// One block for each (tile, split) of the pass, in clusters where the pass keeps what it reads; nothing
// where there are none.
template <class... Params, class... Args>
cudaError_t launch_pass(void (*kernel)(Params...), const Pass& pass, cudaStream_t stream, Args&&... args) {
  if (pass.blocks() == 0) return cudaSuccess;
  if (!pass.fits()) return cudaErrorInvalidValue;
  if (pass.kept_bytes > 32 * 1024) {  // static and dynamic shared memory above 48 KiB must be asked for
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(pass.kept_bytes));
    if (error != cudaSuccess) return error;
  }
  const auto cluster = static_cast<unsigned>(pass.kept_bytes > 0 ? pass.splits : 1);
  return launch_cluster(kernel, dim3(static_cast<uint32_t>(pass.blocks())), dim3(pass.threads), cluster,
                        static_cast<size_t>(pass.kept_bytes), stream, std::forward<Args>(args)...);
}

}  // namespace bnext::cuda
