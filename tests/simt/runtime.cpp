// CUDA's runtime on the simulated devices, with the limits that a driver enforces. Where its documentation names the
// error, that is what is returned; README.md lists them.
#include <algorithm>
#include <map>

#include "cuda_runtime.h"
#include "internal.h"

namespace simt {
namespace {

constexpr int kSharedWithoutOptIn = 48 * 1024;
constexpr int kMostThreads = 1024, kMostRegisters = 255, kRegisters = 65536;
constexpr unsigned kPortableCluster = 8;

// What a kernel has been given on one device.
struct Settings {
  int dynamic_shared = -1;  // -1: what 48 KB leave beside its static shared memory
  int carveout = cudaSharedmemCarveoutDefault;
  bool large_clusters = false;
};

std::vector<Device>& devices() {
  static auto& all = *new std::vector<Device>(1);
  return all;
}

int current_device = 0;
cudaError_t last_error = cudaSuccess;
std::map<std::pair<int, const void*>, Settings> settings;
std::map<std::string, uint64_t> calls;
Launched latest;
uint64_t launches = 0;

void call(const char* function) { ++calls[function]; }

cudaError_t done(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

int threads_per_multiprocessor(const Device& d) {
  if (d.compute_capability == 75) return 1024;
  return d.compute_capability % 10 == 0 && d.compute_capability < 120 ? 2048 : 1536;
}

int blocks_per_multiprocessor(const Device& d) {
  return threads_per_multiprocessor(d) == 2048 ? 32 : d.compute_capability >= 89 ? 24 : 16;
}

int reserved_shared(const Device& d) { return d.compute_capability >= 80 ? 1024 : 0; }

int most_dynamic_shared(const Kernel& kernel, const Settings& s) {
  return s.dynamic_shared >= 0 ? s.dynamic_shared
                               : std::max(0, kSharedWithoutOptIn - static_cast<int>(kernel.static_shared));
}

// As many as the launch bounds allow the compiler to use, in its steps of 8.
int registers(const Kernel& kernel) {
  const int most = kRegisters / static_cast<int>(kernel.threads * kernel.blocks);
  return most >= kMostRegisters ? kMostRegisters : most / 8 * 8;
}

// Of the memory that shared memory and L1 have in common, what shared memory gets: the next of the sizes that there
// are. Without a preference, as much as one block needs.
size_t split(const Device& d, int carveout, size_t block) {
  const size_t all = d.shared_per_multiprocessor;
  const size_t wish = carveout < 0 ? block : std::max(block, (all * carveout + 99) / 100);
  for (const size_t kb : {0, 8, 16, 32, 64, 100, 132, 164, 196}) {
    if (kb * 1024 >= wish && kb * 1024 < all) return kb * 1024;
  }
  return all;
}

int blocks_that_fit(const Device& d, const Kernel& kernel, uint64_t threads, size_t dynamic_shared, size_t capacity) {
  const uint64_t warps = (threads + kWarp - 1) / kWarp;
  const int of_a_warp = (registers(kernel) * static_cast<int>(kWarp) + 255) / 256 * 256;
  const uint64_t warps_by_registers = kRegisters / of_a_warp / 4 * 4;  // a quarter of them in each partition
  const size_t block = kernel.static_shared + dynamic_shared + reserved_shared(d);
  return static_cast<int>(std::min<uint64_t>({static_cast<uint64_t>(blocks_per_multiprocessor(d)),
                                              threads_per_multiprocessor(d) / (warps * kWarp),
                                              warps_by_registers / warps, block ? capacity / block : ~0u}));
}

// Clusters keep to multiprocessors next to each other.
uint64_t clusters_that_fit(const Device& d, int fit, unsigned cluster) {
  const int whole = d.multiprocessors / d.multiprocessors_per_cluster;
  const int rest = d.multiprocessors % d.multiprocessors_per_cluster;
  return uint64_t{1} * whole * (d.multiprocessors_per_cluster * fit / cluster) + rest * fit / cluster;
}

struct Attributes {
  bool cooperative = false, overlapping = false, clustered = false;
  dim3 cluster = {1, 1, 1};
};

cudaError_t read(const cudaLaunchConfig_t& config, Attributes* out) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttributeValue& value = config.attrs[i].val;
    switch (config.attrs[i].id) {
      case cudaLaunchAttributeIgnore: break;
      case cudaLaunchAttributeCooperative: out->cooperative = value.cooperative != 0; break;
      case cudaLaunchAttributeProgrammaticStreamSerialization:
        out->overlapping = value.programmaticStreamSerializationAllowed != 0;
        break;
      case cudaLaunchAttributeClusterDimension:
        out->clustered = true;
        out->cluster = {value.clusterDim.x, value.clusterDim.y, value.clusterDim.z};
        break;
      default: return cudaErrorInvalidValue;
    }
  }
  return cudaSuccess;
}

// A cluster of that shape, of blocks of which a multiprocessor holds `fit`.
cudaError_t check_cluster(const Device& d, const Settings& s, const Attributes& a, int fit) {
  if (d.compute_capability < 90) return cudaErrorNotSupported;
  const uint64_t size = a.cluster.count();
  if (size == 0 || size > (s.large_clusters ? 16 : kPortableCluster)) return cudaErrorInvalidClusterSize;
  if (size > static_cast<uint64_t>(d.largest_cluster)) return cudaErrorInvalidClusterSize;
  return clusters_that_fit(d, fit, static_cast<unsigned>(size)) == 0 ? cudaErrorInvalidClusterSize : cudaSuccess;
}

// Whether the current device accepts the launch; nothing of it has run if not.
cudaError_t check(const cudaLaunchConfig_t& config, const Kernel& kernel, const Settings& s, const Attributes& a,
                  int fit) {
  const Device& d = device(current_device);
  const dim3 grid = config.gridDim, block = config.blockDim;
  if (grid.count() == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (block.count() == 0 || block.count() > kMostThreads || block.z > 64) return cudaErrorInvalidConfiguration;
  if (block.count() > kernel.threads) return cudaErrorLaunchOutOfResources;
  if (config.dynamicSmemBytes > static_cast<size_t>(most_dynamic_shared(kernel, s))) return cudaErrorInvalidValue;
  if (fit == 0) return cudaErrorLaunchOutOfResources;
  if (a.overlapping && d.compute_capability < 90) return cudaErrorNotSupported;
  if (a.clustered) {
    if (const cudaError_t error = check_cluster(d, s, a, fit); error != cudaSuccess) return error;
    if (grid.x % a.cluster.x || grid.y % a.cluster.y || grid.z % a.cluster.z) return cudaErrorInvalidConfiguration;
  }
  if (a.cooperative) {
    if (d.refuses_cooperative) return cudaErrorNotSupported;
    if (grid.count() > static_cast<uint64_t>(fit) * d.multiprocessors) return cudaErrorCooperativeLaunchTooLarge;
  }
  return cudaSuccess;
}

}  // namespace

Device& device(int ordinal) { return devices().at(ordinal); }
void set_device_count(int count) { devices().resize(count); }
void reset_devices() {
  devices().assign(1, {});
  settings.clear();
  current_device = 0;
  last_error = cudaSuccess;
}
const Launched& last_launch() { return latest; }
uint64_t count_launches() { return launches; }
uint64_t count_calls(const char* function) { return calls[function]; }
uint64_t count_calls() {
  uint64_t sum = 0;
  for (const auto& [function, count] : calls) sum += count;
  return sum;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const Bound& bound) {
  call("cudaLaunchKernelEx");
  if (current) fail("nested launch", "launches a kernel from a kernel");
  const Kernel* kernel = find_kernel(bound.kernel);
  if (!kernel) return done(cudaErrorInvalidDeviceFunction);
  Attributes a;
  if (const cudaError_t error = read(config, &a); error != cudaSuccess) return done(error);
  const Device& d = device(current_device);
  const Settings& s = settings[{current_device, bound.kernel}];
  const uint64_t threads = std::max<uint64_t>(1, config.blockDim.count());
  const size_t shared = config.dynamicSmemBytes;
  const int fit = blocks_that_fit(d, *kernel, threads, shared, d.shared_per_multiprocessor);
  if (const cudaError_t error = check(config, *kernel, s, a, fit); error != cudaSuccess) return done(error);
  if (a.cooperative && a.clustered) fail("not supported", "a cooperative launch of clusters is not simulated");
  if (a.cluster.y > 1 || a.cluster.z > 1) fail("not supported", "clusters are simulated in x only");

  const size_t capacity = split(d, s.carveout, kernel->static_shared + shared + reserved_shared(d));
  latest = {bound.kernel,
            config.gridDim.count(),
            a.cluster.x,
            a.cooperative,
            a.overlapping,
            kernel->static_shared + shared,
            blocks_that_fit(d, *kernel, threads, shared, capacity),
            fit};
  ++launches;
  // Any device has room for a block to each multiprocessor. Of many, some are enough.
  constexpr int kMostRoom = 8;
  run({config.gridDim, config.blockDim, a.cooperative ? config.gridDim.count() : a.cluster.x,
       static_cast<uint64_t>(std::min(d.multiprocessors, kMostRoom)), shared, a.overlapping, d.code_capability, bound});
  return cudaSuccess;
}

}  // namespace simt

using namespace simt;

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDeviceFunction: return "cudaErrorInvalidDeviceFunction";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorLaunchOutOfResources: return "cudaErrorLaunchOutOfResources";
    case cudaErrorCooperativeLaunchTooLarge: return "cudaErrorCooperativeLaunchTooLarge";
    case cudaErrorNotPermitted: return "cudaErrorNotPermitted";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
    case cudaErrorInvalidClusterSize: return "cudaErrorInvalidClusterSize";
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDeviceFunction: return "invalid device function";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorLaunchOutOfResources: return "too many resources requested for launch";
    case cudaErrorCooperativeLaunchTooLarge: return "too many blocks in cooperative launch";
    case cudaErrorNotPermitted: return "operation not permitted";
    case cudaErrorNotSupported: return "operation not supported";
    case cudaErrorInvalidClusterSize: return "cluster misconfiguration";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() {
  call("cudaGetLastError");
  return std::exchange(last_error, cudaSuccess);
}

cudaError_t cudaPeekAtLastError() {
  call("cudaPeekAtLastError");
  return last_error;
}

cudaError_t cudaGetDevice(int* device) {
  call("cudaGetDevice");
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  call("cudaSetDevice");
  if (device < 0 || device >= static_cast<int>(devices().size())) return done(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int ordinal) {
  call("cudaDeviceGetAttribute");
  if (ordinal < 0 || ordinal >= static_cast<int>(devices().size())) return done(cudaErrorInvalidDevice);
  const Device& d = device(ordinal);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = kMostThreads; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = kSharedWithoutOptIn; return cudaSuccess;
    case cudaDevAttrMultiProcessorCount: *value = d.multiprocessors; return cudaSuccess;
    case cudaDevAttrMemoryClockRate: *value = d.memory_khz; return cudaSuccess;
    case cudaDevAttrGlobalMemoryBusWidth: *value = d.memory_bits; return cudaSuccess;
    case cudaDevAttrL2CacheSize: *value = d.l2_bytes; return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = threads_per_multiprocessor(d); return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = d.compute_capability / 10; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = d.compute_capability % 10; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = d.shared_per_multiprocessor; return cudaSuccess;
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = kRegisters; return cudaSuccess;
    case cudaDevAttrCooperativeLaunch: *value = 1; return cudaSuccess;  // also where a launch is then refused
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = d.shared_per_block; return cudaSuccess;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = reserved_shared(d); return cudaSuccess;
    case cudaDevAttrClusterLaunch: *value = d.compute_capability >= 90; return cudaSuccess;
  }
  return done(cudaErrorInvalidValue);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void* function) {
  call("cudaFuncGetAttributes");
  const Kernel* kernel = find_kernel(function);
  if (!kernel) return done(cudaErrorInvalidDeviceFunction);
  const Device& d = device(current_device);
  const Settings& s = settings[{current_device, function}];
  *out = {kernel->static_shared, static_cast<int>(kernel->threads), registers(*kernel), d.code_capability,
          d.compute_capability,  most_dynamic_shared(*kernel, s),   s.carveout};
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  call("cudaFuncSetAttribute");
  const Kernel* kernel = find_kernel(function);
  if (!kernel) return done(cudaErrorInvalidDeviceFunction);
  const Device& d = device(current_device);
  Settings& s = settings[{current_device, function}];
  switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize:
      if (value < 0 || static_cast<int>(kernel->static_shared) + value > d.shared_per_block) break;
      s.dynamic_shared = value;
      return cudaSuccess;
    case cudaFuncAttributePreferredSharedMemoryCarveout:
      if (value < cudaSharedmemCarveoutDefault || value > cudaSharedmemCarveoutMaxShared) break;
      s.carveout = value;
      return cudaSuccess;
    case cudaFuncAttributeNonPortableClusterSizeAllowed:
      if (d.compute_capability < 90) return done(cudaErrorNotSupported);
      s.large_clusters = value != 0;
      return cudaSuccess;
  }
  return done(cudaErrorInvalidValue);
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads,
                                                          size_t dynamic_shared) {
  call("cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  const Kernel* kernel = find_kernel(function);
  if (!kernel) return done(cudaErrorInvalidDeviceFunction);
  if (threads <= 0) return done(cudaErrorInvalidValue);
  const Device& d = device(current_device);
  const bool can_run = threads <= static_cast<int>(kernel->threads);
  *blocks = can_run ? blocks_that_fit(d, *kernel, threads, dynamic_shared, d.shared_per_multiprocessor) : 0;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* function, const cudaLaunchConfig_t* config) {
  call("cudaOccupancyMaxActiveClusters");
  const Kernel* kernel = find_kernel(function);
  if (!kernel) return done(cudaErrorInvalidDeviceFunction);
  Attributes a;
  if (const cudaError_t error = read(*config, &a); error != cudaSuccess) return done(error);
  const Device& d = device(current_device);
  const Settings& s = settings[{current_device, function}];
  const int fit = blocks_that_fit(d, *kernel, std::max<uint64_t>(1, config->blockDim.count()), config->dynamicSmemBytes,
                                  d.shared_per_multiprocessor);
  if (const cudaError_t error = check_cluster(d, s, a, fit);
      error != cudaSuccess && error != cudaErrorInvalidClusterSize) {
    return done(error);
  }
  const bool allowed = a.cluster.count() <= (s.large_clusters ? 16 : kPortableCluster) &&
                       a.cluster.count() <= static_cast<uint64_t>(d.largest_cluster);
  if (!allowed) return done(cudaErrorInvalidClusterSize);
  *clusters = static_cast<int>(clusters_that_fit(d, fit, static_cast<unsigned>(a.cluster.count())));
  return cudaSuccess;
}
