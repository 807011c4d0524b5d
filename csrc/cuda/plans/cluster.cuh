// How the blocks of a thread-block cluster, which share a tile, exchange their partial results.
#pragma once

#include "block.cuh"

namespace bnext::cuda {

// A cluster is adjacent blocks: the tile is the cluster's number, the split is the block's rank.
__device__ __forceinline__ WorkTile cluster_work_tile(const Partition& partition) {
  const uint32_t splits = static_cast<uint32_t>(partition.splits), tile = blockIdx.x / splits;
  return WorkTile(tile, blockIdx.x - tile * splits);
}

// The clusters that come to multiprocessors where others have begun wait for a while, so that later on one of the two
// loads while the other stores or exchanges.
__device__ __forceinline__ void stagger_start(const Partition& partition, const WorkTile& work) {
  if (partition.stagger_cycles == 0) return;
  if (work.tile >= partition.first_wave / 2 && work.tile < partition.first_wave) {
    wait_for_cycles(partition.stagger_cycles);
  }
}

// While the blocks of a cluster exchange, memory would have nothing to do. They bring into the L2 cache what is needed
// next: what the elementwise pass alone reads, or else what the cluster that will take their place begins with.
// walk_of(WorkTile) is the thread's walk through a tile.
template <class Op, class WalkOf>
__device__ __forceinline__ void prefetch_next(const typename Op::Params& p, const Partition& partition,
                                              const WorkTile& work, const WalkOf& walk_of) {
  if (partition.prefetch_vecs == 0) return;
  const auto prefetch = [&](const WorkTile& of, const void* tensor) {
    auto walk = walk_of(of);
    const int32_t vecs = min(partition.prefetch_vecs, walk.remaining);
#pragma unroll 1
    for (int32_t i = 0; i < vecs; ++i) {
      Chunk<1, true> chunk;
      walk.next(chunk, 0);
      prefetch_l2(vec_at<Op::N>(static_cast<const typename Op::T*>(tensor), chunk.vec[0]));
    }
  };
  const WorkTile next(work.tile + partition.first_wave, work.split);
  if (const void* extra = Op::extra_input(p)) {
    prefetch(work, extra);
  } else if (partition.first_wave > 0 && next.tile < partition.tiles) {
#pragma unroll
    for (int i = 0; i < Op::kInputs; ++i) prefetch(next, Op::input(p, i));
  }
}

// The merge of what each block of the cluster has there in its shared memory, from rank 0 on: every block merges all
// ranks by itself, which gives the same bits everywhere, and takes no second exchange.
template <class State>
__device__ __forceinline__ State merge_ranks(State* state, unsigned ranks) {
  State whole = {};
#pragma unroll 1
  for (unsigned rank = 0; rank < ranks; rank += kMaxCluster) {
    State all[kMaxCluster];
#pragma unroll
    for (unsigned k = 0; k < kMaxCluster; ++k) all[k] = rank + k < ranks ? *map_shared(state, rank + k) : State{};
    whole.merge(merge_all(all));
  }
  return whole;
}

// The merge of what all threads of the cluster hold of one channel; in every thread. The ranks' states are fetched by a
// thread each. The caller goes on to leave_cluster().
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
  return merge_strided<merge_batch(sizeof(State), false)>(ranks, 0, static_cast<int>(size), 1, 1);
}

// The merges of what all threads of the cluster hold of a tile of columns. The caller goes on to leave_cluster().
template <class Op>
class ClusterColumns {
  using State = typename Op::State;

 public:
  // Merges what the block's threads hold, and waits until all blocks of the cluster have. All threads must call.
  __device__ __forceinline__ ClusterColumns(const Partition& partition, const typename Op::ColumnReducer& mine,
                                            const ColumnPlace<Op::N>& place, void* memory)
      : states_(reinterpret_cast<State*>(dynamic_shared() + partition.resident_bytes)),
        ranks_(static_cast<unsigned>(partition.splits)) {
    const int width = static_cast<int>(partition.tile_width());
    merge_columns<Op>(mine, place, partition.columns.row_threads, memory, [&](int column, const State& merged) {
      if (column < width) states_[column] = merged;
    });
    if (ranks_ > 1) cluster_sync();
    else __syncthreads();
  }

  // Of a column of the tile.
  __device__ __forceinline__ State merge(int column) const {
    return ranks_ > 1 ? merge_ranks(&states_[column], ranks_) : states_[column];
  }

 private:
  State* states_;
  unsigned ranks_;
};

// A block's shared memory must outlive its siblings' reads, and stay unchanged until then.
__device__ __forceinline__ void leave_cluster(const Partition& partition) {
  if (partition.splits > 1) cluster_sync();
}

}  // namespace bnext::cuda
