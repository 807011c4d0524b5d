// What the resident plan's kernels share: how the blocks that own a channel (planar) or a tile of
// channels (interleaved) exchange their partial results, between reading their shares into shared
// memory and going on from there.
#pragma once

#include "reduce.cuh"

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

// The merge of the tile's partial results, in every block that shares it: of each of its columns, into
// `whole`, in shared memory. The blocks are all on the device together.
template <int WIDTH, class State>
__device__ __forceinline__ void merge_tile(const State (&state)[WIDTH], const ColumnPlace<WIDTH>& place,
                                           int64_t channels, const Pass& pass, const Scratch& scratch,
                                           const Share& share, State* whole) {
  const bool holds = place.active && place.row == 0;
  if (pass.splits == 1) {
    if (holds) {
#pragma unroll
      for (int e = 0; e < WIDTH; ++e) whole[place.lane * WIDTH + e] = state[e];
    }
  } else {
    const Partials<State> partials(pass, scratch);
    if (holds) partials.put(state, place.col, share);
    meet(&scratch.counters[share.tile], static_cast<uint32_t>(pass.splits));
    const int64_t first = share.tile * partials.width;
    partials.merge(first, min(channels, first + partials.width), channels, 1,
                   [&](int64_t channel, const State& total) { whole[channel - first] = total; });
  }
  __syncthreads();
}

// Columns of a resident tile: 64 bytes, or one unit.
template <class T, int UNIT> constexpr int kResidentWidth = UNIT * sizeof(T) >= 64 ? UNIT : 64 / sizeof(T);

}  // namespace bnext::cuda
