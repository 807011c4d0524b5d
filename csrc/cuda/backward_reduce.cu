// Stage `backward_reduce`: sum of dy' and of dy' * (x - mean) for each channel, and with them the
// gradients of weight and bias, where dy' is dy behind the activation's gate.
//
// Decomposition: that of stats.cu, with two plain sums in place of the Welford state: the mean is
// known, and centred products do not cancel. Fixed order.
// Reads 2e bytes an element (and 1/8 byte of mask).
#include "backward_reduce.cuh"
#include "dispatch.h"

namespace bnext::cuda {
namespace {

template <class T, Gate GATE, bool ALIGNED>
__global__ void __launch_bounds__(kMaxThreads, blocks_per_sm(false, ALIGNED && sizeof(T) < 8))
    backward_reduce_planar_kernel(const BNEXT_GRID_CONSTANT BackwardParams p,
                                  const BNEXT_GRID_CONSTANT Partition partition, const Scratch scratch) {
  launch_dependent_grids();
  backward_reduce_planar<T, kVec<T, GATE == Gate::mask>, ALIGNED>(p, partition, scratch, WorkTile::forward(partition),
                                                                  GATE);
}

template <class T, Gate GATE>
__global__ void __launch_bounds__(kMaxThreads, blocks_per_sm(true, true))
    backward_reduce_interleaved_kernel(const BNEXT_GRID_CONSTANT BackwardParams p,
                                       const BNEXT_GRID_CONSTANT Partition partition, const Scratch scratch) {
  launch_dependent_grids();
  backward_reduce_interleaved<T, kVec<T, GATE == Gate::mask>>(p, partition, scratch, WorkTile::forward(partition),
                                                              GATE);
}

}  // namespace

cudaError_t launch_backward_reduce(const BackwardParams& p, const Plan& plan, const Scratch& scratch,
                                   cudaStream_t stream) {
  const Partition& partition = plan.reduce;
  return with_dtype_and_gate(p, [&](auto element, auto gate) {
    using T = decltype(element);
    auto kernel = partition.columns   ? backward_reduce_interleaved_kernel<T, gate.value>
                  : partition.aligned ? backward_reduce_planar_kernel<T, gate.value, true>
                                      : backward_reduce_planar_kernel<T, gate.value, false>;
    return launch_pass(kernel, partition, stream, p, partition, scratch);
  });
}

}  // namespace bnext::cuda
