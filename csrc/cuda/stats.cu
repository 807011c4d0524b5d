// Stage `stats`: the mean and biased variance of each channel.
//
// Decomposition: planar, a block takes a range of one channel's units; interleaved, a tile of columns
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
    stats_planar_kernel(const BNEXT_GRID_CONSTANT ForwardParams p, const BNEXT_GRID_CONSTANT Pass pass,
                        const Scratch scratch) {
  let_next_begin();
  stats_planar<T, kUnit<T, false>, ALIGNED>(p, pass, scratch, Share::forward(pass));
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads, blocks_per_sm(true, true))
    stats_interleaved_kernel(const BNEXT_GRID_CONSTANT ForwardParams p, const BNEXT_GRID_CONSTANT Pass pass,
                             const Scratch scratch) {
  let_next_begin();
  stats_interleaved<T, kUnit<T, false>>(p, pass, scratch, Share::forward(pass));
}

}  // namespace

cudaError_t launch_stats(const ForwardParams& p, const Plan& plan, const Scratch& scratch, cudaStream_t stream) {
  const Pass& pass = plan.reduce;
  return with_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    auto kernel = pass.columns   ? stats_interleaved_kernel<T>
                  : pass.aligned ? stats_planar_kernel<T, true>
                                 : stats_planar_kernel<T, false>;
    return launch_pass(kernel, pass, stream, p, pass, scratch);
  });
}

}  // namespace bnext::cuda
