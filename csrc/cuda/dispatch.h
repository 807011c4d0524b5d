// From run-time values to template arguments, for the launchers.
#pragma once

#include <type_traits>
#include <utility>

#include "backward.cuh"
#include "cuda_compat.h"
#include "launch.h"
#include "normalize.cuh"

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
cudaError_t with_dtype_and_epilogue(const ForwardParams& p, F&& f) {
  return with_dtype(p.dtype, [&](auto element) {
    switch (epilogue_of(p)) {
      case Epilogue::none: return f(element, std::integral_constant<Epilogue, Epilogue::none>{});
      case Epilogue::relu: return f(element, std::integral_constant<Epilogue, Epilogue::relu>{});
      case Epilogue::add: return f(element, std::integral_constant<Epilogue, Epilogue::add>{});
      case Epilogue::add_relu: return f(element, std::integral_constant<Epilogue, Epilogue::add_relu>{});
    }
    return cudaErrorInvalidValue;
  });
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

// The blocks of a pass; nothing where there are none. Those that keep what they read exchange partial results: in
// clusters, or all being on the device together.
template <class... Params, class... Args>
cudaError_t launch_pass(void (*kernel)(Params...), const Partition& partition, cudaStream_t stream, Args&&... args) {
  if (partition.blocks() == 0) return cudaSuccess;
  if (!partition.fits()) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<uint32_t>(partition.blocks())), block(partition.threads);
  const auto shared = static_cast<size_t>(partition.resident_bytes);
  if (partition.pdl) return launch_pdl(kernel, grid, block, shared, stream, std::forward<Args>(args)...);
  if (shared == 0) return launch(kernel, grid, block, shared, stream, std::forward<Args>(args)...);
  const auto cluster = static_cast<unsigned>(partition.clustered ? partition.splits : 1);
  if (cudaError_t error = allow_kernel_resources(reinterpret_cast<const void*>(kernel), shared, cluster);
      error != cudaSuccess) {
    return error;
  }
  if (partition.splits == 1) return launch(kernel, grid, block, shared, stream, std::forward<Args>(args)...);
  if (!partition.clustered) return launch_cooperative(kernel, grid, block, shared, stream, std::forward<Args>(args)...);
  return launch_cluster(kernel, grid, block, cluster, shared, stream, std::forward<Args>(args)...);
}

// A kernel of the plan `small`, which does both passes.
template <class... Params, class P, class E>
cudaError_t launch_cooperative_plan(void (*kernel)(Params...), const Plan& plan, const Scratch& scratch,
                                    cudaStream_t stream, const P& p, const E& epilogue) {
  if (!plan.reduce.fits() || !plan.apply.fits()) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<uint32_t>(plan.blocks)), block(kMaxThreads);
  return launch_cooperative(kernel, grid, block, 0, stream, p, plan.reduce, plan.apply, scratch,
                            scratch.counters + (plan.counters - 1), epilogue);
}

}  // namespace bnext::cuda
