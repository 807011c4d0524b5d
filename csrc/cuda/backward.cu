// Backward as a whole: the sums, the gradients of weight and bias, then dx and dresidual.
//
// Plan `resident`: see resident_backward.cu. 3e bytes an element.
// Plan `small`: as in forward.cu: 3e.
// Plan `two_pass`: backward_reduce, then backward_input: 5e.
#include "backward_input.cuh"
#include "backward_reduce.cuh"
#include "dispatch.h"

namespace bnext::cuda {

cudaError_t launch_backward_input_pass(const BackwardParams&, const Pass&, cudaStream_t);
cudaError_t launch_resident_backward(const BackwardParams&, const Plan&, const Scratch&, cudaStream_t);

namespace {

template <class T, int UNIT>
__device__ __forceinline__ void small_backward(const BackwardParams& p, const Pass& reduce, const Pass& apply,
                                               const Scratch& scratch, uint32_t* counter, Gate gate) {
  for_shares(reduce, [&](const Share& share) {
    if (reduce.columns) backward_reduce_interleaved<T, UNIT>(p, reduce, scratch, share, gate);
    else if (reduce.aligned) backward_reduce_planar<T, UNIT, true>(p, reduce, scratch, share, gate);
    else backward_reduce_planar<T, UNIT, false>(p, reduce, scratch, share, gate);
  });
  meet(counter);
  for_shares(apply, [&](const Share& share) {
    if (apply.columns) backward_input_columns<T, UNIT>(p, apply, share, gate);
    else backward_input_planar<T, UNIT>(p, apply, share, gate);
  });
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1)
    small_backward_kernel(const BNEXT_GRID_CONSTANT BackwardParams p, const BNEXT_GRID_CONSTANT Pass reduce,
                          const BNEXT_GRID_CONSTANT Pass apply, const Scratch scratch, uint32_t* counter,
                          const Gate gate) {
  constexpr int kPlain = kUnit<T, false>, kMasked = kUnit<T, true>;
  if (kPlain == kMasked || gate != Gate::mask) small_backward<T, kPlain>(p, reduce, apply, scratch, counter, gate);
  else small_backward<T, kMasked>(p, reduce, apply, scratch, counter, Gate::mask);
}

}  // namespace

cudaError_t launch_backward(const BackwardParams& p, const Plan& plan, const Scratch& scratch, cudaStream_t stream) {
  if (plan.kind == PlanKind::resident) return launch_resident_backward(p, plan, scratch, stream);
  if (plan.kind == PlanKind::small) {
    return with_dtype(p.dtype, [&](auto element) {
      return launch_small(small_backward_kernel<decltype(element)>, plan, scratch, stream, p, gate_of(p));
    });
  }
  if (!p.reduces()) return p.elementwise() ? launch_backward_input(p, plan, stream) : cudaSuccess;
  const cudaError_t error = launch_backward_reduce(p, plan, scratch, stream);
  if (error != cudaSuccess || !p.elementwise()) return error;
  return launch_backward_input_pass(p, plan.apply, stream);
}

}  // namespace bnext::cuda
