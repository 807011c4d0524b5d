// Backward as a whole: the sums, the gradients of weight and bias, then dx and dresidual.
//
// Plan `resident`: see resident_backward.cu. 3e bytes an element.
// Plan `small`: as in forward.cu: 3e.
// Plan `two_pass`: backward_reduce, then backward_input: 5e.
#include "backward_input.cuh"
#include "backward_reduce.cuh"
#include "dispatch.h"

namespace bnext::cuda {

cudaError_t launch_backward_input_pass(const BackwardParams&, const Partition&, cudaStream_t);
cudaError_t launch_resident_backward(const BackwardParams&, const Plan&, const Scratch&, cudaStream_t);

namespace {

template <class T, int N>
__device__ __forceinline__ void cooperative_backward(const BackwardParams& p, const Partition& reduce,
                                                     const Partition& apply, const Scratch& scratch, uint32_t* counter,
                                                     Gate gate) {
  for_work_tiles(reduce, [&](const WorkTile& work) {
    if (reduce.columns) backward_reduce_interleaved<T, N>(p, reduce, scratch, work, gate);
    else if (reduce.aligned) backward_reduce_planar<T, N, true>(p, reduce, scratch, work, gate);
    else backward_reduce_planar<T, N, false>(p, reduce, scratch, work, gate);
  });
  grid_sync(counter);
  for_work_tiles(apply, [&](const WorkTile& work) {
    if (apply.columns) backward_input_columns<T, N>(p, apply, work, gate);
    else backward_input_planar<T, N>(p, apply, work, gate);
  });
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1)
    cooperative_backward_kernel(const BNEXT_GRID_CONSTANT BackwardParams p, const BNEXT_GRID_CONSTANT Partition reduce,
                                const BNEXT_GRID_CONSTANT Partition apply, const Scratch scratch, uint32_t* counter,
                                const Gate gate) {
  constexpr int kPlain = kVec<T, false>, kMasked = kVec<T, true>;
  if (kPlain == kMasked || gate != Gate::mask)
    cooperative_backward<T, kPlain>(p, reduce, apply, scratch, counter, gate);
  else cooperative_backward<T, kMasked>(p, reduce, apply, scratch, counter, Gate::mask);
}

}  // namespace

cudaError_t launch_backward(const BackwardParams& p, const Plan& plan, const Scratch& scratch, cudaStream_t stream) {
  if (plan.kind == PlanKind::resident) return launch_resident_backward(p, plan, scratch, stream);
  if (plan.kind == PlanKind::cooperative) {
    return with_dtype(p.dtype, [&](auto element) {
      return launch_cooperative_plan(cooperative_backward_kernel<decltype(element)>, plan, scratch, stream, p,
                                     gate_of(p));
    });
  }
  if (!p.reduces()) return p.elementwise() ? launch_backward_input(p, plan, stream) : cudaSuccess;
  const cudaError_t error = launch_backward_reduce(p, plan, scratch, stream);
  if (error != cudaSuccess || !p.elementwise()) return error;
  return launch_backward_input_pass(p, plan.apply, stream);
}

}  // namespace bnext::cuda
