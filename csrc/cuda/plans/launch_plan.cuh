// From run-time values to an operation's template arguments, and how a partition is launched: for the plans' launchers.
#pragma once

#include <type_traits>
#include <utility>

#include "../device/cuda_compat.h"
#include "../launch.h"
#include "../ops/batch_norm_backward.cuh"
#include "../ops/batch_norm_forward.cuh"
#include "plans.h"

namespace bnext::cuda {

// The simulated device of the tests does without one of the 16-bit types, for the time that its kernels take to
// compile: they differ from those of the other in a conversion.
#if !defined(BNEXT_WITHOUT)
#define BNEXT_WITHOUT void
#endif

// f(T{}). An unknown dtype is an error, and launches nothing.
template <class F>
cudaError_t with_dtype(DType dtype, F&& f) {
  switch (dtype) {
#define BNEXT_CASE(name, type, python)                                    \
  case DType::name:                                                       \
    if constexpr (!std::is_same_v<type, BNEXT_WITHOUT>) return f(type{}); \
    else break;
    BNEXT_DTYPES(BNEXT_CASE)
#undef BNEXT_CASE
  }
  return cudaErrorInvalidValue;
}

// f(BatchNormForward<...>{}) of the parameters' dtype and epilogue. Each of these is a kernel of every plan: what is
// not told apart here is not compiled for each plan either.
template <class F>
cudaError_t with_op(const BatchNormForwardParams& p, F&& f) {
  return with_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    switch (epilogue_of(p)) {
      case Epilogue::none: return f(BatchNormForward<T, Epilogue::none>{});
      case Epilogue::relu: return f(BatchNormForward<T, Epilogue::relu>{});
      case Epilogue::add: return f(BatchNormForward<T, Epilogue::add>{});
      case Epilogue::add_relu: return f(BatchNormForward<T, Epilogue::add_relu>{});
      case Epilogue::general: return f(BatchNormForward<T, Epilogue::general>{});
      case Epilogue::run_time: break;  // of cooperative.cu alone
    }
    return cudaErrorInvalidValue;
  });
}

// f(BatchNormBackward<...>{}) of the parameters' dtype and derivative.
template <class F>
cudaError_t with_op(const BatchNormBackwardParams& p, F&& f) {
  return with_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    switch (derivative_of(p)) {
      case Derivative::none: return f(BatchNormBackward<T, Derivative::none>{});
      case Derivative::relu: return f(BatchNormBackward<T, Derivative::relu>{});
      case Derivative::mask: return f(BatchNormBackward<T, Derivative::mask>{});
      case Derivative::general: return f(BatchNormBackward<T, Derivative::general>{});
      case Derivative::run_time: break;  // of cooperative.cu alone
    }
    return cudaErrorInvalidValue;
  });
}

// The same for the plan `resident`, of the operations that it is compiled for; the planner asks for no others.
template <class Params, class F>
cudaError_t with_resident_op(const Params& p, F&& f) {
  return with_op(p, [&](auto op) {
    if constexpr (decltype(op)::kResident) return f(op);
    else return cudaErrorInvalidValue;
  });
}

// The reduction on its own: of the forward, it does not depend on the epilogue.
template <class F>
cudaError_t with_reduction(const BatchNormForwardParams& p, F&& f) {
  return with_dtype(p.dtype, [&](auto element) { return f(BatchNormForward<decltype(element), Epilogue::none>{}); });
}
template <class F>
cudaError_t with_reduction(const BatchNormBackwardParams& p, F&& f) {
  return with_op(p, std::forward<F>(f));
}

// The operation that reads its epilogue or derivative from the parameters, for vectors of N elements.
template <class Params, class T, int N> struct RunTime;
template <class T, int N> struct RunTime<BatchNormForwardParams, T, N> {
  using Op = BatchNormForward<T, Epilogue::run_time, N>;
};
template <class T, int N> struct RunTime<BatchNormBackwardParams, T, N> {
  using Op = BatchNormBackward<T, Derivative::run_time, N>;
};
template <class Params, class T, int N>
using RunTimeOp = typename RunTime<Params, T, N>::Op;

// Launches one pass; nothing where the grid is empty. Resident blocks exchange partial results: they are launched as
// clusters, or cooperatively.
template <class... Params, class... Args>
cudaError_t launch_partition(void (*kernel)(Params...), const Partition& partition, cudaStream_t stream,
                             Args&&... args) {
  if (partition.blocks() == 0) return cudaSuccess;
  if (!partition.fits()) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<uint32_t>(partition.blocks())), block(partition.threads);
  // shared_bytes are static: of a size that the kernel knows. What depends on the shape is dynamic.
  const auto shared = static_cast<size_t>(partition.resident_bytes + partition.exchange_bytes);
  const unsigned cluster = partition.cluster();
  // Beyond 48 KB, and for clusters of 16, a kernel needs leave, which the device gives once.
  if (partition.shared_bytes + partition.resident_bytes > 0) {
    const cudaError_t error =
        allow_kernel_resources(reinterpret_cast<const void*>(kernel), partition.threads, shared, cluster);
    if (error != cudaSuccess) return error;
  }
  if (partition.pdl) return launch_pdl(kernel, grid, block, shared, stream, std::forward<Args>(args)...);
  if (partition.cooperative()) {
    return launch_cooperative(kernel, grid, block, shared, stream, std::forward<Args>(args)...);
  }
  // A cluster of one block is launched as any other block: clusters need a newer device.
  if (cluster == 1) return launch(kernel, grid, block, shared, stream, std::forward<Args>(args)...);
  return launch_cluster(kernel, grid, block, cluster, shared, stream, std::forward<Args>(args)...);
}

}  // namespace bnext::cuda
