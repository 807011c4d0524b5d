// What a driver refuses to launch, and what it allows: every limit is met from both sides.
//
//     limits [NAME...]
//
// prints "NAME: ok", or what was wrong, for those named or all; exit status 1 if anything was. A refused launch returns
// the error that is expected, leaves it to be read once, and runs nothing.
#include <cuda_runtime.h>

#include <cstdio>
#include <functional>
#include <map>
#include <string>

#include "launches.h"
#include "simt.h"

namespace {

constexpr int kKB = 1024;

__global__ void plain_kernel(int* runs) {
  if (threadIdx.x == 0) atomicAdd(runs, 1);
}

template <int BYTES>
__global__ void static_kernel(int* runs) {
  __shared__ char s[BYTES];
  s[threadIdx.x] = 1;
  if (threadIdx.x == 0) atomicAdd(runs, static_cast<int>(s[0]));
}

__device__ __attribute__((noinline)) char* shared_of_a_function() {
  __shared__ char s[3000];
  return s;
}

// 1 + 2000 + 3000 bytes: its own, and those of a function that it calls, behind a lambda.
__global__ void scattered_kernel(int* runs) {
  __shared__ volatile bool first;  // else a compiler would find that nobody reads it
  __shared__ volatile char s[2000];
  auto fill = [&](int t) __attribute__((noinline)) { s[t] = shared_of_a_function()[t] = 1; };
  fill(threadIdx.x);
  first = true;
  if (threadIdx.x == 0) atomicAdd(runs, static_cast<int>(first));
}

template <int BLOCKS>
__global__ void __launch_bounds__(256, BLOCKS) bounded_kernel(int* runs) {
  if (threadIdx.x == 0) atomicAdd(runs, 1);
}

using Kernel = void (*)(int*);

struct Failure { std::string what; };

void expect(bool good, const std::string& what) {
  if (!good) throw Failure{what};
}

struct Attempt {
  dim3 grid = 1, block = 32;
  size_t dynamic_shared = 0;
  std::vector<cudaLaunchAttribute> attributes = {};
};

void refused(Kernel kernel, const Attempt& a, cudaError_t expected) {
  const uint64_t launches = simt::count_launches();
  cudaGetLastError();
  const cudaError_t error = launch_with(a.attributes, kernel, a.grid, a.block, a.dynamic_shared, nullptr);
  expect(error == expected, std::string("expected ") + cudaGetErrorName(expected) + ", got " + cudaGetErrorName(error));
  expect(simt::count_launches() == launches, "a refused launch ran");
  expect(cudaPeekAtLastError() == expected && cudaGetLastError() == expected, "the error is not the last one");
  expect(cudaGetLastError() == cudaSuccess, "the error was read twice");
}

void accepted(Kernel kernel, const Attempt& a) {
  auto* runs = static_cast<int*>(simt::allocate(sizeof(int), "runs"));
  *runs = 0;
  simt::written(runs, sizeof(int));
  const cudaError_t error = launch_with(a.attributes, kernel, a.grid, a.block, a.dynamic_shared, runs);
  const int ran = *runs;
  simt::release(runs);
  expect(error == cudaSuccess, std::string("refused: ") + cudaGetErrorName(error));
  expect(ran == static_cast<int>(a.grid.count()), "not every block ran");
}

void set(Kernel kernel, cudaFuncAttribute attribute, int value, cudaError_t expected = cudaSuccess) {
  const cudaError_t error = cudaFuncSetAttribute(address(kernel), attribute, value);
  expect(error == expected, std::string("cudaFuncSetAttribute: ") + cudaGetErrorName(error));
  cudaGetLastError();
}

cudaFuncAttributes attributes_of(Kernel kernel) {
  cudaFuncAttributes out = {};
  expect(cudaFuncGetAttributes(&out, address(kernel)) == cudaSuccess, "cudaFuncGetAttributes failed");
  return out;
}

int occupancy(Kernel kernel, int threads, size_t dynamic_shared) {
  int blocks = -1;
  expect(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, address(kernel), threads, dynamic_shared) == cudaSuccess,
      "cudaOccupancyMaxActiveBlocksPerMultiprocessor failed");
  return blocks;
}

// ---- The limits ----------------------------------------------------------------------------------

void empty_grid() { refused(plain_kernel, {dim3(0)}, cudaErrorInvalidConfiguration); }

void grid_too_large() {
  refused(plain_kernel, {dim3(1, 65536)}, cudaErrorInvalidConfiguration);
  refused(plain_kernel, {dim3(1, 1, 65536)}, cudaErrorInvalidConfiguration);
}

void threads_of_a_block() {
  refused(plain_kernel, {1, 0}, cudaErrorInvalidConfiguration);
  refused(plain_kernel, {1, 1025}, cudaErrorInvalidConfiguration);
  refused(plain_kernel, {1, dim3(1, 1, 65)}, cudaErrorInvalidConfiguration);
  accepted(plain_kernel, {1, 1024});
}

void launch_bounds() {
  refused(bounded_kernel<1>, {1, 257}, cudaErrorLaunchOutOfResources);
  accepted(bounded_kernel<1>, {1, 256});
}

void static_shared_is_known() {
  expect(attributes_of(static_kernel<100>).sharedSizeBytes == 112, "100 bytes");
  expect(attributes_of(static_kernel<40 * kKB>).sharedSizeBytes == 40 * kKB, "40 KB");
  expect(attributes_of(plain_kernel).sharedSizeBytes == 0, "none");
  const size_t scattered = attributes_of(scattered_kernel).sharedSizeBytes;
  expect(scattered == 16 + 2000 + 3008, "of a function that it calls: " + std::to_string(scattered));
}

void launch_bounds_are_known() {
  expect(attributes_of(bounded_kernel<1>).numRegs == 255 && attributes_of(bounded_kernel<2>).numRegs == 128 &&
             attributes_of(bounded_kernel<3>).numRegs == 80 && attributes_of(plain_kernel).numRegs == 64,
         "registers");
  expect(attributes_of(bounded_kernel<3>).maxThreadsPerBlock == 256 &&
             attributes_of(plain_kernel).maxThreadsPerBlock == 1024,
         "threads");
}

// Static shared memory counts.
void shared_without_opt_in() {
  refused(plain_kernel, {1, 32, 48 * kKB + 1}, cudaErrorInvalidValue);
  accepted(plain_kernel, {1, 32, 48 * kKB});
  refused(static_kernel<30 * kKB>, {1, 32, 18 * kKB + 1}, cudaErrorInvalidValue);
  accepted(static_kernel<30 * kKB>, {1, 32, 18 * kKB});
  set(static_kernel<30 * kKB>, cudaFuncAttributeMaxDynamicSharedMemorySize, 20 * kKB);
  accepted(static_kernel<30 * kKB>, {1, 32, 20 * kKB});
  refused(static_kernel<30 * kKB>, {1, 32, 20 * kKB + 1}, cudaErrorInvalidValue);
}

void shared_with_opt_in() {
  constexpr auto kernel = static_kernel<20 * kKB>;
  const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  set(kernel, attribute, 207 * kKB + 1, cudaErrorInvalidValue);
  set(kernel, attribute, -1, cudaErrorInvalidValue);
  refused(kernel, {1, 32, 207 * kKB}, cudaErrorInvalidValue);
  set(kernel, attribute, 207 * kKB);
  accepted(kernel, {1, 32, 207 * kKB});
}

// What a kernel was given on one device, it has not on another.
void opt_in_is_of_a_device() {
  simt::set_device_count(2);
  set(plain_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 100 * kKB);
  accepted(plain_kernel, {1, 32, 100 * kKB});
  expect(cudaSetDevice(1) == cudaSuccess, "there are two");
  refused(plain_kernel, {1, 32, 100 * kKB}, cudaErrorInvalidValue);
  expect(cudaSetDevice(2) == cudaErrorInvalidDevice, "there are only two");
}

void cluster_size() {
  refused(plain_kernel, {32, 32, 0, {clusters_of(16)}}, cudaErrorInvalidClusterSize);
  refused(plain_kernel, {32, 32, 0, {clusters_of(0)}}, cudaErrorInvalidClusterSize);
  accepted(plain_kernel, {32, 32, 0, {clusters_of(8)}});
  set(plain_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  accepted(plain_kernel, {32, 32, 0, {clusters_of(16)}});
  refused(plain_kernel, {64, 32, 0, {clusters_of(32)}}, cudaErrorInvalidClusterSize);
}

// A cluster's blocks must have room next to each other.
void cluster_room() {
  simt::device().multiprocessors = 4;
  set(plain_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 200 * kKB);
  refused(plain_kernel, {8, 32, 200 * kKB, {clusters_of(8)}}, cudaErrorInvalidClusterSize);
  accepted(plain_kernel, {8, 32, 200 * kKB, {clusters_of(4)}});
  // 18 and 2 of 20 that are next to each other.
  simt::device().multiprocessors = 20;
  simt::device().multiprocessors_per_cluster = 18;
  for (const auto& [size, expected] : std::map<unsigned, int>{{8, 2}, {4, 4}, {2, 10}}) {
    int clusters = 0;
    auto attribute = clusters_of(size);
    cudaLaunchConfig_t config = {};
    config.gridDim = size;
    config.blockDim = 32;
    config.dynamicSmemBytes = 200 * kKB;
    config.attrs = &attribute;
    config.numAttrs = 1;
    expect(cudaOccupancyMaxActiveClusters(&clusters, address(Kernel(plain_kernel)), &config) == cudaSuccess &&
               clusters == expected,
           std::to_string(clusters) + " clusters of " + std::to_string(size));
  }
}

void cluster_divides_the_grid() {
  refused(plain_kernel, {7, 32, 0, {clusters_of(2)}}, cudaErrorInvalidConfiguration);
  accepted(plain_kernel, {8, 32, 0, {clusters_of(2)}});
}

void clusters_before_9_0() {
  simt::device().compute_capability = simt::device().code_capability = 80;
  refused(plain_kernel, {8, 32, 0, {clusters_of(2)}}, cudaErrorNotSupported);
  set(plain_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1, cudaErrorNotSupported);
  accepted(plain_kernel, {8});
}

void overlap_before_9_0() {
  simt::device().compute_capability = simt::device().code_capability = 86;
  refused(plain_kernel, {8, 32, 0, {overlapping()}}, cudaErrorNotSupported);
  accepted(plain_kernel, {8});
}

// All blocks of a cooperative grid have to be there together.
void cooperative_threads() {
  refused(plain_kernel, {4, 1024, 0, {cooperative()}}, cudaErrorCooperativeLaunchTooLarge);
  accepted(plain_kernel, {4, 512, 0, {cooperative()}});
}

void cooperative_registers() {
  refused(bounded_kernel<1>, {3, 256, 0, {cooperative()}}, cudaErrorCooperativeLaunchTooLarge);
  refused(bounded_kernel<2>, {5, 256, 0, {cooperative()}}, cudaErrorCooperativeLaunchTooLarge);
  accepted(bounded_kernel<1>, {2, 256, 0, {cooperative()}});
  accepted(bounded_kernel<2>, {4, 256, 0, {cooperative()}});
  accepted(bounded_kernel<3>, {6, 256, 0, {cooperative()}});
}

// Dynamic, static, and what the system reserves.
void cooperative_shared() {
  constexpr auto kernel = static_kernel<16 * kKB>;
  set(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 97 * kKB + 1);
  accepted(kernel, {4, 32, 97 * kKB, {cooperative()}});
  refused(kernel, {4, 32, 97 * kKB + 1, {cooperative()}}, cudaErrorCooperativeLaunchTooLarge);
}

void occupancy_of_blocks() {
  expect(occupancy(bounded_kernel<3>, 256, 0) == 3 && occupancy(bounded_kernel<3>, 128, 0) == 6, "registers");
  expect(occupancy(plain_kernel, 1024, 0) == 1 && occupancy(plain_kernel, 32, 0) == 32, "threads");
  expect(occupancy(static_kernel<16 * kKB>, 32, 59 * kKB) == 3, "shared memory");
  expect(occupancy(bounded_kernel<3>, 512, 0) == 0, "launch bounds");
}

// How the memory of a multiprocessor is split is a wish, and does not stop a launch.
void carveout() {
  constexpr auto kernel = static_kernel<20 * kKB>;
  accepted(kernel, {1, 32});
  expect(simt::last_launch().fit_as_split == 1 && simt::last_launch().fit == 10, "the least that holds a block");
  set(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 50);  // 114 KB, hence 132
  accepted(kernel, {1, 32});
  expect(simt::last_launch().fit_as_split == 6, "half of it");
  set(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxL1);
  accepted(kernel, {20, 32, 0, {cooperative()}});
  set(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 101, cudaErrorInvalidValue);
}

// Drivers refuse what the device could do.
void refuses_cooperative() {
  simt::device().refuses_cooperative = true;
  refused(plain_kernel, {1, 32, 0, {cooperative()}}, cudaErrorNotSupported);
  accepted(plain_kernel, {1});
}

void refuses_clusters() {
  simt::device().largest_cluster = 1;
  refused(plain_kernel, {2, 32, 0, {clusters_of(2)}}, cudaErrorInvalidClusterSize);
  accepted(plain_kernel, {2});
}

void no_kernel() {
  int x = 0;
  cudaFuncAttributes attributes;
  expect(cudaFuncGetAttributes(&attributes, &x) == cudaErrorInvalidDeviceFunction, "data");
}

#define LIMIT(name) {#name, name}
const std::map<std::string, std::function<void()>> limits = {
    LIMIT(empty_grid),
    LIMIT(grid_too_large),
    LIMIT(threads_of_a_block),
    LIMIT(launch_bounds),
    LIMIT(static_shared_is_known),
    LIMIT(launch_bounds_are_known),
    LIMIT(shared_without_opt_in),
    LIMIT(shared_with_opt_in),
    LIMIT(opt_in_is_of_a_device),
    LIMIT(cluster_size),
    LIMIT(cluster_room),
    LIMIT(cluster_divides_the_grid),
    LIMIT(clusters_before_9_0),
    LIMIT(overlap_before_9_0),
    LIMIT(cooperative_threads),
    LIMIT(cooperative_registers),
    LIMIT(cooperative_shared),
    LIMIT(occupancy_of_blocks),
    LIMIT(carveout),
    LIMIT(refuses_cooperative),
    LIMIT(refuses_clusters),
    LIMIT(no_kernel),
};

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> names(argv + 1, argv + argc);
  if (names.empty()) {
    for (const auto& [name, limit] : limits) names.push_back(name);
  }
  bool all_good = true;
  for (const std::string& name : names) {
    simt::reset_devices();
    try {
      simt::device().multiprocessors = 2;
      limits.at(name)();
      printf("%s: ok\n", name.c_str());
    } catch (const Failure& failure) {
      printf("%s: %s\n", name.c_str(), failure.what.c_str());
      all_good = false;
    }
  }
  return all_good ? 0 : 1;
}
