// How a partition is launched, for the plans' launchers; and all operations.
#pragma once

#include <type_traits>
#include <utility>

#include "../device/cuda_compat.h"
#include "../launch.h"
#include "../ops/batch_norm_backward.cuh"
#include "../ops/batch_norm_forward.cuh"
#include "plans.h"

namespace bnext::cuda {

// The same as with_op(), which each operation has in its file, for the plan `resident`: of the operations that it is
// compiled for. The planner asks for no others.
template <class Params, class F>
cudaError_t with_resident_op(const Params& p, F&& f) {
  return with_op(p, [&](auto op) {
    if constexpr (decltype(op)::kResident) return f(op);
    else return cudaErrorInvalidValue;
  });
}

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
