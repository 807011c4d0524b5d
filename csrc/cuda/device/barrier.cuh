// Barriers between blocks, on counters in global memory that are 0 before a launch and after it. Blocks that wait for
// each other must all be on the device together (a cooperative launch); blocks that only count who is last need not.
#pragma once

#include "cuda_compat.h"

namespace bnext::cuda {

// Adds one to a counter, which wraps around to 0 after `limit`, for the whole block: what its threads wrote
// before is visible to whoever sees the new value, and what was written before the old values is
// visible to them. Returns the old value.
__device__ __forceinline__ uint32_t increment_acq_rel(uint32_t* counter, uint32_t limit) {
  __shared__ uint32_t old;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    old = atomicInc(counter, limit);
    __threadfence();
  }
  __syncthreads();
  return old;
}

// True in the last of `blocks` blocks to call it; what the others wrote before is then visible.
__device__ __forceinline__ bool arrive_last(uint32_t* counter, uint32_t blocks) {
  if (blocks == 1) {
    __syncthreads();
    return true;
  }
  return increment_acq_rel(counter, blocks - 1) == blocks - 1;
}

// Lets blocks that are on the device together wait for what the last of them to arrive does. Each block arrives, the
// last one releases, and all wait; by then the counter is back at 0, ready for the next launch.
class SplitBarrier {
 public:
  __device__ __forceinline__ SplitBarrier(uint32_t* counter, uint32_t blocks) : counter_(counter), blocks_(blocks) {}

  // True in the last block; what the others wrote before is then visible.
  __device__ __forceinline__ bool arrive_is_last() const {
    if (blocks_ == 1) return arrive_last(counter_, 1);
    return increment_acq_rel(counter_, 2 * blocks_) == blocks_ - 1;
  }
  __device__ __forceinline__ void release() const {
    if (blocks_ > 1) increment_acq_rel(counter_, 2 * blocks_);
  }
  // Returns once it is released; what was written before that is then visible.
  __device__ __forceinline__ void wait() const {
    if (threadIdx.x == 0 && blocks_ > 1) {
      // The counter is above `blocks` from the release until the last block has stopped waiting.
      while (*static_cast<volatile uint32_t*>(counter_) <= blocks_) __nanosleep(32);
      __threadfence();
      atomicInc(counter_, 2 * blocks_);
    }
    __syncthreads();
  }

 private:
  uint32_t* counter_;
  uint32_t blocks_;
};

// All blocks of a cooperative launch wait for each other.
__device__ __forceinline__ void grid_sync(uint32_t* counter) {
  const SplitBarrier barrier(counter, gridDim.x);
  if (barrier.arrive_is_last()) barrier.release();
  barrier.wait();
}

}  // namespace bnext::cuda
