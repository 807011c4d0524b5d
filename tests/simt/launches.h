// How the tests of this folder launch: through cudaLaunchKernelEx, with any attributes.
#pragma once

#include <cuda_runtime.h>

#include <vector>

inline cudaLaunchAttribute cooperative() {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  return attribute;
}

inline cudaLaunchAttribute overlapping() {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

inline cudaLaunchAttribute clusters_of(unsigned size) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {size, 1, 1};
  return attribute;
}

template <class... Params, class... Args>
cudaError_t launch_with(std::vector<cudaLaunchAttribute> attributes, void (*kernel)(Params...), dim3 grid, dim3 block,
                        size_t dynamic_shared, Args&&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = dynamic_shared;
  config.attrs = attributes.data();
  config.numAttrs = static_cast<unsigned>(attributes.size());
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t dynamic_shared, Args&&... args) {
  return launch_with({}, kernel, grid, block, dynamic_shared, std::forward<Args>(args)...);
}

template <class... Params>
const void* address(void (*kernel)(Params...)) {
  return reinterpret_cast<const void*>(kernel);
}
