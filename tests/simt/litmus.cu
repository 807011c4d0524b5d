// Small kernels and launches, each with one mistake that a template argument plants: what the device has to catch.
//
//     litmus right|wrong [NAME...]
//
// runs those named, or all, and checks the results: a line "NAME: ok" or "NAME: wrong result" each, and exit
// status 1 if any was wrong. The device's own reports end the process. tests/test_simt_device.py says
// which report each mistake gets.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "launches.h"
#include "simt.h"

namespace {

constexpr int kThreads = 64;
constexpr unsigned kFull = 0xffffffff;

// An array in "global memory".
template <class T>
struct Array {
  T* p;
  int n;

  Array(int n, const char* name) : p(static_cast<T*>(simt::allocate(n * sizeof(T), name))), n(n) {}
  ~Array() { simt::release(p); }

  template <class F>
  Array& fill(F f) {
    for (int i = 0; i < n; ++i) p[i] = f(i);
    simt::written(p, n * sizeof(T));
    return *this;
  }
};

__forceinline__ void cluster_sync(SIMT_CALLER) { simt::sync_cluster({"cluster_sync", file, line}); }

template <class T>
T* map_shared(T* p, unsigned rank) {
  return static_cast<T*>(simt::map_shared(p, rank));
}

bool started(cudaError_t error) {
  if (error != cudaSuccess) fprintf(stderr, "launch failed: %s\n", cudaGetErrorString(error));
  return error == cudaSuccess;
}

// ---- Shared memory and barriers ------------------------------------------------------------------

template <bool WRONG>
__global__ void missing_barrier_kernel(const float* x, float* y) {
  __shared__ float s[kThreads];
  const int t = threadIdx.x;
  s[t] = x[t];
  if (!WRONG) __syncthreads();
  y[t] = s[kThreads - 1 - t];
}

// The values stay right unless a thread runs a whole round ahead of another.
template <bool WRONG>
__global__ void reused_shared_kernel(const float* x, float* y) {
  __shared__ float s[kThreads];
  const int t = threadIdx.x;
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    s[t] = x[t];
    __syncthreads();
    sum += 0.5f * s[kThreads - 1 - t];
    if (!WRONG) __syncthreads();
  }
  y[t] = sum;
}

template <bool WRONG>
__global__ void uninitialised_kernel(const float* x, float* y) {
  __shared__ float s[kThreads];
  const int t = threadIdx.x;
  if (!WRONG || t != 5) s[t] = x[t];
  __syncthreads();
  y[t] = s[kThreads - 1 - t];
}

// What the block before left in shared memory is not this block's.
template <bool WRONG>
__global__ void left_over_kernel(const float* x, float* y) {
  __shared__ float s[kThreads];
  const int t = threadIdx.x;
  if (!WRONG || blockIdx.x == 0) s[t] = x[t];
  __syncthreads();
  const float v = s[kThreads - 1 - t];
  if (blockIdx.x == 1) y[t] = v;
}

template <bool WRONG>
__global__ void divergent_barrier_kernel(const float* x, float* y) {
  const int t = threadIdx.x;
  y[t] = 0;
  if (WRONG && t < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[t] = x[kThreads - 1 - t];
}

template <bool WRONG>
__global__ void barrier_against_shuffle_kernel(const float* x, float* y) {
  const int t = threadIdx.x;
  if (WRONG && t % 32 == 7) __syncthreads();
  float v = __shfl_xor_sync(kFull, x[t], 31);
  if (!WRONG || t % 32 != 7) __syncthreads();
  y[t ^ 32] = v;
}

template <bool WRONG>
__global__ void exited_thread_kernel(const float* x, float* y) {
  __shared__ float s[kThreads];
  const int t = threadIdx.x;
  if (WRONG && t == kThreads - 1) return;
  s[t] = x[t];
  __syncthreads();
  y[t] = s[kThreads - 1 - t];
}

template <bool WRONG>
__global__ void shared_bound_kernel(const float* x, float* y) {
  float* s = static_cast<float*>(simt::dynamic_shared());
  const int t = threadIdx.x;
  s[t] = x[t];
  __syncthreads();
  y[t] = s[kThreads - (WRONG ? 0 : 1) - t];
}

template <bool WRONG>
__global__ void array_bound_kernel(const float* x, float* y) {
  __shared__ float s[2][kThreads];
  const int t = threadIdx.x;
  s[0][t] = x[t];
  s[1][t] = 0;
  __syncthreads();
  y[t] = s[0][kThreads - (WRONG ? 0 : 1) - t];
}

// ---- Global memory -------------------------------------------------------------------------------

template <bool WRONG>
__global__ void read_bound_kernel(const float* x, float* y) {
  const int t = threadIdx.x;
  y[t] = x[WRONG ? kThreads - t : kThreads - 1 - t];
}

template <bool WRONG>
__global__ void write_bound_kernel(const float* x, float* y) {
  const int t = threadIdx.x;
  if (t > 0) y[t] = x[kThreads - 1 - t];
  if (t == 0) {
    for (int i = 0; WRONG ? i <= kThreads : i < 1; i += kThreads) y[i] = x[kThreads - 1];
  }
}

template <bool WRONG>
__global__ void misaligned_kernel(const float* x, float* y) {
  const int t = threadIdx.x;
  if (t >= kThreads / 4) return;
  const uint4 v = *reinterpret_cast<const uint4*>(x + 4 * t + (WRONG && t < kThreads / 4 - 1 ? 1 : 0));
  const unsigned words[] = {v.x, v.y, v.z, v.w};
  for (int i = 0; i < 4; ++i) memcpy(&y[kThreads - 1 - 4 * t - i], &words[i], 4);
}

// Two blocks write the same element.
template <bool WRONG>
__global__ void blocks_collide_kernel(const float* x, float* y) {
  const int i = blockIdx.x * kThreads / 2 + threadIdx.x;
  if (i < kThreads && (WRONG || threadIdx.x < kThreads / 2)) y[i] = x[kThreads - 1 - i];
}

// ---- Warps ---------------------------------------------------------------------------------------

enum class Mask { right, half_arrive, without_self, disagree, too_narrow, exited };

template <Mask MASK>
__global__ void shuffle_kernel(const float* x, float* y) {
  const int t = threadIdx.x, lane = t % 32;
  float v = x[t];
  if (MASK == Mask::right) v = __shfl_xor_sync(kFull, v, 31);
  if (MASK == Mask::half_arrive && lane < 16) v = __shfl_xor_sync(kFull, v, 15);
  if (MASK == Mask::without_self) v = __shfl_xor_sync(lane < 16 ? 0xffffu : 0xffu, v, 15, 16);
  if (MASK == Mask::disagree) v = __shfl_xor_sync(lane == 0 ? 0x7fffffffu : kFull, v, 1);
  if (MASK == Mask::too_narrow) v = __shfl_xor_sync(lane < 16 ? 0xffffu : 0xffff0000u, v, 31);
  if (MASK == Mask::exited) {
    if (lane == 31) return;
    v = __shfl_xor_sync(kFull, v, 31);
  }
  y[t ^ 32] = v;
}

template <bool WRONG>
__global__ void warp_exchange_kernel(const float* x, float* y) {
  __shared__ float s[kThreads];
  const int t = threadIdx.x;
  s[t] = x[t];
  // A shuffle brings the lanes together, and orders no memory.
  if (WRONG) __shfl_xor_sync(kFull, t, 1);
  else __syncwarp();
  y[t ^ 32] = s[t ^ 31];
}

// Two groups of lanes, each with its own mask, then all together.
__global__ void groups_kernel(const float* x, float* y) {
  const int t = threadIdx.x, lane = t % 32;
  float v = x[t];
  const unsigned group = lane < 8 ? 0x000000ffu : 0xffffff00u;
  if (lane < 8) {
    for (int i = 0; i < 3; ++i) v = __shfl_xor_sync(group, v, 7, 8);
    v = __shfl_xor_sync(group, v, 7, 8);
  } else {
    __syncwarp(group);
  }
  y[t ^ 32] = __shfl_xor_sync(kFull, v, 31);
}

// ---- Between blocks ------------------------------------------------------------------------------

enum class Fences { both, no_release, block_release, no_acquire, late_acquire };

// Every thread of every block writes; the last block to arrive reads it all, in reverse.
template <Fences FENCES>
__global__ void last_block_kernel(const float* x, float* partial, unsigned* counter, float* y) {
  __shared__ bool last;
  const int t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  partial[i] = x[i];
  __syncthreads();
  if (t == 0) {
    if (FENCES == Fences::block_release) __threadfence_block();
    else if (FENCES != Fences::no_release) __threadfence();
    last = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;
    if (FENCES != Fences::no_acquire && FENCES != Fences::late_acquire) __threadfence();
  }
  __syncthreads();
  if (!last) return;
  if (FENCES == Fences::late_acquire) __threadfence();
  for (int k = t; k < kThreads; k += blockDim.x) y[k] = partial[kThreads - 1 - k];
}

// A counting barrier that resets itself by its generation. Only under cooperative launch.
template <Fences FENCES>
__device__ void sync_grid(unsigned* arrived, volatile unsigned* generation) {
  __syncthreads();
  if (threadIdx.x == 0) {
    if (FENCES != Fences::no_release) __threadfence();
    const unsigned mine = *generation;
    if (atomicAdd(arrived, 1u) == gridDim.x - 1) {
      *arrived = 0;
      __threadfence();
      *generation = mine + 1;
    } else {
      while (*generation == mine) __nanosleep(100);
    }
    if (FENCES != Fences::no_acquire) __threadfence();
  }
  __syncthreads();
}

// A few rounds, so that the barrier itself is reused.
template <Fences FENCES>
__global__ void grid_barrier_kernel(const float* x, float* partial, unsigned* counter, float* y) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  for (int round = 0; round < 3; ++round) {
    partial[i] = x[i] + round;
    sync_grid<FENCES>(counter, counter + 1);
    y[i] = partial[kThreads - 1 - i] - round;
    sync_grid<FENCES>(counter, counter + 1);
  }
}

template <bool WRONG>
__global__ void spin_kernel(const float* x, float* y, unsigned* flag) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  volatile unsigned* watched = flag;
  if (threadIdx.x == 0) {
    if (blockIdx.x == 0 && !WRONG) *watched = 1;
    while (*watched == 0) __nanosleep(100);
  }
  __syncthreads();
  y[i] = x[kThreads - 1 - i];
}

enum class Cluster { right, no_barrier, leaves_early };

// Blocks of a cluster read each other's shared memory, static and dynamic.
template <Cluster CLUSTER>
__global__ void cluster_kernel(const float* x, float* y) {
  __shared__ float s[kThreads];
  float* d = static_cast<float*>(simt::dynamic_shared());
  const int threads = blockDim.x, t = threadIdx.x, i = blockIdx.x * threads + t;
  s[t] = 0.25f * x[i];
  d[t] = 0.75f * x[i];
  if (CLUSTER != Cluster::no_barrier) cluster_sync();
  const unsigned other = gridDim.x - 1 - simt::cluster_rank();
  y[i] = map_shared(s, other)[threads - 1 - t] + map_shared(d, other)[threads - 1 - t];
  if (CLUSTER != Cluster::leaves_early) cluster_sync();
}

// What it reads, the kernel before may still have to write.
template <bool WRONG>
__global__ void early_access_kernel(const float* x, float* y) {
  const float early = WRONG ? x[kThreads - 1 - threadIdx.x] : 0;
  simt::wait_on_dependent_grids();
  y[threadIdx.x] = WRONG ? early : x[kThreads - 1 - threadIdx.x];
}

// Clusters and overlapping launches that the device has, and that the code was not compiled for.
enum class OldCode { no, syncs, maps, waits, copies };

template <OldCode WHAT>
__global__ void old_code_kernel(const float* x, float* y) {
  if (WHAT == OldCode::syncs) cluster_sync();
  if (WHAT == OldCode::maps) x = map_shared(x, 0);
  if (WHAT == OldCode::waits) simt::wait_on_dependent_grids();
  __shared__ float s[kThreads];
  if (WHAT == OldCode::copies) simt::copy_async(&s[threadIdx.x], x, sizeof(float));
  y[threadIdx.x] = x[kThreads - 1 - threadIdx.x];
}

// ---- Asynchronous copies -------------------------------------------------------------------------

enum class Copies { right, no_wait, short_wait, no_barrier, reused, twice, left };

// Copies x into `s`, each thread an element, and others behind it.
template <Copies WHAT>
__global__ void copies_kernel(const float* x, float* y) {
  __shared__ float s[kThreads], behind[kThreads];
  const int t = threadIdx.x;
  auto copy = [&](float* to, int from) {
    simt::copy_async(to, &x[from], sizeof(float));
    simt::commit_copies();
  };
  copy(&s[t], t);
  copy(WHAT == Copies::twice ? &s[t] : &behind[t], 0);
  if (WHAT == Copies::short_wait) simt::wait_for_copies(2);
  else if (WHAT != Copies::no_wait) simt::wait_for_copies(1);
  if (WHAT == Copies::no_wait || WHAT == Copies::short_wait) {  // the thread's own
    y[kThreads - 1 - t] = s[t];
  } else {
    if (WHAT == Copies::reused && t == 5) copy(&s[t], 0);
    if (WHAT != Copies::no_barrier) __syncthreads();
    y[t] = s[kThreads - 1 - t];
  }
  if (WHAT != Copies::left) simt::wait_for_copies(0);
}

// ---- The intrinsics, one by one ------------------------------------------------------------------

__global__ void intrinsics_kernel(int* failures, unsigned* counter, unsigned long long* wide) {
  const int t = threadIdx.y * blockDim.x + threadIdx.x, lane = t % 32;
  auto expect = [&](bool good, int which) {
    if (!good) atomicOr(reinterpret_cast<unsigned*>(failures), 1u << which);
  };
  expect(__shfl_sync(kFull, lane, 5, 8) == (lane & 24) + 5, 0);
  expect(__shfl_up_sync(kFull, lane, 3, 16) == (lane % 16 < 3 ? lane : lane - 3), 1);
  expect(__shfl_down_sync(kFull, double(lane), 3, 8) == (lane % 8 > 4 ? lane : lane + 3), 2);
  expect(__shfl_xor_sync(kFull, static_cast<long long>(lane) << 40, 9) == static_cast<long long>(lane ^ 9) << 40, 3);
  expect(__ballot_sync(kFull, lane % 3 == 0) == 0x49249249u, 4);
  expect(__any_sync(kFull, lane == 31) && !__any_sync(kFull, lane == 32), 5);
  expect(__all_sync(kFull, lane < 32) && !__all_sync(kFull, lane < 31), 6);
  expect(__syncthreads_count(t % 2) == kThreads / 2, 7);
  expect(__syncthreads_or(t == 63) && !__syncthreads_or(t == 64), 8);
  expect(__syncthreads_and(t < 64) && !__syncthreads_and(t < 63), 9);
  expect(__popc(0xf0f0u) == 8 && __ffs(8) == 4 && __clz(1) == 31 && __clz(0) == 32, 10);
  expect(__umulhi(0x80000000u, 6u) == 3, 11);
  expect(min(2, 1) == 1 && max(1.0f, NAN) == 1.0f && rsqrtf(4.0f) == 0.5f, 12);
  atomicInc(counter, kThreads * gridDim.x - 1);
  atomicAdd(wide, 1ull << 33);
  const uint4 v = make_uint4(1, 2, 3, 4);
  expect(alignof(uint4) == 16 && __ldcs(&v).w == 4, 13);
}

// Each thread of a strided grid: a million elements and a block reduction.
__global__ void million_kernel(const float* x, float* y, float* sums, int n) {
  __shared__ float warps[32];
  float sum = 0;
  for (int i = 4 * (blockIdx.x * blockDim.x + threadIdx.x); i < n; i += 4 * gridDim.x * blockDim.x) {
    const float4 v = *reinterpret_cast<const float4*>(x + i);
    *reinterpret_cast<float4*>(y + i) = make_float4(2 * v.x, 2 * v.y, 2 * v.z, 2 * v.w);
    sum += (v.x + v.y) + (v.z + v.w);
  }
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(kFull, sum, d);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned w = 1; w < blockDim.x / 32; ++w) sum += warps[w];
    sums[blockIdx.x] = sum;
  }
}

// ---- Hosts ---------------------------------------------------------------------------------------

// Most kernels reverse x into y.
bool reverses(void (*kernel)(const float*, float*), int blocks = 1, int threads = kThreads) {
  Array<float> x(kThreads, "x"), y(kThreads, "y");
  x.fill([](int i) { return 1.0f + i; });
  if (!started(launch(kernel, dim3(blocks), dim3(threads), kThreads * sizeof(float), x.p, y.p))) return false;
  bool good = simt::count_unwritten(y.p, kThreads * sizeof(float)) == 0;
  for (int i = 0; i < kThreads; ++i) good = good && y.p[i] == kThreads - i;
  return good;
}

template <class Kernel>
bool reverses_through(Kernel kernel, bool is_cooperative) {
  Array<float> x(kThreads, "x"), partial(kThreads, "partial"), y(kThreads, "y");
  Array<unsigned> counter(2, "counter");
  x.fill([](int i) { return 1.0f + i; });
  counter.fill([](int) { return 0u; });
  const dim3 grid(8), block(kThreads / 8);
  if (!started(is_cooperative ? launch_with({cooperative()}, kernel, grid, block, 0, x.p, partial.p, counter.p, y.p)
                              : launch(kernel, grid, block, 0, x.p, partial.p, counter.p, y.p))) {
    return false;
  }
  bool good = counter.p[0] == 0;
  for (int i = 0; i < kThreads; ++i) good = good && y.p[i] == kThreads - i;
  return good;
}

template <bool WRONG>
bool spin() {
  Array<float> x(kThreads, "x"), y(kThreads, "y");
  Array<unsigned> flag(1, "flag");
  x.fill([](int i) { return 1.0f + i; });
  flag.fill([](int) { return 0u; });
  return started(launch_with({cooperative()}, spin_kernel<WRONG>, dim3(2), dim3(kThreads / 2), 0, x.p, y.p, flag.p)) &&
         y.p[0] == kThreads;
}

template <Cluster CLUSTER>
bool cluster() {
  Array<float> x(kThreads, "x"), y(kThreads, "y");
  x.fill([](int i) { return 1.0f + i; });
  if (!started(
          launch_with({clusters_of(4)}, cluster_kernel<CLUSTER>, dim3(4), dim3(kThreads / 4), kThreads, x.p, y.p))) {
    return false;
  }
  bool good = true;
  for (int i = 0; i < kThreads; ++i) good = good && y.p[i] == kThreads - i;
  return good;
}

template <bool WRONG>
bool early_access() {
  Array<float> x(kThreads, "x"), y(kThreads, "y");
  x.fill([](int i) { return 1.0f + i; });
  return started(launch_with({overlapping()}, early_access_kernel<WRONG>, dim3(1), dim3(kThreads), 0, x.p, y.p)) &&
         y.p[0] == kThreads;
}

template <OldCode WHAT>
bool old_code() {
  Array<float> x(kThreads, "x"), y(kThreads, "y");
  x.fill([](int i) { return 1.0f + i; });
  simt::device().code_capability = WHAT == OldCode::copies ? 75 : 80;
  const cudaLaunchAttribute attribute = WHAT == OldCode::waits ? overlapping() : clusters_of(1);
  const bool good = started(launch_with({attribute}, old_code_kernel<WHAT>, dim3(1), dim3(kThreads), 0, x.p, y.p));
  simt::reset_devices();
  return good && y.p[0] == kThreads;
}

bool intrinsics() {
  Array<int> failures(1, "failures");
  Array<unsigned> counter(1, "counter");
  Array<unsigned long long> wide(1, "wide");
  failures.fill([](int) { return 0; });
  counter.fill([](int) { return 0u; });
  wide.fill([](int) { return 0ull; });
  if (!started(launch(intrinsics_kernel, dim3(2, 3), dim3(8, 8), 0, failures.p, counter.p, wide.p))) return false;
  if (failures.p[0]) fprintf(stderr, "failed: %#x\n", failures.p[0]);
  return failures.p[0] == 0 && counter.p[0] == 6 * kThreads % (2 * kThreads) && wide.p[0] == (6ull * kThreads) << 33;
}

bool million() {
  const int n = 1 << 20, blocks = 64;
  Array<float> x(n, "x"), y(n, "y"), sums(blocks, "sums");
  x.fill([](int i) { return static_cast<float>(i % 7); });
  if (!started(launch(million_kernel, dim3(blocks), dim3(256), 0, x.p, y.p, sums.p, n))) return false;
  double sum = 0, expected = 0;
  for (int b = 0; b < blocks; ++b) sum += sums.p[b];
  for (int i = 0; i < n; ++i) expected += i % 7;
  return sum == expected && y.p[n - 1] == 2 * ((n - 1) % 7);
}

struct Litmus { std::function<bool()> right, wrong; };

#define LITMUS(name, ...)                                                         \
  {                                                                               \
    #name, {                                                                      \
      [] { return reverses(name##_kernel<false> __VA_OPT__(, ) __VA_ARGS__); },   \
          [] { return reverses(name##_kernel<true> __VA_OPT__(, ) __VA_ARGS__); } \
    }                                                                             \
  }
#define SHUFFLE_LITMUS(mask)                                                                                    \
  {                                                                                                             \
    "shuffle_" #mask, {                                                                                         \
      [] { return reverses(shuffle_kernel<Mask::right>); }, [] { return reverses(shuffle_kernel<Mask::mask>); } \
    }                                                                                                           \
  }
#define COPIES_LITMUS(mistake)                                                                                       \
  {                                                                                                                  \
    "copies_" #mistake, {                                                                                            \
      [] { return reverses(copies_kernel<Copies::right>); }, [] { return reverses(copies_kernel<Copies::mistake>); } \
    }                                                                                                                \
  }
#define FENCE_LITMUS(kernel, fences, together)                                       \
  {                                                                                  \
    #kernel "_" #fences, {                                                           \
      [] { return reverses_through(kernel##_kernel<Fences::both>, together); },      \
          [] { return reverses_through(kernel##_kernel<Fences::fences>, together); } \
    }                                                                                \
  }

const std::map<std::string, Litmus> tests = {
    LITMUS(missing_barrier),
    LITMUS(reused_shared),
    LITMUS(uninitialised),
    LITMUS(left_over, 2),
    LITMUS(divergent_barrier),
    LITMUS(barrier_against_shuffle),
    LITMUS(exited_thread),
    LITMUS(shared_bound),
    LITMUS(array_bound),
    LITMUS(read_bound),
    LITMUS(write_bound),
    LITMUS(misaligned),
    LITMUS(blocks_collide, 2),
    LITMUS(warp_exchange),
    SHUFFLE_LITMUS(half_arrive),
    SHUFFLE_LITMUS(without_self),
    SHUFFLE_LITMUS(disagree),
    SHUFFLE_LITMUS(too_narrow),
    SHUFFLE_LITMUS(exited),
    FENCE_LITMUS(last_block, no_release, false),
    FENCE_LITMUS(last_block, block_release, false),
    FENCE_LITMUS(last_block, no_acquire, false),
    FENCE_LITMUS(grid_barrier, no_release, true),
    FENCE_LITMUS(grid_barrier, no_acquire, true),
    {"spin", {spin<false>, spin<true>}},
    {"cluster_no_barrier", {cluster<Cluster::right>, cluster<Cluster::no_barrier>}},
    {"cluster_leaves_early", {cluster<Cluster::right>, cluster<Cluster::leaves_early>}},
    {"early_access", {early_access<false>, early_access<true>}},
    {"old_code_syncs_a_cluster", {old_code<OldCode::no>, old_code<OldCode::syncs>}},
    {"old_code_maps_shared", {old_code<OldCode::no>, old_code<OldCode::maps>}},
    {"old_code_waits", {old_code<OldCode::no>, old_code<OldCode::waits>}},
    {"old_code_copies", {old_code<OldCode::no>, old_code<OldCode::copies>}},
    COPIES_LITMUS(no_wait),
    COPIES_LITMUS(short_wait),
    COPIES_LITMUS(no_barrier),
    COPIES_LITMUS(reused),
    COPIES_LITMUS(twice),
    COPIES_LITMUS(left),
    {"last_block_late_acquire", {[] { return reverses_through(last_block_kernel<Fences::late_acquire>, false); }, {}}},
    {"groups", {[] { return reverses(groups_kernel); }, {}}},
    {"intrinsics", {intrinsics, {}}},
    {"million", {million, {}}},
};

}  // namespace

int main(int argc, char** argv) {
  const bool wrong = argc > 1 && strcmp(argv[1], "wrong") == 0;
  if (argc < 2 || (!wrong && strcmp(argv[1], "right") != 0)) {
    fprintf(stderr, "usage: litmus right|wrong [NAME...]\n");
    return 2;
  }
  std::vector<std::string> names(argv + 2, argv + argc);
  if (names.empty()) {
    for (const auto& [name, test] : tests) names.push_back(name);
  }
  bool all_good = true;
  for (const std::string& name : names) {
    const auto test = tests.find(name);
    if (test == tests.end() || (wrong && !test->second.wrong)) {
      fprintf(stderr, "litmus: there is no %s %s\n", argv[1], name.c_str());
      return 2;
    }
    printf("%s: ", name.c_str());  // before it runs: the device's own reports end the process
    const bool good = wrong ? test->second.wrong() : test->second.right();
    puts(good ? "ok" : "wrong result");
    all_good = all_good && good;
  }
  return all_good ? 0 : 1;
}
