// Plan `resident` of planar layouts: one launch that reads the inputs from memory once.
//
// A cluster of blocks owns a channel. A block loads its part in chunks, reduces each chunk from registers, and leaves
// the vectors in shared memory. The blocks of the cluster read each other's states through distributed shared memory
// and merge them in rank order, every block for itself; then each runs the elementwise pass on its copies. Blocks of at
// most half a multiprocessor's shared memory run in pairs, of which one loads while the other stores.
//
// Forward: reads e bytes an element (2e with a residual), writes e (and 1/8 byte of mask): 2e, the floor.
// Backward: reads 2e (and the mask twice, the second time from the L2 cache), writes e, and e for dresidual: 3e, the
// floor.
#include "block.cuh"
#include "cluster.cuh"
#include "launch_plan.cuh"

namespace bnext::cuda {
namespace {

template <class Op>
__global__ void __launch_bounds__(kMaxThreads, resident_blocks_per_sm(sizeof(typename Op::T), Op::kGeneral, false))
    resident_planar_kernel(const BNEXT_GRID_CONSTANT typename Op::Params p,
                           const BNEXT_GRID_CONSTANT Partition partition, const Scratch scratch) {
  constexpr bool kCopies = kHasAsyncCopies && !Op::kReducesExtras;
  constexpr int kChunk = resident_chunk<Op, false, kCopies>();
  const WorkTile work = cluster_work_tile(partition);
  stagger_start(partition, work);
  const PlanarWalk<Op::N, true> walk(partition, p.shape, work);
  const SharedTile<Op, kChunk> shared_tile(partition);

  const typename Op::ChannelParams params = Op::channel_params(p, work.tile);
  const bool finishes = work.split == 0 && threadIdx.x == 0;
  const typename Op::Operands operands = finishes ? Op::operands(p, work.tile) : typename Op::Operands{};
  const auto mine = reduce_planar<Op, kChunk>(p, walk, shared_tile.template fill<kCopies>(p, walk), Op::centre(params));
  prefetch_next<Op>(p, partition, work,
                    [&](const WorkTile& next) { return PlanarWalk<Op::N, true>(partition, p.shape, next); });
  const auto whole = merge_cluster(mine, partition, shared_memory<kPlanarBytes<Op>>());
  if (finishes) Op::finish(p, work.tile, whole, operands);
  apply_planar<Op, kChunk>(p, walk, shared_tile.replay(p), Op::coefficients(p, params, Op::summary(p, whole)));
  Op::at_kernel_end(p, scratch);
  leave_cluster(partition);
}

}  // namespace

const void* sample_kernel() {
  return reinterpret_cast<const void*>(resident_planar_kernel<BatchNormForward<float, Epilogue::none>>);
}

template <class Params>
cudaError_t launch_resident_planar(const Params& p, const Partition& partition, const Scratch& scratch,
                                   cudaStream_t stream) {
  return with_resident_op(p, [&](auto op) {
    return launch_partition(resident_planar_kernel<decltype(op)>, partition, stream, p, partition, scratch);
  });
}

BNEXT_INSTANTIATE(launch_resident_planar, const Partition&, const Scratch&, cudaStream_t)

}  // namespace bnext::cuda
