#include "device.h"

#include <algorithm>
#include <climits>
#include <mutex>

#include "plans/plans.h"

namespace bnext::cuda {

namespace {

// Static and dynamic shared memory of a block, together, that a kernel has without asking.
constexpr size_t kDefaultSharedBytes = 48 * 1024;

// For what is slow and happens once. Never destroyed, like all that is kept here: at exit the CUDA driver may be gone
// before static objects are.
std::mutex& once() {
  static std::mutex& mutex = *new std::mutex;
  return mutex;
}

// What a kernel may have on a device, which only grows.
struct KernelLimits {
  const void* kernel;
  int device;
  KernelLimits* next;
  size_t static_shared;
  std::atomic<int64_t> dynamic_shared{-1};
  std::atomic<int> min_threads{INT_MAX};
  std::atomic<unsigned> cluster{kMaxCluster};
  int carveout = 0;  // percent

  KernelLimits(const void* kernel, int device, KernelLimits* next, size_t static_shared)
      : kernel(kernel), device(device), next(next), static_shared(static_shared) {}

  bool covers(int threads, size_t shared, unsigned size) const {
    return static_cast<int64_t>(shared) <= dynamic_shared && threads >= min_threads && size <= cluster;
  }
};

// A hash table that is read without a lock; nothing is ever taken out of it.
constexpr size_t kBuckets = 512;
std::atomic<KernelLimits*> buckets[kBuckets];

std::atomic<KernelLimits*>& bucket_of(const void* kernel, int device) {
  const uint64_t key = reinterpret_cast<uintptr_t>(kernel) + static_cast<uint64_t>(device);
  return buckets[(key * 0x9e3779b97f4a7c15) >> 55];
}

KernelLimits* find(const void* kernel, int device) {
  KernelLimits* entry = bucket_of(kernel, device);
  while (entry && (entry->kernel != kernel || entry->device != device)) entry = entry->next;
  return entry;
}

// A multiprocessor's memory is shared out between L1 and shared memory. Asks for as many blocks as registers and
// threads leave room for, so that shared memory does not run two blocks one after the other.
cudaError_t set_carveout(KernelLimits& granted, int threads, size_t dynamic_shared) {
  auto prefer = [&](int percent) {
    return cudaFuncSetAttribute(granted.kernel, cudaFuncAttributePreferredSharedMemoryCarveout, percent);
  };
  int all = 0, reserved = 0, blocks = 0;
  cudaError_t error = cudaDeviceGetAttribute(&all, cudaDevAttrMaxSharedMemoryPerMultiprocessor, granted.device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, granted.device);
  }
  if (error == cudaSuccess) error = prefer(cudaSharedmemCarveoutMaxShared);
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, granted.kernel, threads, 0);
  }
  if (error != cudaSuccess) return error;
  const int64_t bytes = blocks * static_cast<int64_t>(granted.static_shared + dynamic_shared + reserved);
  const int64_t percent = std::min<int64_t>(100, (100 * bytes + all - 1) / all);
  granted.carveout = std::max(granted.carveout, static_cast<int>(percent));
  return prefer(granted.carveout);
}

cudaError_t grant(const void* kernel, int device, int threads, size_t dynamic_shared, unsigned cluster) {
  const std::lock_guard<std::mutex> lock(once());
  KernelLimits* granted = find(kernel, device);
  if (!granted) {
    cudaFuncAttributes attributes = {};
    const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return error;
    std::atomic<KernelLimits*>& bucket = bucket_of(kernel, device);
    granted = new KernelLimits(kernel, device, bucket, attributes.sharedSizeBytes);
    bucket = granted;
  }
  const auto dynamic = std::max(static_cast<int64_t>(dynamic_shared), granted->dynamic_shared.load());
  threads = std::min(threads, granted->min_threads.load());
  if (dynamic > granted->dynamic_shared && granted->static_shared + dynamic > kDefaultSharedBytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(dynamic));
    if (error != cudaSuccess) return error;
  }
  if (cluster > granted->cluster) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
    granted->cluster = cluster;
  }
  if (const cudaError_t error = set_carveout(*granted, threads, dynamic); error != cudaSuccess) return error;
  granted->min_threads = threads;
  granted->dynamic_shared = dynamic;
  return cudaSuccess;
}

// What depends on the code that runs on the current device.
cudaError_t query_code(DeviceProperties* properties) {
  const void* kernel = sample_kernel();
  cudaFuncAttributes attributes = {};
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return error;
  // Kernels were compiled for an architecture, perhaps to PTX that became machine code for this device just now: what
  // is not in the one is not in the other.
  properties->compute_capability =
      std::min({properties->compute_capability, attributes.ptxVersion, attributes.binaryVersion});
  properties->clusters = properties->clusters && properties->compute_capability >= 90;
  if (!properties->clusters) return cudaSuccess;
  const auto shared = static_cast<size_t>(properties->shared_per_block) - attributes.sharedSizeBytes;
  for (size_t i = 0; i < properties->clusters_together.size(); ++i) {
    const unsigned size = 2u << i;
    error = allow_kernel_resources(kernel, kMaxThreads, shared, size);
    if (error == cudaSuccess) {
      error = count_clusters(kernel, kMaxThreads, size, shared, &properties->clusters_together[i]);
    }
    if (error == cudaSuccess) continue;
    // A device that refuses simply has none.
    properties->clusters_together[i] = 0;
    cudaGetLastError();
  }
  return cudaSuccess;
}

// Bytes a microsecond, as far as a copy gets: nine tenths of twice the clock in kHz times the width in bits. A guess
// where the driver does not say, which only makes plans worse.
int64_t query_bandwidth(int device) {
  int clock = 0, bits = 0;
  if (cudaDeviceGetAttribute(&clock, cudaDevAttrMemoryClockRate, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, device) != cudaSuccess) {
    cudaGetLastError();
    clock = 0;
  }
  const int64_t peak = int64_t{2} * clock * bits / 8 / 1000;
  return peak > 0 ? peak * 9 / 10 : 1000000;
}

}  // namespace

cudaError_t query_device(int device, DeviceProperties* properties) {
  int major = 0, minor = 0, multiprocessors = 0, shared_all = 0, shared = 0, l2 = 0, cooperative = 0, clusters = 0;
  struct {
    int* value;
    cudaDeviceAttr attribute;
  } const queries[] = {
      {&major, cudaDevAttrComputeCapabilityMajor},        {&minor, cudaDevAttrComputeCapabilityMinor},
      {&multiprocessors, cudaDevAttrMultiProcessorCount}, {&shared_all, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
      {&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin}, {&l2, cudaDevAttrL2CacheSize},
      {&cooperative, cudaDevAttrCooperativeLaunch},       {&clusters, cudaDevAttrClusterLaunch},
  };
  for (const auto& query : queries) {
    cudaError_t error = cudaDeviceGetAttribute(query.value, query.attribute, device);
    if (error != cudaSuccess) return error;
  }
  *properties = {10 * major + minor, multiprocessors, shared_all, shared, l2, query_bandwidth(device), {},
                 cooperative != 0,   clusters != 0};
  int current = 0;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  error = query_code(properties);
  const cudaError_t restored = cudaSetDevice(current);
  return error != cudaSuccess ? error : restored;
}

cudaError_t allow_kernel_resources(const void* kernel, int threads, size_t dynamic_shared, unsigned cluster) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const KernelLimits* granted = find(kernel, device);
  if (granted && granted->covers(threads, dynamic_shared, cluster)) return cudaSuccess;
  return grant(kernel, device, threads, dynamic_shared, cluster);
}

cudaError_t Device::get(int ordinal, Device** device) {
  constexpr int kMaxDevices = 256;
  static std::atomic<Device*> devices[kMaxDevices];
  if (ordinal < 0 || ordinal >= kMaxDevices) return cudaErrorInvalidDevice;
  *device = devices[ordinal];
  if (*device) return cudaSuccess;
  DeviceProperties found = {};
  if (const cudaError_t error = query_device(ordinal, &found); error != cudaSuccess) return error;
  // Of two threads that both get here, one has asked in vain.
  auto* queried = new Device(found);
  if (devices[ordinal].compare_exchange_strong(*device, queried)) *device = queried;
  else delete queried;
  return cudaSuccess;
}

DeviceProperties Device::properties() const {
  DeviceProperties now = found_;
  now.cooperative = now.cooperative && cooperative_;
  now.clusters = now.clusters && clusters_;
  if (!large_clusters_) now.clusters_together.back() = 0;
  return now;
}

bool Device::disable_refused(const Plan& plan, cudaError_t error) {
  switch (error) {
    case cudaErrorCooperativeLaunchTooLarge:  // there are fewer multiprocessors than the device says
    case cudaErrorInvalidClusterSize:
    case cudaErrorLaunchOutOfResources:
    case cudaErrorNotPermitted:
    case cudaErrorNotSupported: break;
    default: return false;
  }
  if (plan.cluster() > kMaxCluster) large_clusters_ = false;
  else if (plan.cluster() > 1) clusters_ = false;
  else if (plan.cooperative()) cooperative_ = false;
  else return false;
  cudaGetLastError();
  return true;
}

std::vector<std::string> Device::refused() const {
  std::vector<std::string> out;
  if (!cooperative_) out.push_back("cooperative launches");
  if (!clusters_) out.push_back("clusters");
  if (!large_clusters_) out.push_back("clusters of " + std::to_string(kLargeCluster));
  return out;
}

}  // namespace bnext::cuda
