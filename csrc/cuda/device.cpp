#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#include "plans/plans.h"

namespace bnext::cuda {

cudaError_t query_device(int device, DeviceProperties* properties) {
  int major = 0, minor = 0, multiprocessors = 0, shared_all = 0, shared = 0, l2 = 0;
  struct {
    int* value;
    cudaDeviceAttr attribute;
  } const queries[] = {
      {&major, cudaDevAttrComputeCapabilityMajor},        {&minor, cudaDevAttrComputeCapabilityMinor},
      {&multiprocessors, cudaDevAttrMultiProcessorCount}, {&shared_all, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
      {&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin}, {&l2, cudaDevAttrL2CacheSize},
  };
  for (const auto& query : queries) {
    cudaError_t error = cudaDeviceGetAttribute(query.value, query.attribute, device);
    if (error != cudaSuccess) return error;
  }
  *properties = {10 * major + minor, multiprocessors, shared_all, shared, l2, 0};
  if (major < 9) return cudaSuccess;
  int current = 0;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  // A device that refuses simply has none.
  if (count_large_clusters(shared, &properties->large_clusters) != cudaSuccess) {
    properties->large_clusters = 0;
    cudaGetLastError();
  }
  return cudaSetDevice(current);
}

cudaError_t allow_kernel_resources(const void* kernel, size_t dynamic_shared, unsigned cluster) {
  struct Granted {
    size_t shared;
    unsigned cluster;
  };
  // Never destroyed: at exit the CUDA driver may be gone before static objects are.
  static std::mutex& mutex = *new std::mutex;
  static auto& granted = *new std::map<std::pair<const void*, int>, Granted>;
  // Static and dynamic shared memory above 48 KiB must be asked for; static alone stays below 20.
  constexpr size_t kWithoutAsking = 28 * 1024;
  if (dynamic_shared <= kWithoutAsking && cluster <= kMaxCluster) return cudaSuccess;

  int device = 0;
  if (cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  Granted& so_far = granted[{kernel, device}];
  if (dynamic_shared > std::max(kWithoutAsking, so_far.shared)) {
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(dynamic_shared));
    if (error != cudaSuccess) return error;
    so_far.shared = dynamic_shared;
  }
  if (cluster > kMaxCluster && cluster > so_far.cluster) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
    so_far.cluster = cluster;
  }
  return cudaSuccess;
}

}  // namespace bnext::cuda
