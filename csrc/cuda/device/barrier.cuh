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

// All threads of a block wait for a count; they then see what was written before whoever counted it.
template <class Reached>
__device__ __forceinline__ void wait_for_count(const uint32_t* counter, const Reached& reached) {
  if (threadIdx.x == 0) {
    while (!reached(load_acquire(counter))) __nanosleep(32);
  }
  __syncthreads();
}

// Counts the block among `blocks` of them, where the counter wraps around after `limit`. Returns its share of what is
// to be done when all have come, from 0 on, or -1: the last `shares` to come, at most `blocks`, have one each. A block
// with a share returns once `all_came` holds for the counter, and sees what the others wrote before.
template <class AllCame>
__device__ __forceinline__ int take_share(uint32_t* counter, uint32_t blocks, uint32_t shares, uint32_t limit,
                                          const AllCame& all_came) {
  if (blocks == 1) {
    __syncthreads();
    return 0;
  }
  const uint32_t missing = blocks - 1 - block_increment_acq_rel(counter, limit);
  if (missing >= shares) return -1;
  if (missing > 0) wait_for_count(counter, all_came);
  return static_cast<int>(missing);
}

// The same for blocks that need not all be on the device together. Those with a share wait for fewer than `shares`; a
// device has room for as many (planner/plan.cpp), and all blocks without a share leave: so those come.
__device__ __forceinline__ int arrive_for_share(uint32_t* counter, uint32_t blocks, uint32_t shares) {
  // It is back at 0 when the last has come, and no other launch uses it before this one is over.
  return take_share(counter, blocks, shares, blocks - 1, [](uint32_t count) { return count == 0; });
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

  // The block's share, from 0 on, or -1.
  __device__ __forceinline__ int arrive() const {
    return take_share(counter_, blocks_, shares_, limit(), [&](uint32_t count) { return count >= blocks_; });
  }
  __device__ __forceinline__ void release() const {
    if (blocks_ > 1) block_increment_acq_rel(counter_, limit());
  }
  // Returns once all shares are released; what was written before that is then visible.
  __device__ __forceinline__ void wait() const {
    if (blocks_ == 1) {
      __syncthreads();
      return;
    }
    wait_for_count(counter_, [&](uint32_t count) { return count >= blocks_ + shares_; });
    if (threadIdx.x == 0) atomicInc(counter_, limit());
  }

 private:
  // Arrivals, releases and ends of waiting are counted one after the other. The last of these sets it back.
  __device__ __forceinline__ uint32_t limit() const { return 2 * blocks_ + shares_ - 1; }

  uint32_t *counter_, blocks_, shares_;
};

// All blocks of a cooperative launch wait for each other.
__device__ __forceinline__ void grid_sync(uint32_t* counter) {
  const SplitBarrier barrier(counter, gridDim.x, /*shares=*/1);
  if (barrier.arrive() == 0) barrier.release();
  barrier.wait();
}

}  // namespace bnext::cuda
