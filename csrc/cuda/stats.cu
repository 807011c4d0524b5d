// Stage `stats`: the mean and biased variance of each channel.
//
// Decomposition: planar, a block takes a range of one channel's vectors; interleaved, a tile of columns
// by a range of rows, a thread keeping to its columns. Chunks of 32 elements (planar) or 8 rows
// (interleaved) are loaded together and summed from registers in two passes; chunk, thread, block
// and grid are merged by Chan's formula, the grid by the last block of each tile in a fixed order.
// Reads e bytes an element; writes 16 bytes a block and column, and the results.
#include "dispatch.h"
#include "stats.cuh"

namespace bnext::cuda {
namespace {

template <class T, bool ALIGNED>
__global__ void __launch_bounds__(kMaxThreads, blocks_per_sm(false, ALIGNED && sizeof(T) < 8))
    stats_planar_kernel(const BNEXT_GRID_CONSTANT ForwardParams p, const BNEXT_GRID_CONSTANT Partition partition,
                        const Scratch scratch) {
  launch_dependent_grids();
  stats_planar<T, kVec<T, false>, ALIGNED>(p, partition, scratch, WorkTile::forward(partition));
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads, blocks_per_sm(true, true))
    stats_interleaved_kernel(const BNEXT_GRID_CONSTANT ForwardParams p, const BNEXT_GRID_CONSTANT Partition partition,
                             const Scratch scratch) {
  launch_dependent_grids();
  stats_interleaved<T, kVec<T, false>>(p, partition, scratch, WorkTile::forward(partition));
}

}  // namespace

cudaError_t launch_stats(const ForwardParams& p, const Plan& plan, const Scratch& scratch, cudaStream_t stream) {
  const Partition& partition = plan.reduce;
  return with_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    auto kernel = partition.columns   ? stats_interleaved_kernel<T>
                  : partition.aligned ? stats_planar_kernel<T, true>
                                      : stats_planar_kernel<T, false>;
    return launch_pass(kernel, partition, stream, p, partition, scratch);
  });
}

}  // namespace bnext::cuda
