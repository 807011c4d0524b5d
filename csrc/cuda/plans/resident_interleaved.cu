// Plan `resident` of interleaved layouts: one launch that reads the inputs from memory once, or most of them.
//
// A tile of channels, 64 to 256 bytes wide, belongs to some blocks, each with a range of rows. Where it fits a cluster,
// these exchange their partial results through its shared memory. Else they are a group, all of whose blocks are on the
// device together, and take several tiles in turn: the last to have read their part of a tile merge the partial
// results, through memory, and write what a channel's reduction gives; the others wait for that before the elementwise
// pass. 2e bytes an element forward, 3e backward; and where the device has not room for a tile, what it does not hold
// is read again, as far as it can be from the L2 cache.
//
// (To load the next tile before that took more time than it saved, of 884 plans that an H100 ran: tiles are then half
// as large, and rows of less than 128 bytes get a part of the memory's bandwidth.)
#include "block.cuh"
#include "cluster.cuh"
#include "launch_plan.cuh"

namespace bnext::cuda {
namespace {

template <class Op>
using CoefficientShare = ColumnShare<Op::N, typename Op::Coefficients>;

// Merges what the cluster's blocks hold of a tile, and shares what follows from it; a thread to each channel. Of each
// channel one block writes what its reduction gives.
template <class Op>
__device__ __forceinline__ void share_in_cluster(const typename Op::Params& p, const Partition& partition,
                                                 const WorkTile& work, const ColumnPlace<Op::N>& place,
                                                 const typename Op::ColumnReducer& mine, void* memory,
                                                 const CoefficientShare<Op>& share) {
  const int width = static_cast<int>(partition.tile_width()), column = static_cast<int>(threadIdx.x);
  const int64_t channel = work.tile * width + column;
  const bool has = column < width && channel < p.shape.c;
  const bool finishes = has && column % static_cast<int>(partition.splits) == static_cast<int>(work.split);
  // While the other blocks are still to come.
  typename Op::Known known = {};
  typename Op::Operands operands = {};
  if (has) known = Op::known(p, channel);
  if (finishes) operands = Op::operands(p, channel);
  const ClusterColumns<Op> columns(partition, mine, place, memory);
  typename Op::Coefficients coefficients = {};
  if (has) {
    const auto whole = columns.merge(column);
    coefficients = Op::coefficients(p, known, Op::summary(p, whole));
    if (finishes) Op::finish(p, channel, whole, operands);
  }
  share.fill(partition, p.shape, work, [&](const ColumnChannel&) { return coefficients; });
}

// The same for blocks of a group.
template <class Op>
__device__ __forceinline__ void share_in_group(const typename Op::Params& p, const Partition& partition,
                                               const Scratch& scratch, const WorkTile& work,
                                               const ColumnPlace<Op::N>& place, const typename Op::ColumnReducer& mine,
                                               void* memory, const CoefficientShare<Op>& share) {
  using State = typename Op::State;
  const auto shares = static_cast<uint32_t>(partition.merge_shares);
  // A tile has a barrier of its own.
  const SplitBarrier barrier(&scratch.counters[work.tile], static_cast<uint32_t>(partition.splits), shares);
  const bool merged = merge_blocks<Op::N, State, merge_batch(sizeof(State))>(
      p.shape.c, partition, scratch, work, memory, partition.merge_shares,
      [&](const auto& each) { merge_columns<Op>(mine, place, partition.columns.lanes, memory, each); },
      [&] { return barrier.arrive(); }, FinishChannel<Op>{p});
  if (merged) barrier.release();
  barrier.wait();
  share.fill(partition, p.shape, work, [&](const ColumnChannel& at) {
    return Op::coefficients(p, Op::known(p, at.channel), Op::load_summary(p, at.channel));
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
#pragma unroll 1
  for (int64_t tile = group; tile < partition.tiles; tile += partition.groups) {
    const WorkTile work(tile, blockIdx.x - group * splits);
    const ColumnPlace<N> place(partition, work);
    if (work.split == 0) prefetch_operands<Op>(p, partition, work);
    typename Op::Centre centres[N] = {};
    share_centres<Op>(centres, p, partition, work, place, memory);
    const auto first = first_of_columns<Op>(p, partition, work, place);
    const ColumnWalk<N> walk(partition, p.shape.numel(), work, place);
    const auto mine = reduce_columns<Op, kChunk>(p, walk, shared_tile.template fill<false>(p, walk), centres, first);

    const CoefficientShare<Op> share(memory, partition);
    if (partition.clustered) share_in_cluster<Op>(p, partition, work, place, mine, memory, share);
    else share_in_group<Op>(p, partition, scratch, work, place, mine, memory, share);
    if (!place.active) continue;
    typename Op::Coefficients coefficients[N];
    share.get(coefficients, place);
    apply_columns<Op, false, kChunk>(p, partition, work, place, shared_tile.kept(p), coefficients);
  }
  Op::end(p, scratch, partition.cooperative() ? partition.tiles : 0);
  if (partition.clustered) leave_cluster(partition);
}

template <class Params>
cudaError_t launch_any(const Params& p, const Partition& partition, const Scratch& scratch, cudaStream_t stream) {
  return with_resident_op(p, [&](auto op) {
    return launch_partition(resident_interleaved_kernel<decltype(op)>, partition, stream, p, partition, scratch);
  });
}

}  // namespace

cudaError_t launch_resident_interleaved(const BatchNormForwardParams& p, const Partition& partition,
                                        const Scratch& scratch, cudaStream_t stream) {
  return launch_any(p, partition, scratch, stream);
}
cudaError_t launch_resident_interleaved(const BatchNormBackwardParams& p, const Partition& partition,
                                        const Scratch& scratch, cudaStream_t stream) {
  return launch_any(p, partition, scratch, stream);
}

}  // namespace bnext::cuda
