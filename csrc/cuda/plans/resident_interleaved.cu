// Plan `resident` of interleaved layouts: one launch that reads the inputs from memory once.
//
// A tile of channels, 64 bytes wide, belongs to a group of blocks, each with a range of rows, all on the device
// together; a group takes several tiles in turn. The last block of a group to have read its part of a tile merges the
// partial results, through memory, and writes what a channel's reduction gives; the others wait for that when they come
// to the elementwise pass, and load their part of the next tile before. 2e bytes an element forward, 3e backward.
#include "block.cuh"
#include "launch_plan.cuh"

namespace bnext::cuda {
namespace {

// Software pipeline over the tiles of the block's group, in order: load(WorkTile, buffer) runs up to `buffers` tiles
// ahead of store(WorkTile, buffer), so that one block merges a tile while the others load the next. A group's blocks
// are adjacent: the two on a multiprocessor, which start one after the other, are mostly of different groups, and do
// not wait at the same time.
template <class Load, class Store>
__device__ __forceinline__ void pipeline_tiles(const Partition& partition, Load&& load, Store&& store) {
  const uint32_t splits = static_cast<uint32_t>(partition.splits), number = blockIdx.x / splits;
  const int64_t group = number, split = blockIdx.x - number * splits;
  int64_t next = group;
  int32_t filling = 0, emptying = 0;
#pragma unroll 1
  for (int64_t tile = group; tile < partition.tiles; tile += partition.groups) {
#pragma unroll 1
    for (; next < partition.tiles && next < tile + partition.buffers * partition.groups; next += partition.groups) {
      load(WorkTile(next, split), filling);
      filling = partition.buffers - 1 - filling;
    }
    store(WorkTile(tile, split), emptying);
    emptying = partition.buffers - 1 - emptying;
  }
}

// A tile has a barrier of its own.
__device__ __forceinline__ SplitBarrier split_barrier_of(const Partition& partition, const Scratch& scratch,
                                                         const WorkTile& work) {
  return SplitBarrier(&scratch.counters[work.tile], static_cast<uint32_t>(partition.splits));
}

template <class Op>
__global__ void __launch_bounds__(kMaxThreads, resident_blocks_per_sm(sizeof(typename Op::T), Op::kGeneral, true))
    resident_interleaved_kernel(const BNEXT_GRID_CONSTANT typename Op::Params p,
                                const BNEXT_GRID_CONSTANT Partition partition, const Scratch scratch) {
  constexpr int N = Op::N;
  using State = typename Op::State;
  pipeline_tiles(
      partition,
      [&](const WorkTile& work, int32_t buffer) {
        const ColumnPlace<N> place(partition, work);
        State state[N];
        const SharedTile<Op> shared_tile(partition, buffer, partition.buffers);
        // A matrix row of this plan is one pixel: plan.cpp sees to it.
        const Channels<N> channels(place.col);
        reduce_columns<Op>(state, p, partition, work, place, channels, shared_tile.fill(p));
        const SplitBarrier barrier = split_barrier_of(partition, scratch, work);
        const bool merged = merge_blocks(
            state, partition.columns.lanes, p.shape.c, partition, scratch, work, /*shares=*/1,
            [&] { return barrier.arrive_is_last() ? 0 : -1; },
            [&](int64_t channel, const State& whole) { Op::finish(p, channel, whole); });
        if (merged) barrier.release();
      },
      [&](const WorkTile& work, int32_t buffer) {
        split_barrier_of(partition, scratch, work).wait();
        const ColumnPlace<N> place(partition, work);
        if (!place.active) return;
        typename Op::Coefficients coefficients[N];
        Op::load_coefficients(coefficients, p, Channels<N>(place.col));
        const SharedTile<Op> shared_tile(partition, buffer, partition.buffers);
        apply_columns<Op, false>(p, partition, work, place, shared_tile.read(), coefficients);
      });
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
