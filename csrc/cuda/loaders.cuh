// Where a pass gets a tensor's vectors from: memory, or the shared memory that an earlier pass of the same
// block filled.
#pragma once

#include "tile_iterator.cuh"

namespace bnext::cuda {

template <class T, int N, Reuse REUSE>
struct FromGlobal {
  const T* data;
  int64_t numel;

  __device__ __forceinline__ FromGlobal(const void* tensor, const Shape& shape)
      : data(static_cast<const T*>(tensor)), numel(shape.numel()) {}

  template <int COUNT, bool WHOLE>
  __device__ __forceinline__ void load(const Chunk<COUNT, WHOLE>& chunk, Vec<T, N> (&vecs)[COUNT]) {
#pragma unroll
    for (int k = 0; k < COUNT; ++k) vecs[k] = load_at<REUSE, N>(data, chunk, k, numel);
  }
};

// A block's share of a tensor in shared memory. A thread meets its vectors in the same order in every
// pass, and reads back only what it wrote itself: there is nothing to synchronise.
template <class T, int N>
struct SharedTile {
  Vec<T, N>* slots;  // one for each vector of the share

  // Share `share` of the `of` that the block's dynamic shared memory is divided into.
  __device__ __forceinline__ SharedTile(const Partition& partition, int32_t work, int32_t of)
      : slots(reinterpret_cast<Vec<T, N>*>(dynamic_shared() + work * (partition.resident_bytes / of))) {}

  // Loads from memory, and keeps.
  struct GlobalToShared {
    FromGlobal<T, N, Reuse::last> memory;
    Vec<T, N>* slot;

    template <int COUNT, bool WHOLE>
    __device__ __forceinline__ void load(const Chunk<COUNT, WHOLE>& chunk, Vec<T, N> (&vecs)[COUNT]) {
      memory.load(chunk, vecs);
#pragma unroll
      for (int k = 0; k < COUNT; ++k, slot += blockDim.x) *slot = vecs[k];
    }
  };
  __device__ __forceinline__ GlobalToShared stash(const void* tensor, const Shape& shape) const {
    return {FromGlobal<T, N, Reuse::last>(tensor, shape), slots + threadIdx.x};
  }

  // Gives back what was kept.
  struct FromShared {
    const Vec<T, N>* slot;

    template <int COUNT, bool WHOLE>
    __device__ __forceinline__ void load(const Chunk<COUNT, WHOLE>&, Vec<T, N> (&vecs)[COUNT]) {
#pragma unroll
      for (int k = 0; k < COUNT; ++k, slot += blockDim.x) vecs[k] = *slot;
    }
  };
  __device__ __forceinline__ FromShared replay() const { return {slots + threadIdx.x}; }
};

}  // namespace bnext::cuda
