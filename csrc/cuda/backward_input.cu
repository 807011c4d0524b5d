// Stage `backward_input`: dx = (dy' - mean(dy') - (x - mean) * slope) * weight * invstd, and the
// residual's gradient dy'. In eval mode dx = dy' * weight * invstd.
//
// Decomposition: that of normalize.cu, in reverse block order for the same reason.
// Reads 2e bytes an element (and 1/8 byte of mask), writes e, and e for dresidual.
#include "backward_input.cuh"
#include "dispatch.h"

namespace bnext::cuda {
namespace {

template <class T, Gate GATE>
__global__ void __launch_bounds__(kMaxThreads, blocks_per_sm(false, true))
    backward_input_planar_kernel(const BNEXT_GRID_CONSTANT BackwardParams p,
                                 const BNEXT_GRID_CONSTANT Partition partition) {
  wait_on_dependent_grids();
  backward_input_planar<T, kVec<T, GATE == Gate::mask>>(p, partition, WorkTile::reverse(partition), GATE);
}

template <class T, Gate GATE>
__global__ void __launch_bounds__(kMaxThreads, blocks_per_sm(true, true))
    backward_input_columns_kernel(const BNEXT_GRID_CONSTANT BackwardParams p,
                                  const BNEXT_GRID_CONSTANT Partition partition) {
  wait_on_dependent_grids();
  backward_input_columns<T, kVec<T, GATE == Gate::mask>>(p, partition, WorkTile::reverse(partition), GATE);
}

}  // namespace

cudaError_t launch_normalize_pass(const ForwardParams&, const Partition&, cudaStream_t);

// For launch_backward: may overlap the kernel before.
cudaError_t launch_backward_input_pass(const BackwardParams& p, const Partition& partition, cudaStream_t stream) {
  if (!p.training && gate_of(p) == Gate::none) {
    // dy * weight * invstd is a normalization of dy without mean and bias; it does not read x.
    ForwardParams scaling = {};
    scaling.shape = p.shape;
    scaling.dtype = p.dtype;
    scaling.weight_dtype = p.weight_dtype;
    scaling.x = p.dy;
    scaling.weight = p.weight;
    scaling.invstd = const_cast<void*>(p.invstd);
    scaling.y = p.dx;
    return p.dx ? launch_normalize_pass(scaling, partition, stream) : cudaSuccess;
  }
  return with_dtype_and_gate(p, [&](auto element, auto gate) {
    using T = decltype(element);
    auto kernel =
        partition.columns ? backward_input_columns_kernel<T, gate.value> : backward_input_planar_kernel<T, gate.value>;
    return launch_pass(kernel, partition, stream, p, partition);
  });
}

cudaError_t launch_backward_input(const BackwardParams& p, const Plan& plan, cudaStream_t stream) {
  Partition partition = plan.apply;
  partition.pdl = false;  // whatever comes before
  return launch_backward_input_pass(p, partition, stream);
}

}  // namespace bnext::cuda
