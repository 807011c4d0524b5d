// The device half of CUDA C++ on the CPU: enough of the language for kernels to be compiled by g++ or clang++ and
// executed by this folder's sources. README.md says what is supported, and what is checked.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

// ---- Language ------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
// A block has its OS thread to itself, so thread storage is block storage. No initialisers, as in CUDA.
#define __shared__ static thread_local

// The promise of a kernel: threads of a block, at most, and how many such blocks a multiprocessor must hold. It may
// depend on template arguments, and so may GCC's attribute: its no-ops before the kernel's entry are how the numbers
// reach the running program, see kernel.cpp. Clang wants literals there, so that its kernels promise nothing.
#if defined(__clang__)
#define __launch_bounds__(...)
#else
#define __launch_bounds__(...) \
  __attribute__((patchable_function_entry(simt::encode_bounds(__VA_ARGS__), simt::encode_bounds(__VA_ARGS__))))
#endif

namespace simt {

constexpr unsigned kMostBoundThreads = 1024;
constexpr unsigned encode_bounds(unsigned threads, unsigned blocks = 1) {
  return blocks * (kMostBoundThreads / 32 + 1) + (threads + 31) / 32;
}

}  // namespace simt

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

// ---- What is behind the language ---------------------------------------------------

namespace simt {

// An intrinsic, and the line that calls it: threads that meet in it must agree on both.
struct Call {
  const char* name;
  const char* file;
  int line;
};

// Goes into a parameter list: a default argument is evaluated where the call is.
#define SIMT_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

enum class Scope { block, device };

// Returns how many threads of the block came with a true predicate.
unsigned sync_block(Call, bool predicate);
void sync_warp(Call, unsigned mask);
// The lanes of the mask whose predicate is true.
unsigned ballot(Call, unsigned mask, bool predicate);
// The value that lane `source` of the warp brought.
uint64_t shuffle(Call, unsigned mask, uint64_t value, unsigned source);
void fence(Scope);
void sleep();
// Where another thread may get its turn, if the order is random: before each atomic operation.
void preempt();
// The block's dynamic shared memory, 16-byte aligned.
void* dynamic_shared();

// What is PTX in CUDA. From compute capability 9.0 of the code; below, the report is a trap.
// From here on the thread may access memory, in a launch that overlaps the one before (griddepcontrol.wait).
void wait_on_dependent_grids();
// All threads of the cluster (barrier.cluster).
void sync_cluster(Call);
unsigned cluster_rank();
// The same variable in the shared memory of that block of the cluster (mapa).
void* map_shared(const void* address, unsigned rank);

// Compute capability of the code, which on a device is a constant of the compiler (__CUDA_ARCH__).
int code_capability();
// A copy to shared memory while the thread goes on (cp.async), from 8.0 of the code. What it is to replace is lost at
// once; it reads and writes when it has to, which is in the thread's wait for its group. Every group is waited for.
void copy_async(void* shared, const void* global, size_t bytes);
void commit_copies();
// Until all but the last `most` groups are there.
void wait_for_copies(unsigned most);

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

}  // namespace simt

// ---- Intrinsics ----------------------------------------------------------------------------------

// Inlined always, so that a report can name the kernel's own lines.
__forceinline__ void __syncthreads(SIMT_CALLER) { simt::sync_block({"__syncthreads", file, line}, false); }
__forceinline__ int __syncthreads_or(int predicate, SIMT_CALLER) {
  return simt::sync_block({"__syncthreads_or", file, line}, predicate) > 0;
}
__forceinline__ int __syncthreads_and(int predicate, SIMT_CALLER) {
  return simt::sync_block({"__syncthreads_and", file, line}, predicate) == blockDim.count();
}
__forceinline__ int __syncthreads_count(int predicate, SIMT_CALLER) {
  return simt::sync_block({"__syncthreads_count", file, line}, predicate);
}

__forceinline__ void __syncwarp(unsigned mask = 0xffffffffu, SIMT_CALLER) {
  simt::sync_warp({"__syncwarp", file, line}, mask);
}
__forceinline__ unsigned __ballot_sync(unsigned mask, int predicate, SIMT_CALLER) {
  return simt::ballot({"__ballot_sync", file, line}, mask, predicate);
}
__forceinline__ int __any_sync(unsigned mask, int predicate, SIMT_CALLER) {
  return simt::ballot({"__any_sync", file, line}, mask, predicate) != 0;
}
__forceinline__ int __all_sync(unsigned mask, int predicate, SIMT_CALLER) {
  return simt::ballot({"__all_sync", file, line}, mask, predicate) == mask;
}

template <class T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int lane, int width = 32, SIMT_CALLER) {
  return simt::shuffle({"__shfl_sync", file, line}, simt::Shuffle::index, mask, value, lane, width);
}
template <class T>
__forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_CALLER) {
  return simt::shuffle({"__shfl_up_sync", file, line}, simt::Shuffle::up, mask, value, delta, width);
}
template <class T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_CALLER) {
  return simt::shuffle({"__shfl_down_sync", file, line}, simt::Shuffle::down, mask, value, delta, width);
}
template <class T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, SIMT_CALLER) {
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
