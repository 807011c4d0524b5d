// The CUDA that the kernels are written in. Under nvcc this is CUDA itself; with BNEXT_SIMT it is
// the execution model of tests/simt, which runs the same source on the CPU. The few things that
// need PTX live here, each next to its plain twin.
#pragma once

#if defined(BNEXT_SIMT)

#include "simt.h"

#define BNEXT_GRID_CONSTANT

#else

#include <cuda_runtime.h>

#include <utility>

#define BNEXT_GRID_CONSTANT __grid_constant__

namespace bnext::cuda {

// The one way to start a kernel.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t dynamic_shared, cudaStream_t stream,
                   Args&&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = dynamic_shared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

}  // namespace bnext::cuda

#endif
