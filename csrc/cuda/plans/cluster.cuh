// How the blocks of a thread-block cluster, which share a tile, exchange their partial results.
#pragma once

#include "../device/reduce.cuh"

namespace bnext::cuda {

// A cluster is adjacent blocks: the tile is the cluster's number, the split is the block's rank.
__device__ __forceinline__ WorkTile cluster_work_tile(const Partition& partition) {
  const uint32_t splits = static_cast<uint32_t>(partition.splits), tile = blockIdx.x / splits;
  return WorkTile(tile, blockIdx.x - tile * splits);
}

// The clusters that come to multiprocessors where others have begun wait for a while, so that later on one of the two
// loads while the other stores or exchanges.
__device__ __forceinline__ void wait_for_turn(const Partition& partition, const WorkTile& work) {
  if (partition.late_ns == 0) return;
  if (work.tile >= partition.first_wave / 2 && work.tile < partition.first_wave) __nanosleep(partition.late_ns);
}

// The merge of what all threads of the cluster hold of one channel; in every thread. Every block merges all ranks by
// itself: the same bits everywhere, and no second exchange. The caller goes on to leave_cluster().
template <class State>
__device__ __forceinline__ State merge_cluster(const State& mine, const Partition& partition, void* memory) {
  __shared__ State block, ranks[kLargeCluster];
  const unsigned size = static_cast<unsigned>(partition.splits);
  merge_states(mine, 1, memory, [&](int, const State& whole) { (size == 1 ? ranks[0] : block) = whole; });
  if (size > 1) {
    cluster_sync();
    if (threadIdx.x < size) ranks[threadIdx.x] = *map_shared(&block, threadIdx.x);
  }
  __syncthreads();
  return merge_strided<kBatch<State>>(ranks, 0, static_cast<int>(size), 1, 1);
}

// A block's shared memory must outlive its siblings' reads, and stay unchanged until then.
__device__ __forceinline__ void leave_cluster(const Partition& partition) {
  if (partition.splits > 1) cluster_sync();
}

}  // namespace bnext::cuda
