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
    const int64_t first = work.tile * width_, past = min(first + width_, p.shape.c);
    __shared__ uint64_t flag;
    if (threadIdx.x == 0) flag = ++tiles_ << 16 | group_;
    merge_columns<Op>(mine, place, partition.columns.row_threads, memory, [&](int column, const State& merged) {
      if (first + column < past) states_[column * splits_ + work.split].store(merged, flag);
    });

    const int share = static_cast<int>(static_cast<uint32_t>(width_ + splits_ - 1) / static_cast<uint32_t>(splits_));
    const int64_t begin = first + work.split * share;
    const auto gather = [&](int64_t channel, int row, int rows) {
      State total = {};
#pragma unroll 1
      for (int i = row; i < splits_; i += rows) {
        const State state = states_[(channel - first) * splits_ + i].wait(flag);
        if (i == row) total = state;
        else total.merge(state);
      }
      return total;
    };
    merge_channels</*LONG=*/false>(begin, min(begin + share, past), memory, gather, Finish{{p}, *this, first, flag});
    __syncthreads();  // nobody merges in `memory` any more
    cache.fill(partition, p.shape, work, [&](const ColumnChannel& at) {
      const typename Op::ChannelParams params = Op::channel_params(p, at.channel);
      return Op::coefficients(p, params, summaries_[at.channel - first].wait(flag));
    });
  }

 private:
  // Tells the group before it writes to memory what a channel's reduction gives.
  struct Finish : FinishChannel<Op> {
    const GroupColumns& columns;
    int64_t first;  // channel of the tile
    const uint64_t& flag;

    __device__ __forceinline__ void operator()(int64_t channel, const State& whole,
                                               const typename Op::Operands& operands) const {
      columns.summaries_[channel - first].store(Op::summary(this->p, whole), flag);
      FinishChannel<Op>::operator()(channel, whole, operands);
      // All blocks of the group have read that before they left a state.
      if (channel == first) store_relaxed(&columns.header_->tiles[columns.group_], flag >> 16);
    }
  };

  uint32_t group_;
  int splits_, width_;
  FlaggedHeader* header_;
  Flagged<State>* states_;       // of the group: [column][block]
  Flagged<Summary>* summaries_;  // [column]
  uint64_t tiles_;               // in thread 0: that the group has gone through
};

}  // namespace bnext::cuda
