// What the resident plan's kernels share. A cluster of blocks owns a channel: each block reads its share
// from memory once, into shared memory, the blocks exchange their partial results, and each goes on
// from what it kept.
#pragma once

#include "dialect.h"
#include "walk.cuh"

namespace bnext::cuda {

// Clusters are adjacent blocks: the channel is the cluster, the split is the block's rank.
__device__ __forceinline__ Share cluster_share(const Pass& pass) {
  const int64_t tile = blockIdx.x / pass.splits;
  return Share(tile, blockIdx.x - tile * pass.splits);
}

// The merge, in rank order, of what thread 0 of each block of the cluster has; in every thread. The
// caller ends with leave_cluster().
template <class State>
__device__ __forceinline__ State merge_cluster(const State& mine, const Pass& pass) {
  __shared__ State block, whole;
  if (pass.splits == 1) {
    if (threadIdx.x == 0) whole = mine;
  } else {
    if (threadIdx.x == 0) block = mine;
    cluster_sync();
    if (threadIdx.x == 0) {
      State total = {};
      for (unsigned rank = 0; rank < static_cast<unsigned>(pass.splits); ++rank) {
        total.merge(*map_shared(&block, rank));
      }
      whole = total;
    }
  }
  __syncthreads();
  return whole;
}

// A block's shared memory must outlive its siblings' reads.
__device__ __forceinline__ void leave_cluster(const Pass& pass) {
  if (pass.splits > 1) cluster_sync();
}

}  // namespace bnext::cuda
