// Plan `resident` of interleaved layouts: one launch that reads the inputs from memory once, or most of them.
//
// A tile of channels, 64 to 256 bytes wide, belongs to some blocks, each with a range of rows. Where it fits a cluster,
// these exchange their partial results through its shared memory. Else they are a group, all of whose blocks are on the
// device together, and take several tiles in turn: the last to have read their part of a tile merge the partial
// results, through memory, and tell all what a channel's reduction gives. 2e bytes an element forward, 3e backward; and
// where the device has not room for a tile, what it does not hold is read again, as far as it can be from the L2 cache.
//
// (To load the next tile before that took more time than it saved, of 884 plans that an H100 ran: tiles are then half
// as large, and rows of less than 128 bytes get a part of the memory's bandwidth.)
#include "../device/flagged.cuh"
#include "block.cuh"
#include "cluster.cuh"
#include "launch_plan.cuh"

namespace bnext::cuda {
namespace {

template <class Op>
using CoefficientCache = ColumnCache<Op::N, typename Op::Coefficients>;

// Merges what the cluster's blocks hold of a tile, and shares what follows from it; a thread to each channel. Of each
// channel one block writes what its reduction gives.
template <class Op>
__device__ __forceinline__ void finish_in_cluster(const typename Op::Params& p, const Partition& partition,
                                                  const WorkTile& work, const ColumnPlace<Op::N>& place,
                                                  const typename Op::ColumnReducer& mine, void* memory,
                                                  const CoefficientCache<Op>& cache) {
  const int width = static_cast<int>(partition.tile_width()), column = static_cast<int>(threadIdx.x);
  const int64_t channel = work.tile * width + column;
  const bool has = column < width && channel < p.shape.c;
  const bool finishes = has && column % static_cast<int>(partition.splits) == static_cast<int>(work.split);
  // While the other blocks are still to come.
  typename Op::ChannelParams params = {};
  typename Op::Operands operands = {};
  if (has) params = Op::channel_params(p, channel);
  if (finishes) operands = Op::operands(p, channel);
  const ClusterColumns<Op> columns(partition, mine, place, memory);
  typename Op::Coefficients coefficients = {};
  if (has) {
    const auto whole = columns.merge(column);
    coefficients = Op::coefficients(p, params, Op::summary(p, whole));
    if (finishes) Op::finish(p, channel, whole, operands);
  }
  cache.fill(partition, p.shape, work, [&](const ColumnChannel&) { return coefficients; });
}

// What the reduction of a tile gave, a summary to each channel, on its way from the blocks of a group that finish the
// channels to all of them. Flags are the numbers of the group's tiles, from 1 on: a block has a slot's next value ready
// only when all have come to that tile, and so have read the one before.
template <class Op>
class GroupSummaries {
  using Slot = Flagged<typename Op::Summary>;

 public:
  __device__ __forceinline__ GroupSummaries(const Partition& partition, const Scratch& scratch, uint32_t group)
      : all_(reinterpret_cast<Slot*>(scratch.counters + summaries_at(partition.tiles))),
        readers_(scratch.counters + readers_at(partition.tiles)),
        width_(static_cast<uint32_t>(partition.tile_width())),
        slots_(static_cast<uint32_t>(partition.groups) * width_),
        mine_(all_ + group * width_) {}

  __device__ __forceinline__ void next_tile() { ++flag_; }
  __device__ __forceinline__ void store(int64_t column, const typename Op::Summary& summary) const {
    mine_[column].store(summary, flag_);
  }
  __device__ __forceinline__ typename Op::Summary wait(int64_t column) const { return mine_[column].wait(flag_); }

  // Once the block's threads have read its last tile's, which it counts.
  __device__ __forceinline__ void leave() {
    if (threadIdx.x == 0) last_to_leave_ = increment_acq_rel(readers_, gridDim.x - 1) == gridDim.x - 1;
  }
  // Leaves all slots as the next launch needs them, in the last block of the grid. All threads of each must call.
  __device__ __forceinline__ void clear() const {
    if (!__syncthreads_or(last_to_leave_)) return;
    for (uint32_t i = threadIdx.x; i < slots_; i += blockDim.x) all_[i].clear();
  }

 private:
  Slot* all_;
  uint32_t* readers_;
  uint32_t width_, slots_;
  Slot* mine_;  // those of the group
  uint32_t flag_ = 0;
  bool last_to_leave_ = false;  // in thread 0
};

// Tells the group before it writes to memory what a channel's reduction gives.
template <class Op>
struct FinishInGroup : FinishChannel<Op> {
  const GroupSummaries<Op>& summaries;
  int64_t first;  // channel of the tile

  __device__ __forceinline__ void operator()(int64_t channel, const typename Op::State& whole,
                                             const typename Op::Operands& operands) const {
    summaries.store(channel - first, Op::summary(this->p, whole));
    Op::finish(this->p, channel, whole, operands);
  }
};

// The same for blocks of a group.
template <class Op>
__device__ __forceinline__ void finish_in_group(const typename Op::Params& p, const Partition& partition,
                                                const Scratch& scratch, const GroupSummaries<Op>& summaries,
                                                const WorkTile& work, const ColumnPlace<Op::N>& place,
                                                const typename Op::ColumnReducer& mine, void* memory,
                                                const CoefficientCache<Op>& cache) {
  using State = typename Op::State;
  const int64_t first = work.tile * partition.tile_width();
  merge_blocks<Op::N, State>(
      p.shape.c, partition, scratch, work, memory,
      [&](const auto& each) { merge_columns<Op>(mine, place, partition.columns.row_threads, memory, each); },
      FinishInGroup<Op>{{p}, summaries, first});
  __syncthreads();  // nobody merges in `memory` any more
  cache.fill(partition, p.shape, work, [&](const ColumnChannel& at) {
    const typename Op::ChannelParams params = Op::channel_params(p, at.channel);
    return Op::coefficients(p, params, summaries.wait(at.channel - first));
  });
}

template <class Op>
__global__ void __launch_bounds__(kMaxThreads, resident_blocks_per_sm(sizeof(typename Op::T), Op::kGeneral, true))
    resident_interleaved_kernel(const BNEXT_GRID_CONSTANT typename Op::Params p,
                                const BNEXT_GRID_CONSTANT Partition partition, const Scratch scratch) {
  constexpr int N = Op::N, kChunk = resident_chunk<Op, true, false>();
  void* const memory = shared_memory<kColumnBytes<Op>>();
  const SharedTile<Op, kChunk, /*PARTIAL=*/true> shared_tile(partition);
  // The blocks of a cluster or group are adjacent. The two on a multiprocessor, which start one after the other, are
  // then mostly of different groups, and do not wait at the same time.
  const uint32_t splits = static_cast<uint32_t>(partition.splits), group = blockIdx.x / splits;
  GroupSummaries<Op> summaries(partition, scratch, group);
#pragma unroll 1
  for (int64_t tile = group; tile < partition.tiles; tile += partition.groups) {
    const WorkTile work(tile, blockIdx.x - group * splits);
    const ColumnPlace<N> place(partition, work);
    if (work.split == 0) prefetch_operands<Op>(p, partition, work);
    typename Op::Centre centres[N] = {};
    load_centres<Op>(centres, p, partition, work, place, memory);
    const auto first = load_shift_row<Op>(p, partition, work, place);
    const ColumnWalk<N> walk(partition, p.shape.numel(), work, place);
    const auto mine = reduce_columns<Op, kChunk>(p, walk, shared_tile.template fill<false>(p, walk), centres, first);

    const CoefficientCache<Op> cache(memory, partition);
    if (partition.clustered) {
      finish_in_cluster<Op>(p, partition, work, place, mine, memory, cache);
    } else {
      summaries.next_tile();
      finish_in_group<Op>(p, partition, scratch, summaries, work, place, mine, memory, cache);
      if (tile + partition.groups >= partition.tiles) summaries.leave();
    }
    if (!place.active) continue;
    typename Op::Coefficients coefficients[N];
    cache.load(coefficients, place);
    apply_columns<Op, false, kChunk>(p, partition, work, place, shared_tile.replay(p), coefficients);
  }
  Op::at_kernel_end(p, scratch, partition.clustered ? 0 : partition.tiles);
  if (partition.clustered) leave_cluster(partition);
  else summaries.clear();
}

}  // namespace

template <class Params>
cudaError_t launch_resident_interleaved(const Params& p, const Partition& partition, const Scratch& scratch,
                                        cudaStream_t stream) {
  return with_resident_op(p, [&](auto op) {
    return launch_partition(resident_interleaved_kernel<decltype(op)>, partition, stream, p, partition, scratch);
  });
}

BNEXT_INSTANTIATE(launch_resident_interleaved, const Partition&, const Scratch&, cudaStream_t)

}  // namespace bnext::cuda
