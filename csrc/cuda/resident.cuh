// What the resident plan's kernels share: how blocks come by their tiles, and how those that own a channel
// (planar) or a tile of channels (interleaved) exchange their partial results, between reading their shares into
// shared memory and going on from there.
#pragma once

#include "reduce.cuh"

namespace bnext::cuda {

// The merge, in rank order, of what thread 0 of each block of the cluster has; in every thread. The
// caller goes on to leave_cluster().
template <class State>
__device__ __forceinline__ State merge_cluster(const State& mine, const Pass& pass) {
  __shared__ State block, ranks[kLargeCluster];
  const unsigned size = static_cast<unsigned>(pass.splits);
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
__device__ __forceinline__ void leave_cluster(const Pass& pass) {
  if (pass.splits > 1) cluster_sync();
}

// Clusters are adjacent blocks: the tile is the cluster, the split is the block's rank.
__device__ __forceinline__ Share cluster_share(const Pass& pass) {
  const int64_t tile = blockIdx.x / pass.splits;
  return Share(tile, blockIdx.x - tile * pass.splits);
}

// Planes side by side have up to so many channels to a tile: as many as a unit has elements.
constexpr int kMaxTileChannels = 8;

// One part of such a tile.
__device__ __forceinline__ Share part_of(const Pass& pass, const Share& share, int32_t part) {
  return Share(share.tile * pass.parts + part, share.split);
}

// Calls body(part, Share, ColumnPlace) on each part of the tile, in the threads that have a place in it.
template <int UNIT, class Body>
__device__ __forceinline__ void for_parts(const Pass& pass, const Share& share, Body&& body) {
  for (int32_t part = 0; part < pass.parts; ++part) {
    const Share mine = part_of(pass, share, part);
    const ColumnPlace<UNIT> place(pass, mine);
    if (place.active) body(part, mine, place);
  }
}

// The states of the channels of a cluster's tile. take(part, Share, ColumnPlace, state) gives those of a part's
// columns, in the threads of row 0; finish(k, state) gets that of the tile's channel k, in one thread of each block,
// and what it leaves in shared memory is there for all threads. The caller goes on to leave_cluster().
template <class State, int UNIT, class Take, class Finish>
__device__ __forceinline__ void merge_planes(const Pass& pass, const Shape& shape, const Share& share, Take&& take,
                                             Finish&& finish) {
  const int channels = pass.tile_channels, rows = blockDim.x / channels;
  const int row = threadIdx.x / channels, channel = threadIdx.x - row * channels;
  State total[1] = {};
  for (int32_t part = 0; part < pass.parts; ++part) {
    const Share mine = part_of(pass, share, part);
    const ColumnPlace<UNIT> place(pass, mine);
    State state[UNIT];
    take(part, mine, place, state);
    State* columns = state_slots<UNIT, State>();
    if (place.active && place.row == 0) {
#pragma unroll
      for (int e = 0; e < UNIT; ++e) columns[place.lane * UNIT + e] = state[e];
    }
    __syncthreads();
    // The channel's columns in this part, among as many threads as there are for a channel.
    const int width = pass.lanes * UNIT, plane = static_cast<int>(shape.s), origin = part * width;
    if (row < rows) {
      const int past = min(plane * (channel + 1), origin + width);
      for (int i = max(plane * channel, origin) + row; i < past; i += rows) total[0].merge(columns[i - origin]);
    }
    __syncthreads();
  }
  reduce_rows(total, channel, row, channels, rows);

  __shared__ State block[kMaxTileChannels];
  if (row == 0) block[channel] = total[0];
  if (pass.splits > 1) {
    cluster_sync();
    if (row == 0) {
      total[0] = *map_shared(&block[channel], 0);
      for (unsigned rank = 1; rank < static_cast<unsigned>(pass.splits); ++rank) {
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
__device__ __forceinline__ void for_tiles(const Pass& pass, Take&& take, Give&& give) {
  const int64_t group = blockIdx.x / pass.splits, split = blockIdx.x - group * pass.splits;
  int64_t next = group;
  int32_t filling = 0, emptying = 0;
  for (int64_t tile = group; tile < pass.tiles; tile += pass.groups) {
    for (; next < pass.tiles && next < tile + pass.stages * pass.groups; next += pass.groups) {
      take(Share(next, split), filling);
      filling = pass.stages - 1 - filling;
    }
    give(Share(tile, split), emptying);
    emptying = pass.stages - 1 - emptying;
  }
}

__device__ __forceinline__ Turnstile turnstile_of(const Pass& pass, const Scratch& scratch, const Share& share) {
  return Turnstile(&scratch.counters[share.tile], static_cast<uint32_t>(pass.splits));
}

// The last block of a tile merges and finishes its channels, for all to see that pass the tile's turnstile.
template <int WIDTH, class State, class Finish>
__device__ __forceinline__ void merge_tile(const State (&state)[WIDTH], const ColumnPlace<WIDTH>& place,
                                           int64_t channels, const Pass& pass, const Scratch& scratch,
                                           const Share& share, Finish&& finish) {
  const Turnstile turnstile = turnstile_of(pass, scratch, share);
  auto arrive = [&] { return turnstile.arrive(); };
  const bool holds = place.active && place.row == 0;
  if (merge_blocks(state, holds, place.col, channels, pass, scratch, share, arrive, finish)) turnstile.open();
}

}  // namespace bnext::cuda
