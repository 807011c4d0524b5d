// The CUDA that the kernels are written in, and how they are launched. Under nvcc this is CUDA itself; with BNEXT_SIMT,
// the header of the runtime is that of tests/simt, which runs the same source on the CPU. The few things that need PTX
// live here, each next to its plain twin.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

#define BNEXT_GRID_CONSTANT __grid_constant__

// Goes into the parameters of what threads meet in, so that a simulated device can say where.
#if defined(BNEXT_SIMT)
#define BNEXT_CALLER SIMT_CALLER
#else
#define BNEXT_CALLER
#endif

namespace bnext::cuda {

// The one way to start a kernel, with one attribute or none.
template <class... Params, class... Args>
cudaError_t launch_with(cudaLaunchAttribute* attribute, void (*kernel)(Params...), dim3 grid, dim3 block,
                        size_t dynamic_shared, cudaStream_t stream, Args&&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = dynamic_shared;
  config.stream = stream;
  config.attrs = attribute;
  config.numAttrs = attribute ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

// Without an attribute.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t dynamic_shared, cudaStream_t stream,
                   Args&&... args) {
  return launch_with(nullptr, kernel, grid, block, dynamic_shared, stream, std::forward<Args>(args)...);
}

// All blocks are resident together, so that they may wait for each other; an error where they do not fit.
template <class... Params, class... Args>
cudaError_t launch_cooperative(void (*kernel)(Params...), dim3 grid, dim3 block, size_t dynamic_shared,
                               cudaStream_t stream, Args&&... args) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  return launch_with(&attribute, kernel, grid, block, dynamic_shared, stream, std::forward<Args>(args)...);
}

inline cudaLaunchAttribute cluster_attribute(unsigned size) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = size;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return attribute;
}

// Blocks in clusters of `cluster_size`, adjacent in x; it must divide grid.x.
template <class... Params, class... Args>
cudaError_t launch_cluster(void (*kernel)(Params...), dim3 grid, dim3 block, unsigned cluster_size,
                           size_t dynamic_shared, cudaStream_t stream, Args&&... args) {
  cudaLaunchAttribute attribute = cluster_attribute(cluster_size);
  return launch_with(&attribute, kernel, grid, block, dynamic_shared, stream, std::forward<Args>(args)...);
}

// How many such clusters are on the device at a time.
inline cudaError_t count_clusters(const void* kernel, unsigned block, unsigned cluster_size, size_t dynamic_shared,
                                  int* count) {
  cudaLaunchAttribute attribute = cluster_attribute(cluster_size);
  cudaLaunchConfig_t config = {};
  config.gridDim = cluster_size;
  config.blockDim = block;
  config.dynamicSmemBytes = dynamic_shared;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaOccupancyMaxActiveClusters(count, kernel, &config);
}

// The kernel may begin when all blocks of the one before it in the stream have called launch_dependent_grids() or
// ended. It must not touch memory before wait_on_dependent_grids(). From compute capability 9.0.
template <class... Params, class... Args>
cudaError_t launch_pdl(void (*kernel)(Params...), dim3 grid, dim3 block, size_t dynamic_shared, cudaStream_t stream,
                       Args&&... args) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return launch_with(&attribute, kernel, grid, block, dynamic_shared, stream, std::forward<Args>(args)...);
}

// Blocks of a dependent launch may become resident from here on, as the blocks of this one end.
__device__ __forceinline__ void launch_dependent_grids() {
#if __CUDA_ARCH__ >= 900  // a hint: without it the next kernel begins when this one is over
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Until the kernel before is over, and its writes are visible. At once in a kernel that was launched otherwise, as all
// are below compute capability 9.0.
__device__ __forceinline__ void wait_on_dependent_grids() {
#if defined(BNEXT_SIMT)
  simt::wait_on_dependent_grids();
#elif __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Loads 16 bytes that the L2 cache should keep in preference to others, or let go of first.
__device__ __forceinline__ uint4 load_evict_last_or_first(const uint4* p, [[maybe_unused]] bool keep) {
#if __CUDA_ARCH__ >= 800
  // Not `volatile`: the compiler may make the policies once, outside a loop of loads.
  uint64_t last, first;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(last));
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(first));
  uint4 v;
  asm volatile("ld.global.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p), "l"(keep ? last : first));
  return v;
#else
  return *p;
#endif
}

// Whether the code may call copy_async().
#if defined(BNEXT_SIMT) || __CUDA_ARCH__ >= 800
constexpr bool kHasAsyncCopies = true;
#else
constexpr bool kHasAsyncCopies = false;
#endif

// Copies 16 bytes from global to shared memory, past the L1 cache, while the thread goes on: they are there, for this
// thread, after the wait_for_copies() that their group takes. (Without a hint to the L2 cache: of copies with one,
// ptxas 13.0 makes code that an H100 calls an illegal instruction.)
__device__ __forceinline__ void copy_async(uint4* shared, const uint4* global) {
#if defined(BNEXT_SIMT)
  if (simt::code_capability() >= 80) simt::copy_async(shared, global, sizeof(uint4));
  else *shared = *global;
#elif __CUDA_ARCH__ >= 800
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#endif
}

// Makes a group of the thread's copies since the last call.
__device__ __forceinline__ void commit_copies() {
#if defined(BNEXT_SIMT)
  if (simt::code_capability() >= 80) simt::commit_copies();
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until no more than the last MAX_PENDING of the thread's groups are under way.
template <int MAX_PENDING>
__device__ __forceinline__ void wait_for_copies() {
#if defined(BNEXT_SIMT)
  if (simt::code_capability() >= 80) simt::wait_for_copies(MAX_PENDING);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(MAX_PENDING) : "memory");
#endif
}

// Brings what lies there into the L2 cache, for a load to come; nothing where the pointer is null.
__device__ __forceinline__ void prefetch_l2([[maybe_unused]] const void* p) {
#if !defined(BNEXT_SIMT)
  if (p) asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// Lets so many cycles pass. (__nanosleep alone takes anything up to twice what it is asked for.)
__device__ __forceinline__ void wait_for_cycles([[maybe_unused]] uint32_t cycles) {
#if defined(BNEXT_SIMT)
  __nanosleep(cycles);
#elif defined(__CUDA_ARCH__)
  const uint32_t begin = static_cast<uint32_t>(clock64());
  while (static_cast<uint32_t>(clock64()) - begin < cycles) __nanosleep(50);
#endif
}

// Adds one to a counter, which goes back to 0 after `limit`, and returns the old value. What the thread wrote before is
// visible to whoever sees the new one, and what was visible to those before becomes visible to it.
__device__ __forceinline__ uint32_t increment_acq_rel(uint32_t* counter, uint32_t limit) {
#if defined(BNEXT_SIMT)
  __threadfence();
  const uint32_t old = atomicInc(counter, limit);
  __threadfence();
  return old;
#else
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.inc.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(limit) : "memory");
  return old;
#endif
}

// A counter's value, and sight of what was visible to those who brought it there.
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* counter) {
#if defined(BNEXT_SIMT)
  const uint32_t value = *static_cast<const volatile uint32_t*>(counter);
  __threadfence();
  return value;
#else
  uint32_t value;
  asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
#endif
}

// A number in global memory that other threads load or store meanwhile, in no order with anything else.
__device__ __forceinline__ uint64_t load_relaxed(const uint64_t* p) {
#if defined(BNEXT_SIMT)
  return *static_cast<const volatile uint64_t*>(p);
#else
  uint64_t v;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
#endif
}
__device__ __forceinline__ void store_relaxed(uint64_t* p, uint64_t v) {
#if defined(BNEXT_SIMT)
  *static_cast<volatile uint64_t*>(p) = v;
#else
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
#endif
}

// 16 bytes of global memory that other threads load or store meanwhile: as one, in no order with anything else. (Before
// CUDA 12.3 there is no way to say so. Then it is the same instruction of the machine, by another name.)
struct alignas(16) U64x2 { uint64_t first, second; };
__device__ __forceinline__ void store_whole(U64x2* p, const U64x2& v) {
#if defined(BNEXT_SIMT)
  *static_cast<volatile uint64_t*>(&p->first) = v.first;
  *static_cast<volatile uint64_t*>(&p->second) = v.second;
#elif __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1203
  asm volatile("{ .reg .b128 v; mov.b128 v, {%1, %2}; st.relaxed.gpu.global.b128 [%0], v; }" ::"l"(p), "l"(v.first),
               "l"(v.second)
               : "memory");
#else
  asm volatile("st.relaxed.gpu.global.v2.b64 [%0], {%1, %2};" ::"l"(p), "l"(v.first), "l"(v.second) : "memory");
#endif
}
__device__ __forceinline__ U64x2 load_whole(const U64x2* p) {
  U64x2 v;
#if defined(BNEXT_SIMT)
  v.first = *static_cast<const volatile uint64_t*>(&p->first);
  v.second = *static_cast<const volatile uint64_t*>(&p->second);
#elif __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1203
  asm volatile("{ .reg .b128 v; ld.relaxed.gpu.global.b128 v, [%2]; mov.b128 {%0, %1}, v; }"
               : "=l"(v.first), "=l"(v.second)
               : "l"(p)
               : "memory");
#else
  asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];" : "=l"(v.first), "=l"(v.second) : "l"(p) : "memory");
#endif
  return v;
}

// The block's dynamic shared memory, 16-byte aligned.
__device__ __forceinline__ unsigned char* dynamic_shared() {
#if defined(BNEXT_SIMT)
  return static_cast<unsigned char*>(simt::dynamic_shared());
#else
  extern __shared__ uint4 bnext_dynamic_shared[];
  return reinterpret_cast<unsigned char*>(bnext_dynamic_shared);
#endif
}

// Clusters exist from compute capability 9.0 on, of the device and of the code: PTX for less, compiled for such a
// device at load time, has none. Below, a kernel that knows them runs with clusters of 1 and does not call these, or it
// stops: without a barrier it would go on to wrong results.

// Waits for every thread of the cluster and makes their writes visible to each other. Not the .aligned
// form: a warp may come here from a branch that only its first thread took.
__device__ __forceinline__ void cluster_sync(BNEXT_CALLER) {
#if defined(BNEXT_SIMT)
  simt::sync_cluster({"cluster_sync", file, line});
#elif __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#else
  asm volatile("trap;");
#endif
}

// The same variable in the shared memory of block `rank` of the cluster.
template <class T>
__device__ __forceinline__ T* map_shared(T* p, [[maybe_unused]] unsigned rank) {
#if defined(BNEXT_SIMT)
  return static_cast<T*>(simt::map_shared(p, rank));
#elif __CUDA_ARCH__ >= 900
  T* mapped;
  asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(p), "r"(rank));
  return mapped;
#else
  asm volatile("trap;");
  return p;
#endif
}

}  // namespace bnext::cuda
