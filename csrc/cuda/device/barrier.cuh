// Barriers between blocks, on counters in global memory that are 0 before a launch and after it. Blocks that wait for
// each other must all be on the device together (a cooperative launch); blocks that only count who is last need not.
#pragma once

#include "cuda_compat.h"

namespace bnext::cuda {

// increment_acq_rel() once for a whole block, for what all of its threads wrote and will read.
__device__ __forceinline__ uint32_t block_increment_acq_rel(uint32_t* counter, uint32_t limit) {
  __shared__ uint32_t old;
  __syncthreads();
  if (threadIdx.x == 0) old = increment_acq_rel(counter, limit);
  __syncthreads();
  return old;
}

// Shares out what is to be done when `blocks` blocks have called it, among the last `shares` of them to come, at most
// `blocks`: returns the block's share, from 0 on, or -1. What the others wrote before is visible to whoever has one.
// Blocks with a share wait for those still to come, which are fewer than `shares`. A device has room for as many
// (plan.cpp), and all blocks without a share leave: so those come, although the launch need not be cooperative.
__device__ __forceinline__ int arrive_for_share(uint32_t* counter, uint32_t blocks, uint32_t shares) {
  if (blocks == 1) {
    __syncthreads();
    return 0;
  }
  const uint32_t missing = blocks - 1 - block_increment_acq_rel(counter, blocks - 1);
  if (missing >= shares) return -1;
  if (missing > 0) {
    if (threadIdx.x == 0) {
      // It is back at 0 when the last has come, and no other launch uses it before this one is over.
      while (load_acquire(counter) != 0) __nanosleep(32);
    }
    __syncthreads();
  }
  return static_cast<int>(missing);
}

// True in the last of `blocks` blocks to call it; what the others wrote before is then visible.
__device__ __forceinline__ bool arrive_last(uint32_t* counter, uint32_t blocks) {
  return arrive_for_share(counter, blocks, 1) == 0;
}

// Lets blocks that are on the device together wait for what the last of them to arrive does. Each block arrives, the
// last one releases, and all wait; by then the counter is back at 0, ready for the next launch.
class SplitBarrier {
 public:
  __device__ __forceinline__ SplitBarrier(uint32_t* counter, uint32_t blocks) : counter_(counter), blocks_(blocks) {}

  // True in the last block; what the others wrote before is then visible.
  __device__ __forceinline__ bool arrive_is_last() const {
    if (blocks_ == 1) return arrive_last(counter_, 1);
    return block_increment_acq_rel(counter_, 2 * blocks_) == blocks_ - 1;
  }
  __device__ __forceinline__ void release() const {
    if (blocks_ > 1) block_increment_acq_rel(counter_, 2 * blocks_);
  }
  // Returns once it is released; what was written before that is then visible.
  __device__ __forceinline__ void wait() const {
    if (threadIdx.x == 0 && blocks_ > 1) {
      // The counter is above `blocks` from the release until the last block has stopped waiting.
      while (load_acquire(counter_) <= blocks_) __nanosleep(32);
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
