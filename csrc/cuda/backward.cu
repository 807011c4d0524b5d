// Backward as a whole: the sums, the gradients of weight and bias, then dx and dresidual.
//
// Plan `resident`: see resident_backward.cu. 3e bytes an element.
// Plan `small`: as in forward.cu: 3e.
// Plan `two_pass`: backward_reduce, then backward_input: 5e.
#include "backward_input.cuh"
#include "backward_reduce.cuh"
#include "dispatch.h"

namespace bnext::cuda {

cudaError_t launch_resident_backward(const BackwardParams&, const Plan&, const Scratch&, cudaStream_t);

namespace {

template <class T>
__global__ void __launch_bounds__(kMaxThreads, kWholeBlocksPerSM<T>)
    small_backward_kernel(const BNEXT_GRID_CONSTANT BackwardParams p, const BNEXT_GRID_CONSTANT Pass pass,
                          const Scratch scratch, const Gate gate) {
  backward_reduce_interleaved<T, 1>(p, pass, scratch, Share(pass), gate);
  __syncthreads();  // the sums, written by other threads of this block
  backward_input_columns<T, 1>(p, pass, Share(pass), gate);
}

}  // namespace

cudaError_t launch_backward(const BackwardParams& p, const Plan& plan, const Scratch& scratch, cudaStream_t stream) {
  const bool elementwise = p.dx || p.dresidual;
  const bool reduces = p.dweight || p.dbias || (p.training && p.dx);
  if (elementwise && reduces && plan.kind == PlanKind::resident) {
    return launch_resident_backward(p, plan, scratch, stream);
  }
  if (elementwise && reduces && plan.kind == PlanKind::small) {
    return with_dtype(p.dtype, [&](auto element) {
      return launch_pass(small_backward_kernel<decltype(element)>, plan.whole, stream, p, plan.whole, scratch,
                         gate_of(p));
    });
  }
  cudaError_t error = reduces ? launch_backward_reduce(p, plan, scratch, stream) : cudaSuccess;
  if (error == cudaSuccess && elementwise) error = launch_backward_input(p, plan, stream);
  return error;
}

}  // namespace bnext::cuda
