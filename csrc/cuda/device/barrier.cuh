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

// True in the last of `blocks` blocks to call it; what the others wrote before is then visible. Nobody waits, so that
// the blocks need not be on the device together.
__device__ __forceinline__ bool arrive_last(uint32_t* counter, uint32_t blocks) {
  if (blocks == 1) {
    __syncthreads();
    return true;
  }
  // It is back at 0 when the last has arrived, and nobody else uses it before this launch is over.
  return block_increment_acq_rel(counter, blocks - 1) == blocks - 1;
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
  if (threadIdx.x == 0) {
    while (load_acquire(counter) < blocks) __nanosleep(32);
  }
  __syncthreads();
  if (threadIdx.x == 0) atomicInc(counter, limit);
}

}  // namespace bnext::cuda
