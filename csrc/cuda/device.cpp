#include "launch.h"

namespace bnext::cuda {

cudaError_t query_device(int device, DeviceProperties* properties) {
  int major = 0, minor = 0, multiprocessors = 0, threads = 0, shared_all = 0, shared = 0;
  struct {
    int* value;
    cudaDeviceAttr attribute;
  } const queries[] = {
      {&major, cudaDevAttrComputeCapabilityMajor},
      {&minor, cudaDevAttrComputeCapabilityMinor},
      {&multiprocessors, cudaDevAttrMultiProcessorCount},
      {&threads, cudaDevAttrMaxThreadsPerMultiProcessor},
      {&shared_all, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
      {&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin},
  };
  for (const auto& query : queries) {
    cudaError_t error = cudaDeviceGetAttribute(query.value, query.attribute, device);
    if (error != cudaSuccess) return error;
  }
  *properties = {10 * major + minor, multiprocessors, threads, shared_all, shared};
  return cudaSuccess;
}

}  // namespace bnext::cuda
