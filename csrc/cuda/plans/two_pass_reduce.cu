// Plan `two_pass`, first pass; and the stages batch_norm_stats and batch_norm_backward_reduce on their own.
//
// Planar: a block takes a range of one channel's vectors. Interleaved: a tile of columns by a range of rows, a thread
// keeping to its columns. Chunks are loaded together and reduced from registers; chunk, thread, block and grid are
// merged in a fixed order, the grid by the last block of each tile. Reads e bytes an element forward, 2e (and 1/8 byte
// of mask) backward; writes a state a block and column, and the results.
#include "launch_plan.cuh"
#include "passes.cuh"

namespace bnext::cuda {
namespace {

template <class Op, bool ALIGNED>
__global__ void __launch_bounds__(kMaxThreads, pass_blocks_per_sm<Op>(false, ALIGNED && sizeof(typename Op::T) < 8))
    reduce_planar_kernel(const BNEXT_GRID_CONSTANT typename Op::Params p, const BNEXT_GRID_CONSTANT Partition partition,
                         const Scratch scratch) {
  if (partition.starts_next) launch_dependent_grids();
  planar_reduce_pass<Op, ALIGNED>(p, partition, scratch, WorkTile::forward(partition));
}

template <class Op>
__global__ void __launch_bounds__(kMaxThreads, pass_blocks_per_sm<Op>(true, true))
    reduce_columns_kernel(const BNEXT_GRID_CONSTANT typename Op::Params p,
                          const BNEXT_GRID_CONSTANT Partition partition, const Scratch scratch) {
  if (partition.starts_next) launch_dependent_grids();
  column_reduce_pass<Op>(p, partition, scratch, WorkTile::forward(partition));
}

}  // namespace

template <class Params>
cudaError_t launch_reduce(const Params& p, const Partition& partition, const Scratch& scratch, cudaStream_t stream) {
  return with_reduction(p, [&](auto op) {
    using Op = decltype(op);
    auto kernel = partition.by_columns       ? reduce_columns_kernel<Op>
                  : partition.planar.aligned ? reduce_planar_kernel<Op, true>
                                             : reduce_planar_kernel<Op, false>;
    return launch_partition(kernel, partition, stream, p, partition, scratch);
  });
}

BNEXT_INSTANTIATE(launch_reduce, const Partition&, const Scratch&, cudaStream_t)

}  // namespace bnext::cuda
