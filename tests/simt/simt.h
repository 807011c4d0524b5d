// The CUDA execution model on the CPU: enough of the language and of the runtime for kernels that
// keep to csrc/cuda/cuda_compat.h to be compiled by g++ or clang++ and executed by simt.cpp. It is a
// test device: it finds mistakes, it is not a backend.
//
// Every CUDA thread is a fiber and every co-resident block an OS thread; one of them runs at a time
// and hands the baton on at synchronisation points, so a run depends on the seed alone. Barriers,
// shuffles and votes are rendezvous: they end the process with a report unless exactly the right
// threads meet in the same call.
//
// Supported: static __shared__ of trivially constructible types; dynamic_shared(); barriers of
// block, warp and cluster; shuffles and votes with exact masks; atomics, fences, and __nanosleep,
// which every spin loop needs, since nobody is interrupted; cache hints; 16-byte vectors; launch,
// launch_cooperative, launch_cluster, launch_pdl. Not supported, on purpose: __activemask, float atomics,
// shuffles of anything but arithmetic types, streams that run later.
//
// Kernels are compiled with BNEXT_SIMT defined and -fno-strict-aliasing, as nvcc compiles them;
// build.py has the flags of the three build modes.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

// ---- Language ------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// A block has its OS thread to itself, so thread storage is block storage. No initialisers, as in CUDA.
#define __shared__ static thread_local

#define SIMT_VECTOR2(name, type, bytes)      \
  struct alignas(bytes) name { type x, y; }; \
  inline name make_##name(type x, type y) { return {x, y}; }
#define SIMT_VECTOR4(name, type, bytes)            \
  struct alignas(bytes) name { type x, y, z, w; }; \
  inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }

SIMT_VECTOR2(int2, int, 8)
SIMT_VECTOR2(uint2, unsigned, 8)
SIMT_VECTOR2(float2, float, 8)
SIMT_VECTOR2(double2, double, 16)
SIMT_VECTOR4(int4, int, 16)
SIMT_VECTOR4(uint4, unsigned, 16)
SIMT_VECTOR4(float4, float, 16)

#undef SIMT_VECTOR2
#undef SIMT_VECTOR4

struct uint3 { unsigned x, y, z; };

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr uint64_t count() const { return uint64_t{x} * y * z; }
};

// Of the thread that runs now: the scheduler sets them at every switch.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ---- The runtime behind the language: simt.cpp ---------------------------------------------------

namespace simt {

// An intrinsic, and the line that calls it: threads that meet in it must agree on both.
struct Call {
  const char* name;
  const char* file;
  int line;
};

// SIMT_CALL goes into a parameter list: a default argument is evaluated where the call is.
#define SIMT_CALL const char *file = __builtin_FILE(), int line = __builtin_LINE()

enum class Scope { block, device };

// Returns how many threads of the block came with a true predicate.
unsigned sync_block(Call, bool predicate);
void sync_cluster(Call);
void sync_warp(Call, unsigned mask);
// The lanes of the mask whose predicate is true.
unsigned ballot(Call, unsigned mask, bool predicate);
// The value that lane `source` of the warp brought.
uint64_t shuffle(Call, unsigned mask, uint64_t value, unsigned source);
void fence(Scope);
void sleep();
// Where another thread may get its turn, if the order is random: before each atomic operation.
void preempt();
// From here on the thread may access memory, in a launch that overlaps the one before.
void wait_on_dependent_grids();
void* dynamic_shared();
unsigned cluster_rank();
bool allows_large_clusters(const void* kernel);
void* map_shared(const void* address, unsigned rank);

enum class Shuffle { index, up, down, exclusive };

// The lane that this lane reads from: lanes are taken in groups of `width`, and a lane whose source
// would fall outside its group reads itself (PTX, shfl.sync).
unsigned shuffle_source(Call, Shuffle, unsigned operand, int width);

template <class T>
__forceinline__ T shuffle(Call call, Shuffle mode, unsigned mask, T value, unsigned operand, int width) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= 8, "CUDA shuffles arithmetic types of at most 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = shuffle(call, mask, bits, shuffle_source(call, mode, operand, width));
  memcpy(&value, &bits, sizeof(T));
  return value;
}

enum class Start { in_order, overlapping };

struct Launch {
  dim3 grid, block;
  uint64_t gang;  // blocks that are resident together: 1, a cluster, or the whole grid
  size_t dynamic_shared;
  Start start;
  const void* kernel;
  void (*invoke)(const void* bound);
  const void* bound;  // kernel and arguments
  size_t bound_bytes;
};

int run(const Launch&);  // a cudaError

template <class... Params, class... Args>
int launch(void (*kernel)(Params...), dim3 grid, dim3 block, uint64_t gang, size_t dynamic_shared, Start start,
           Args&&... args) {
  using Bound = std::pair<void (*)(Params...), std::tuple<Params...>>;
  const Bound bound(kernel, std::tuple<Params...>(std::forward<Args>(args)...));
  return run({grid, block, gang, dynamic_shared, start, reinterpret_cast<const void*>(kernel),
              [](const void* p) {
                const auto& b = *static_cast<const Bound*>(p);
                std::apply(b.first, b.second);
              },
              &bound, sizeof(bound)});
}

// ---- For tests -----------------------------------------------------------------------------------

// "Global memory": 16-byte aligned, all 0xff (NaN), guarded on both sides, and in race mode unwritten.
// Accesses outside are reported: at once by the sanitizer and race builds, by the plain build (writes
// only) after the kernel.
void* allocate(size_t bytes, const char* name);
void release(void* address);
// The host wrote these bytes, which must lie in one allocation. Only the race build needs to know.
void written(const void* address, size_t bytes);
// Bytes of [address, address + bytes) that nobody has written; 0 in all but the race build.
size_t count_unwritten(const void* address, size_t bytes);

// 0 runs blocks and threads in order; anything else is a random order that it determines. The
// environment variable SIMT_SEED gives the first one.
void set_seed(uint64_t seed);

// Of the device; 4 at first. Blocks that wait for each other must all fit on it at a time.
void set_multiprocessors(int count);

}  // namespace simt

// ---- Intrinsics ----------------------------------------------------------------------------------

// Inlined always, so that a report can name the kernel's own lines.
__forceinline__ void __syncthreads(SIMT_CALL) { simt::sync_block({"__syncthreads", file, line}, false); }
__forceinline__ int __syncthreads_or(int predicate, SIMT_CALL) {
  return simt::sync_block({"__syncthreads_or", file, line}, predicate) > 0;
}
__forceinline__ int __syncthreads_and(int predicate, SIMT_CALL) {
  return simt::sync_block({"__syncthreads_and", file, line}, predicate) == blockDim.count();
}
__forceinline__ int __syncthreads_count(int predicate, SIMT_CALL) {
  return simt::sync_block({"__syncthreads_count", file, line}, predicate);
}

__forceinline__ void __syncwarp(unsigned mask = 0xffffffffu, SIMT_CALL) {
  simt::sync_warp({"__syncwarp", file, line}, mask);
}
__forceinline__ unsigned __ballot_sync(unsigned mask, int predicate, SIMT_CALL) {
  return simt::ballot({"__ballot_sync", file, line}, mask, predicate);
}
__forceinline__ int __any_sync(unsigned mask, int predicate, SIMT_CALL) {
  return simt::ballot({"__any_sync", file, line}, mask, predicate) != 0;
}
__forceinline__ int __all_sync(unsigned mask, int predicate, SIMT_CALL) {
  return simt::ballot({"__all_sync", file, line}, mask, predicate) == mask;
}

template <class T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int lane, int width = 32, SIMT_CALL) {
  return simt::shuffle({"__shfl_sync", file, line}, simt::Shuffle::index, mask, value, lane, width);
}
template <class T>
__forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_CALL) {
  return simt::shuffle({"__shfl_up_sync", file, line}, simt::Shuffle::up, mask, value, delta, width);
}
template <class T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_CALL) {
  return simt::shuffle({"__shfl_down_sync", file, line}, simt::Shuffle::down, mask, value, delta, width);
}
template <class T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, SIMT_CALL) {
  return simt::shuffle({"__shfl_xor_sync", file, line}, simt::Shuffle::exclusive, mask, value, lane_mask, width);
}

inline void __threadfence() { simt::fence(simt::Scope::device); }
inline void __threadfence_block() { simt::fence(simt::Scope::block); }
__forceinline__ void __nanosleep(unsigned) { simt::sleep(); }

// The compiler's own atomics, relaxed as CUDA's are: the race build instruments them.
namespace simt {

template <class T>
__forceinline__ T atomic_add(T* p, T v) {
  preempt();
  return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}

// Replaces *p by f(*p) and returns what was there.
template <class T, class F>
__forceinline__ T atomic_update(T* p, F f) {
  preempt();
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(p, &old, f(old), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

}  // namespace simt

__forceinline__ int atomicAdd(int* p, int v) { return simt::atomic_add(p, v); }
__forceinline__ unsigned atomicAdd(unsigned* p, unsigned v) { return simt::atomic_add(p, v); }
__forceinline__ unsigned long long atomicAdd(unsigned long long* p, unsigned long long v) {
  return simt::atomic_add(p, v);
}
__forceinline__ unsigned atomicInc(unsigned* p, unsigned limit) {
  return simt::atomic_update(p, [=](unsigned old) { return old >= limit ? 0 : old + 1; });
}
__forceinline__ unsigned atomicOr(unsigned* p, unsigned v) {
  return simt::atomic_update(p, [=](unsigned old) { return old | v; });
}
__forceinline__ unsigned atomicExch(unsigned* p, unsigned v) {
  return simt::atomic_update(p, [=](unsigned) { return v; });
}
__forceinline__ unsigned atomicCAS(unsigned* p, unsigned expected, unsigned v) {
  return simt::atomic_update(p, [=](unsigned old) { return old == expected ? v : old; });
}

// Cache hints change nothing that a test could see.
template <class T> __forceinline__ T __ldg(const T* p) { return *p; }
template <class T> __forceinline__ T __ldca(const T* p) { return *p; }
template <class T> __forceinline__ T __ldcg(const T* p) { return *p; }
template <class T> __forceinline__ T __ldcs(const T* p) { return *p; }
template <class T> __forceinline__ T __ldlu(const T* p) { return *p; }
template <class T> __forceinline__ void __stwb(T* p, T v) { *p = v; }
template <class T> __forceinline__ void __stcg(T* p, T v) { *p = v; }
template <class T> __forceinline__ void __stcs(T* p, T v) { *p = v; }
template <class T> __forceinline__ void __stwt(T* p, T v) { *p = v; }

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(v) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }
inline double rsqrt(double v) { return 1.0 / sqrt(v); }

// Of one type only: CUDA's mixed overloads convert silently. Of a NaN and a number, the number.
template <class T>
constexpr T min(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmin(a, b);
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmax(a, b);
  return a < b ? b : a;
}

// ---- The CUDA runtime ----------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorCooperativeLaunchTooLarge = 720,
};
using cudaStream_t = struct CUstream_st*;

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 13,
};

// A launch is over when it returns, and its errors are its return value.
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t);
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
// An H100 cut down to a few multiprocessors, so that grids made to fill it stay small.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device);
// Kernels need it, as on the GPU, before they may have more than 48 KB of dynamic shared memory.
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value);
template <class... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

namespace bnext::cuda {

// The block's dynamic shared memory, 16-byte aligned.
inline unsigned char* dynamic_shared() { return static_cast<unsigned char*>(simt::dynamic_shared()); }

// The kernel before is over when the next begins, but in the race build memory must not be touched until
// wait_on_dependent_grids().
inline void launch_dependent_grids() {}
inline void wait_on_dependent_grids() { simt::wait_on_dependent_grids(); }

// Cache hints change nothing that a test could see.
inline uint4 load_evict_last_or_first(const uint4* p, bool) { return *p; }

// The whole grid has run when these return.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t dynamic_shared, cudaStream_t,
                   Args&&... args) {
  return static_cast<cudaError_t>(
      simt::launch(kernel, grid, block, 1, dynamic_shared, simt::Start::in_order, std::forward<Args>(args)...));
}

// All blocks are resident together, so that they may wait for each other.
template <class... Params, class... Args>
cudaError_t launch_cooperative(void (*kernel)(Params...), dim3 grid, dim3 block, size_t dynamic_shared, cudaStream_t,
                               Args&&... args) {
  return static_cast<cudaError_t>(simt::launch(kernel, grid, block, grid.count(), dynamic_shared, simt::Start::in_order,
                                               std::forward<Args>(args)...));
}

template <class... Params, class... Args>
cudaError_t launch_pdl(void (*kernel)(Params...), dim3 grid, dim3 block, size_t dynamic_shared, cudaStream_t,
                       Args&&... args) {
  return static_cast<cudaError_t>(
      simt::launch(kernel, grid, block, 1, dynamic_shared, simt::Start::overlapping, std::forward<Args>(args)...));
}

// As many as there are multiprocessors for their blocks.
template <class... Params>
cudaError_t count_clusters(void (*)(Params...), unsigned, unsigned cluster_size, size_t, int* count) {
  int multiprocessors = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0);
  *count = multiprocessors / static_cast<int>(cluster_size);
  return error;
}

// Blocks in clusters of `cluster_size`, adjacent in x; it must divide grid.x.
template <class... Params, class... Args>
cudaError_t launch_cluster(void (*kernel)(Params...), dim3 grid, dim3 block, unsigned cluster_size,
                           size_t dynamic_shared, cudaStream_t, Args&&... args) {
  const unsigned most = simt::allows_large_clusters(reinterpret_cast<const void*>(kernel)) ? 16 : 8;
  if (cluster_size == 0 || cluster_size > most || grid.x % cluster_size) return cudaErrorInvalidConfiguration;
  return static_cast<cudaError_t>(simt::launch(kernel, grid, block, cluster_size, dynamic_shared, simt::Start::in_order,
                                               std::forward<Args>(args)...));
}

// This block's place in its cluster.
inline unsigned cluster_rank() { return simt::cluster_rank(); }

// Waits for every thread of the cluster and makes their writes visible to each other.
__forceinline__ void cluster_sync(SIMT_CALL) { simt::sync_cluster({"cluster_sync", file, line}); }

// The same variable in the shared memory of block `rank` of the cluster.
template <class T>
T* map_shared(T* p, unsigned rank) {
  return static_cast<T*>(simt::map_shared(p, rank));
}

}  // namespace bnext::cuda

#undef SIMT_CALL
