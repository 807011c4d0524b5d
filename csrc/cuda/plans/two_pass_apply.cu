// Plan `two_pass`, second pass; and the stages batch_norm_normalize and batch_norm_backward_input on their own.
//
// Planes of whole vectors: a block takes a range of one channel's vectors, and computes the channel's coefficients
// once. Everything else: a tile of columns by a range of rows, a thread computing the coefficients of its columns once.
// Blocks run in reverse: the first pass went from front to back, and left the end in the L2 cache. Forward: reads e
// bytes an element (2e with a residual), writes e (and 1/8 byte of mask). Backward: reads 2e (and 1/8 byte of mask),
// writes e, and e for dresidual.
#include "launch_plan.cuh"
#include "passes.cuh"

namespace bnext::cuda {
namespace {

template <class Op>
__global__ void __launch_bounds__(kMaxThreads, pass_blocks_per_sm<Op>(false, true))
    apply_planar_kernel(const BNEXT_GRID_CONSTANT typename Op::Params p,
                        const BNEXT_GRID_CONSTANT Partition partition) {
  wait_on_dependent_grids();
  Op::between_passes(p);
  planar_apply_pass<Op, true>(p, partition, WorkTile::reverse(partition));
}

template <class Op>
__global__ void __launch_bounds__(kMaxThreads, pass_blocks_per_sm<Op>(true, true))
    apply_columns_kernel(const BNEXT_GRID_CONSTANT typename Op::Params p,
                         const BNEXT_GRID_CONSTANT Partition partition) {
  wait_on_dependent_grids();
  Op::between_passes(p);
  column_apply_pass<Op, true>(p, partition, WorkTile::reverse(partition));
}

}  // namespace

template <class Params>
cudaError_t launch_apply(const Params& p, const Partition& partition, cudaStream_t stream) {
  return with_op(p, [&](auto op) {
    using Op = decltype(op);
    auto kernel = partition.by_columns ? apply_columns_kernel<Op> : apply_planar_kernel<Op>;
    return launch_partition(kernel, partition, stream, p, partition);
  });
}

BNEXT_INSTANTIATE(launch_apply, const Partition&, cudaStream_t)

}  // namespace bnext::cuda
