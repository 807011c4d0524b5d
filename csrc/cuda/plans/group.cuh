// How the blocks of a group, which are on the device together and share tiles of columns, exchange their partial
// results.
#pragma once

#include "../device/flagged.cuh"
#include "block.cuh"

namespace bnext::cuda {

// Through memory, in flagged numbers. A tile's columns are shared out among the blocks of the group: each block leaves
// its state of each column there for the one that merges it, which leaves what follows for everybody. Flags have the
// group's number and how many tiles it has gone through, in all launches so far, so that none comes twice. A block has
// its next state of a column ready only when it has seen what all columns gave, and so all states have been read.
template <class Op>
class GroupColumns {
  using State = typename Op::State;
  using Summary = typename Op::Summary;

 public:
  __device__ __forceinline__ GroupColumns(const Partition& partition, const Scratch& scratch, uint32_t group)
      : group_(group),
        splits_(static_cast<int>(partition.splits)),
        width_(static_cast<int>(partition.tile_width())),
        header_(static_cast<FlaggedHeader*>(scratch.flagged)) {
    if (partition.clustered) return;
    const uint32_t columns = static_cast<uint32_t>(partition.groups) * width_, first = group * width_;
    auto* const states = reinterpret_cast<Flagged<State>*>(header_ + 1);
    states_ = states + first * splits_;
    summaries_ = reinterpret_cast<Flagged<Summary>*>(states + columns * splits_) + first;
    if (threadIdx.x == 0) tiles_ = load_relaxed(&header_->tiles[group]);
  }

  // Merges what the blocks of the group hold of their next tile, writes what its reduction gives, and shares what
  // follows from it. All threads must call.
  __device__ __forceinline__ void merge(const typename Op::Params& p, const Partition& partition, const WorkTile& work,
                                        const ColumnPlace<Op::N>& place, const typename Op::ColumnReducer& mine,
                                        void* memory, const CoefficientCache<Op>& cache) {
    const int64_t first = work.tile * width_;
    const int columns = static_cast<int>(min(int64_t{width_}, p.shape.c - first));
    __shared__ uint64_t flag;
    if (threadIdx.x == 0) flag = ++tiles_ << 16 | group_;
    merge_columns<Op>(mine, place, partition.columns.row_threads, memory, [&](int column, const State& merged) {
      if (column < columns) states_[column * splits_ + work.split].store(merged, flag);
    });
    merge_mine(p, first, columns, static_cast<int>(work.split), flag, memory);
    __syncthreads();  // nobody merges in `memory` any more
    cache.fill(partition, p.shape, work, [&](const ColumnChannel& at) {
      const typename Op::ChannelParams params = Op::channel_params(p, at.channel);
      return Op::coefficients(p, params, summaries_[at.channel - first].wait(flag));
    });
  }

 private:
  // Merges the columns that are the block's, as many at a time as a warp has lanes; the states of each are shared out
  // among the rows of threads.
  __device__ __forceinline__ void merge_mine(const typename Op::Params& p, int64_t first, int columns, int split,
                                             uint64_t flag, void* memory) const {
    const int each = static_cast<int>(static_cast<uint32_t>(width_ + splits_ - 1) / static_cast<uint32_t>(splits_));
    const int end = min(columns, (split + 1) * each);
    int shift = 0;  // of threads to a row
    while ((1 << shift) < min(each, kWarp)) ++shift;
    const int row_threads = 1 << shift, lane = static_cast<int>(threadIdx.x) & (row_threads - 1);
    const int rows = static_cast<int>(blockDim.x) >> shift, row = static_cast<int>(threadIdx.x) >> shift;
#pragma unroll 1
    for (int begin = split * each; begin < end; begin += row_threads) {
      const int column = begin + lane;
      State total = {};
      typename Op::Operands operands = {};
      if (column < end) {
        if (row == 0) operands = Op::operands(p, first + column);
#pragma unroll 1
        for (int i = row; i < splits_; i += rows) {
          const State state = states_[column * splits_ + i].wait(flag);
          if (i == row) total = state;
          else total.merge(state);
        }
      }
      merge_states(total, row_threads, memory, [&](int i, const State& whole) {  // i is the thread's lane
        if (begin + i >= end) return;
        // Everybody waits for the summary; the rest has time.
        summaries_[begin + i].store(Op::summary(p, whole), flag);
        Op::finish(p, first + begin + i, whole, operands);
        // All blocks of the group have read that before they left a state.
        if (begin + i == 0) store_relaxed(&header_->tiles[group_], flag >> 16);
      });
    }
  }

  uint32_t group_;
  int splits_, width_;
  FlaggedHeader* header_;
  Flagged<State>* states_;       // of the group: [column][block]
  Flagged<Summary>* summaries_;  // [column]
  uint64_t tiles_;               // in thread 0: that the group has gone through
};

}  // namespace bnext::cuda
