// What the resident plan's kernels share: how blocks come by their tiles, and how those that own a channel
// (planar) or a tile of channels (interleaved) exchange their partial results, between reading their shares into
// shared memory and going on from there.
#pragma once

#include "reduce.cuh"

namespace bnext::cuda {

// The merge, in rank order, of what thread 0 of each block of the cluster has; in every thread. The
// caller goes on to leave_cluster().
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
  for (unsigned rank = 1; rank < size; ++rank) total.merge(ranks[rank]);
  return total;
}

// A block's shared memory must outlive its siblings' reads, and be left alone until then.
__device__ __forceinline__ void leave_cluster(const Partition& partition) {
  if (partition.splits > 1) cluster_sync();
}

// Clusters are adjacent blocks: the tile is the cluster, the split is the block's rank.
__device__ __forceinline__ WorkTile cluster_work_tile(const Partition& partition) {
  const int64_t tile = blockIdx.x / partition.splits;
  return WorkTile(tile, blockIdx.x - tile * partition.splits);
}

// Planes side by side have up to so many channels to a tile: as many as a vector has elements.
constexpr int kMaxTileChannels = 8;

// One part of such a tile.
__device__ __forceinline__ WorkTile pack_of(const Partition& partition, const WorkTile& work, int32_t pack) {
  return WorkTile(work.tile * partition.packs + pack, work.split);
}

// Calls body(part, Share, ColumnPlace) on each part of the tile, in the threads that have a place in it.
template <int N, class Body>
__device__ __forceinline__ void for_packs(const Partition& partition, const WorkTile& work, Body&& body) {
  for (int32_t pack = 0; pack < partition.packs; ++pack) {
    const WorkTile mine = pack_of(partition, work, pack);
    const ColumnPlace<N> place(partition, mine);
    if (place.active) body(pack, mine, place);
  }
}

// The states of the channels of a cluster's tile. take(part, Share, ColumnPlace, state) gives those of a part's
// columns, in the threads of row 0; finish(k, state) gets that of the tile's channel k, in one thread of each block,
// and what it leaves in shared memory is there for all threads. The caller goes on to leave_cluster().
template <class State, int N, class Take, class Finish>
__device__ __forceinline__ void merge_packed(const Partition& partition, const Shape& shape, const WorkTile& work,
                                             Take&& take, Finish&& finish) {
  const int channels = partition.tile_channels, rows = blockDim.x / channels;
  const int row = threadIdx.x / channels, channel = threadIdx.x - row * channels;
  State total[1] = {};
  for (int32_t pack = 0; pack < partition.packs; ++pack) {
    const WorkTile mine = pack_of(partition, work, pack);
    const ColumnPlace<N> place(partition, mine);
    State state[N];
    take(pack, mine, place, state);
    State* columns = state_slots<N, State>();
    if (place.active && place.row == 0) {
#pragma unroll
      for (int e = 0; e < N; ++e) columns[place.vec_col * N + e] = state[e];
    }
    __syncthreads();
    // The channel's columns in this part, among as many threads as there are for a channel.
    const int width = partition.tile_vecs * N, plane = static_cast<int>(shape.s), origin = pack * width;
    if (row < rows) {
      const int past = min(plane * (channel + 1), origin + width);
      for (int i = max(plane * channel, origin) + row; i < past; i += rows) total[0].merge(columns[i - origin]);
    }
    __syncthreads();
  }
  reduce_rows(total, channel, row, channels, rows);

  __shared__ State block[kMaxTileChannels];
  if (row == 0) block[channel] = total[0];
  if (partition.splits > 1) {
    cluster_sync();
    if (row == 0) {
      total[0] = *map_shared(&block[channel], 0);
      for (unsigned rank = 1; rank < static_cast<unsigned>(partition.splits); ++rank) {
        total[0].merge(*map_shared(&block[channel], rank));
      }
    }
  }
  if (row == 0) finish(channel, total[0]);
  __syncthreads();
}

// Calls take(Share, stage) and later give(Share, stage) for each tile of the block's group, in order, with up to
// `stages` tiles taken and not yet given: a group's tile is merged by one of its blocks while the others load the next.
// A group's blocks are adjacent, so that the two on a multiprocessor, which get there one after the other, are
// mostly of different groups, and do not wait at the same time.
template <class Take, class Give>
__device__ __forceinline__ void pipeline_tiles(const Partition& partition, Take&& take, Give&& give) {
  const int64_t group = blockIdx.x / partition.splits, split = blockIdx.x - group * partition.splits;
  int64_t next = group;
  int32_t filling = 0, emptying = 0;
  for (int64_t tile = group; tile < partition.tiles; tile += partition.groups) {
    for (; next < partition.tiles && next < tile + partition.buffers * partition.groups; next += partition.groups) {
      take(WorkTile(next, split), filling);
      filling = partition.buffers - 1 - filling;
    }
    give(WorkTile(tile, split), emptying);
    emptying = partition.buffers - 1 - emptying;
  }
}

__device__ __forceinline__ SplitBarrier split_barrier_of(const Partition& partition, const Scratch& scratch,
                                                         const WorkTile& work) {
  return SplitBarrier(&scratch.counters[work.tile], static_cast<uint32_t>(partition.splits));
}

// The last block of a tile merges and finishes its channels, for all to see that pass the tile's split barrier.
template <int WIDTH, class State, class Finish>
__device__ __forceinline__ void merge_tile(const State (&state)[WIDTH], const ColumnPlace<WIDTH>& place,
                                           int64_t channels, const Partition& partition, const Scratch& scratch,
                                           const WorkTile& work, Finish&& finish) {
  const SplitBarrier barrier = split_barrier_of(partition, scratch, work);
  auto arrive = [&] { return barrier.arrive_is_last(); };
  const bool holds = place.active && place.row == 0;
  if (merge_blocks(state, holds, place.col, channels, partition, scratch, work, arrive, finish)) barrier.release();
}

}  // namespace bnext::cuda
