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

// One block for each (tile, split) of the pass; nothing where there are none. Blocks that keep what they
// read exchange partial results: in clusters (planar), or all being on the device together (columns).
template <class... Params, class... Args>
cudaError_t launch_pass(void (*kernel)(Params...), const Pass& pass, cudaStream_t stream, Args&&... args) {
  if (pass.blocks() == 0) return cudaSuccess;
  if (!pass.fits()) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<uint32_t>(pass.blocks())), block(pass.threads);
  const auto shared = static_cast<size_t>(pass.kept_bytes);
  if (shared > 32 * 1024) {  // static and dynamic shared memory above 48 KiB must be asked for
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  if (shared == 0 || pass.splits == 1) return launch(kernel, grid, block, shared, stream, std::forward<Args>(args)...);
  if (pass.columns) return launch_cooperative(kernel, grid, block, shared, stream, std::forward<Args>(args)...);
  return launch_cluster(kernel, grid, block, static_cast<unsigned>(pass.splits), shared, stream,
                        std::forward<Args>(args)...);
}

}  // namespace bnext::cuda
