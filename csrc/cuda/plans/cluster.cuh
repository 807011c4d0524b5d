// How the blocks of a thread-block cluster, which share a tile, exchange their partial results.
#pragma once

#include "../device/tile_iterator.cuh"

namespace bnext::cuda {

// A cluster is adjacent blocks: the tile is the cluster's number, the split is the block's rank.
__device__ __forceinline__ WorkTile cluster_work_tile(const Partition& partition) {
  const uint32_t splits = static_cast<uint32_t>(partition.splits), tile = blockIdx.x / splits;
  return WorkTile(tile, blockIdx.x - tile * splits);
}

// The merge, in rank order, of what thread 0 of each block of the cluster holds; in every thread. The caller goes on to
// leave_cluster().
template <class State>
__device__ __forceinline__ State merge_cluster(const State& mine, const Partition& partition) {
  __shared__ State block, ranks[kLargeCluster];
  const unsigned size = static_cast<unsigned>(partition.splits);
  if (size == 1) {
    if (threadIdx.x == 0) ranks[0] = mine;
  } else {
    if (threadIdx.x == 0) block = mine;
    cluster_sync();
    if (threadIdx.x < size) ranks[threadIdx.x] = *map_shared(&block, threadIdx.x);
  }
  __syncthreads();
  State total = ranks[0];
#pragma unroll 1
  for (unsigned rank = 1; rank < size; ++rank) total.merge(ranks[rank]);
  return total;
}

// A block's shared memory must outlive its siblings' reads, and stay unchanged until then.
__device__ __forceinline__ void leave_cluster(const Partition& partition) {
  if (partition.splits > 1) cluster_sync();
}

}  // namespace bnext::cuda
