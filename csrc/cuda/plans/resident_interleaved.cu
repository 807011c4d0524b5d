// Plan `resident` of interleaved layouts: one launch that reads the inputs from memory once.
//
// A tile of channels, 64 to 256 bytes wide, belongs to a group of blocks, each with a range of rows, all on the device
// together; a group takes several tiles in turn. The last blocks of a group to have read their part of a tile merge the
// partial results, through memory, and write what a channel's reduction gives; the others wait for that before the
// elementwise pass. 2e bytes an element forward, 3e backward.
//
// (To load the next tile before that took more time than it saved, of 884 plans that an H100 ran: tiles are then half
// as large, and rows of less than 128 bytes get a part of the memory's bandwidth.)
#include "block.cuh"
#include "launch_plan.cuh"

namespace bnext::cuda {
namespace {

template <class Op>
__global__ void __launch_bounds__(kMaxThreads, resident_blocks_per_sm(sizeof(typename Op::T), Op::kGeneral, true))
    resident_interleaved_kernel(const BNEXT_GRID_CONSTANT typename Op::Params p,
                                const BNEXT_GRID_CONSTANT Partition partition, const Scratch scratch) {
  constexpr int N = Op::N, kChunk = resident_chunk<Op, true, false>();
  using State = typename Op::State;
  void* const memory = shared_memory<kColumnBytes<Op>>();
  const SharedTile<Op, kChunk> shared_tile(partition);
  // A group's blocks are adjacent: the two on a multiprocessor, which start one after the other, are mostly of
  // different groups, and do not wait at the same time.
  const uint32_t splits = static_cast<uint32_t>(partition.splits), group = blockIdx.x / splits;
#pragma unroll 1
  for (int64_t tile = group; tile < partition.tiles; tile += partition.groups) {
    const WorkTile work(tile, blockIdx.x - group * splits);
    const ColumnPlace<N> place(partition, work);
    // A tile has a barrier of its own.
    const SplitBarrier barrier(&scratch.counters[tile], splits, static_cast<uint32_t>(partition.merge_shares));
    if (work.split == 0) prefetch_operands<Op>(p, partition, work);
    typename Op::Centre centres[N] = {};
    share_centres<Op>(centres, p, partition, work, place, memory);
    const auto first = first_of_columns<Op>(p, partition, work, place);
    const ColumnWalk<N> walk(partition, p.shape.numel(), work, place);
    const auto mine = reduce_columns<Op, kChunk>(p, walk, shared_tile.template fill<false>(p, walk), centres, first);
    const bool merged = merge_blocks<N, State, kPartialBatch<State>>(
        p.shape.c, partition, scratch, work, memory, partition.merge_shares,
        [&](const auto& each) { merge_columns<Op>(mine, place, partition.columns.lanes, memory, each); },
        [&] { return barrier.arrive(); }, FinishChannel<Op>{p});
    if (merged) barrier.release();
    barrier.wait();

    const ColumnShare<N, typename Op::Coefficients> share(memory, partition);
    share.fill(partition, p.shape, work, [&](const ColumnChannel& at) {
      return Op::coefficients(p, Op::known(p, at.channel), Op::load_summary(p, at.channel));
    });
    if (!place.active) continue;
    typename Op::Coefficients coefficients[N];
    share.get(coefficients, place);
    apply_columns<Op, false, kChunk>(p, partition, work, place, shared_tile.kept(), coefficients);
  }
  Op::end(p, scratch, partition.splits > 1 ? partition.tiles : 0);
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
