// Backward as a whole: the sums, the gradients of weight and bias, then dx and dresidual.
//
// Plan `resident`: see resident_backward.cu.
// Plan `small`: one launch, in which a block reduces whole channels and goes on to their dx, reading
// dy and x from memory once and from the L1 or L2 cache the second time: 3e bytes an element.
// Plan `two_pass`: backward_reduce, then backward_input: 5e.
#include "backward_input.cuh"
#include "backward_reduce.cuh"
#include "dispatch.h"

namespace bnext::cuda {

cudaError_t launch_resident_backward(const BackwardParams&, const Plan&, cudaStream_t);

namespace {

template <class T, int UNIT>
__global__ void __launch_bounds__(kMaxThreads, kWholeBlocksPerSM<T>)
    small_backward_interleaved_kernel(const BNEXT_GRID_CONSTANT BackwardParams p, const BNEXT_GRID_CONSTANT Pass pass,
                                      const Scratch scratch, const Gate gate) {
  backward_reduce_interleaved<T, UNIT>(p, pass, scratch, Share(pass), gate);
  __syncthreads();  // the sums, written by other threads of this block
  backward_input_columns<T, UNIT>(p, pass, Share(pass), gate);
}

template <class T>
cudaError_t launch_small(const BackwardParams& p, const Pass& pass, const Scratch& scratch, cudaStream_t stream) {
  return with_unit<T>(pass.unit, [&](auto unit) {
    return launch_pass(small_backward_interleaved_kernel<T, unit.value>, pass, stream, p, pass, scratch, gate_of(p));
  });
}

}  // namespace

cudaError_t launch_backward(const BackwardParams& p, const Plan& plan, const Scratch& scratch, cudaStream_t stream) {
  const bool elementwise = p.dx || p.dresidual;
  const bool reduces = p.dweight || p.dbias || (p.training && p.dx);
  if (elementwise && reduces && plan.kind == PlanKind::resident) return launch_resident_backward(p, plan, stream);
  if (elementwise && reduces && plan.kind == PlanKind::small) {
    return with_dtype(p.dtype, [&](auto element) {
      return launch_small<decltype(element)>(p, plan.whole, scratch, stream);
    });
  }
  cudaError_t error = reduces ? launch_backward_reduce(p, plan, scratch, stream) : cudaSuccess;
  if (error == cudaSuccess && elementwise) error = launch_backward_input(p, plan, stream);
  return error;
}

}  // namespace bnext::cuda
