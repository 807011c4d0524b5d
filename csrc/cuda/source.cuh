// Where a pass gets a tensor's units from: memory, or the shared memory that an earlier pass of the same
// block filled.
#pragma once

#include "walk.cuh"

namespace bnext::cuda {

template <class T, int UNIT, Reuse REUSE>
struct FromMemory {
  const T* data;
  int64_t numel;

  __device__ __forceinline__ FromMemory(const void* tensor, const Shape& shape)
      : data(static_cast<const T*>(tensor)), numel(shape.numel()) {}

  template <int COUNT, bool WHOLE>
  __device__ __forceinline__ void load(const Chunk<COUNT, WHOLE>& chunk, Unit<T, UNIT> (&units)[COUNT]) {
#pragma unroll
    for (int k = 0; k < COUNT; ++k) units[k] = load_at<REUSE, UNIT>(data, chunk, k, numel);
  }
};

// A block's share of a tensor in shared memory. A thread meets its units in the same order in every
// pass, and reads back only what it wrote itself: there is nothing to synchronise.
template <class T, int UNIT>
struct Kept {
  Unit<T, UNIT>* slots;  // one for each unit of the share

  // Share `share` of the `of` that the block's dynamic shared memory is divided into.
  __device__ __forceinline__ Kept(const Pass& pass, int32_t share, int32_t of)
      : slots(reinterpret_cast<Unit<T, UNIT>*>(dynamic_shared() + share * (pass.kept_bytes / of))) {}

  // Loads from memory, and keeps.
  struct Keeping {
    FromMemory<T, UNIT, Reuse::last> memory;
    Unit<T, UNIT>* slot;

    template <int COUNT, bool WHOLE>
    __device__ __forceinline__ void load(const Chunk<COUNT, WHOLE>& chunk, Unit<T, UNIT> (&units)[COUNT]) {
      memory.load(chunk, units);
#pragma unroll
      for (int k = 0; k < COUNT; ++k, slot += blockDim.x) *slot = units[k];
    }
  };
  __device__ __forceinline__ Keeping keeping(const void* tensor, const Shape& shape) const {
    return {FromMemory<T, UNIT, Reuse::last>(tensor, shape), slots + threadIdx.x};
  }

  // Gives back what was kept.
  struct Giving {
    const Unit<T, UNIT>* slot;

    template <int COUNT, bool WHOLE>
    __device__ __forceinline__ void load(const Chunk<COUNT, WHOLE>&, Unit<T, UNIT> (&units)[COUNT]) {
#pragma unroll
      for (int k = 0; k < COUNT; ++k, slot += blockDim.x) units[k] = *slot;
    }
  };
  __device__ __forceinline__ Giving giving() const { return {slots + threadIdx.x}; }
};

}  // namespace bnext::cuda
