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

// Counts the block among `blocks` of them, and returns its number among the workers that go on when all have arrived,
// the last `workers` <= `blocks` of them, counted backwards from 0; or -1 in all other blocks. A worker returns once
// all have arrived, and sees what they wrote before. The blocks need not all be on the device together: few blocks of a
// launch wait, fewer than a device runs at a time (planner/two_pass.cpp), and all others leave.
__device__ __forceinline__ int arrive_among_last(uint32_t* counter, uint32_t blocks, uint32_t workers) {
  if (blocks == 1) {
    __syncthreads();
    return 0;
  }
  // It is back at 0 when the last has arrived, and nobody else uses it before this launch is over.
  const uint32_t missing = blocks - 1 - block_increment_acq_rel(counter, blocks - 1);
  if (missing >= workers) return -1;
  if (missing > 0) wait_for_count(counter, [](uint32_t count) { return count == 0; });
  return static_cast<int>(missing);
}

// True in the last of `blocks` blocks to call it; what the others wrote before is then visible.
__device__ __forceinline__ bool arrive_last(uint32_t* counter, uint32_t blocks) {
  return arrive_among_last(counter, blocks, 1) == 0;
}

// All blocks of a cooperative launch wait for each other, and see what the others wrote before.
__device__ __forceinline__ void grid_sync(uint32_t* counter) {
  const uint32_t blocks = gridDim.x;
  if (blocks == 1) {
    __syncthreads();
    return;
  }
  // Those that come are counted, and then those that go: the last of these sets the counter back.
  const uint32_t limit = 2 * blocks - 1;
  block_increment_acq_rel(counter, limit);
  wait_for_count(counter, [&](uint32_t count) { return count >= blocks; });
  if (threadIdx.x == 0) atomicInc(counter, limit);
}

}  // namespace bnext::cuda
