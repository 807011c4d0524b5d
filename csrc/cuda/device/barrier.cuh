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

// Lets blocks that are on the device together wait for what the last `shares` of them to arrive do. Each block arrives,
// those with a share release, and all wait; by then the counter is back at 0, ready for the next launch.
class SplitBarrier {
 public:
  __device__ __forceinline__ SplitBarrier(uint32_t* counter, uint32_t blocks, uint32_t shares)
      : counter_(counter), blocks_(blocks), shares_(shares) {}

  // The block's share, from 0 on, or -1. A block with a share returns once all blocks have arrived, and sees what they
  // wrote before.
  __device__ __forceinline__ int arrive() const {
    if (blocks_ == 1) {
      __syncthreads();
      return 0;
    }
    const uint32_t missing = blocks_ - 1 - block_increment_acq_rel(counter_, limit());
    if (missing >= shares_) return -1;
    if (missing > 0) wait_for(blocks_);
    return static_cast<int>(missing);
  }
  __device__ __forceinline__ void release() const {
    if (blocks_ > 1) block_increment_acq_rel(counter_, limit());
  }
  // Returns once all shares are released; what was written before that is then visible.
  __device__ __forceinline__ void wait() const {
    if (blocks_ > 1) wait_for(blocks_ + shares_);
    if (threadIdx.x == 0 && blocks_ > 1) atomicInc(counter_, limit());
    if (blocks_ == 1) __syncthreads();
  }

 private:
  // Arrivals, releases and ends of waiting are counted one after the other. The last of these sets it back.
  __device__ __forceinline__ uint32_t limit() const { return 2 * blocks_ + shares_ - 1; }
  __device__ __forceinline__ void wait_for(uint32_t count) const {
    if (threadIdx.x == 0) {
      while (load_acquire(counter_) < count) __nanosleep(32);
    }
    __syncthreads();
  }

  uint32_t *counter_, blocks_, shares_;
};

// All blocks of a cooperative launch wait for each other.
__device__ __forceinline__ void grid_sync(uint32_t* counter) {
  const SplitBarrier barrier(counter, gridDim.x, /*shares=*/1);
  if (barrier.arrive() == 0) barrier.release();
  barrier.wait();
}

}  // namespace bnext::cuda
