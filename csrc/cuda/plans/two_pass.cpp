// Plan `two_pass`: a launch for each pass; and the stages, which are one pass each.
#include "plans.h"

namespace bnext::cuda {
namespace {

// The first pass lets the second begin early. A stage on its own must not: whoever comes next may be somebody else's.
Partition first_of_two(const Plan& plan) {
  Partition partition = plan.reduce;
  partition.starts_next = plan.apply.pdl;
  return partition;
}

// An elementwise pass on its own does not overlap the kernel before, whatever that is.
Partition alone(Partition partition) {
  partition.pdl = false;
  return partition;
}

cudaError_t launch_input_gradient(const BatchNormBackwardParams& p, const Partition& partition, cudaStream_t stream) {
  if (p.training || p.activation != Activation::none) return launch_apply(p, partition, stream);
  if (!p.dx) return cudaSuccess;
  // dy * weight * invstd is a normalization of dy without mean and bias; it does not read x.
  BatchNormForwardParams scaling = {};
  scaling.shape = p.shape;
  scaling.dtype = p.dtype;
  scaling.weight_dtype = p.weight_dtype;
  scaling.x = p.dy;
  scaling.weight = p.weight;
  scaling.invstd = const_cast<void*>(p.invstd);
  scaling.y = p.dx;
  return launch_apply(scaling, partition, stream);
}

cudaError_t launch_two_passes(const BatchNormForwardParams& p, const Plan& plan, const Scratch& scratch,
                              cudaStream_t stream) {
  if (!plan.apply.fits()) return cudaErrorInvalidValue;  // before the first has stepped the running statistics
  const cudaError_t error = launch_reduce(p, first_of_two(plan), scratch, stream);
  if (error != cudaSuccess) return error;
  BatchNormForwardParams second = p;  // the running statistics are done; only the counter is left
  second.running_mean = second.running_var = nullptr;
  return launch_apply(second, plan.apply, stream);
}

// Or the one of them that makes what is wanted.
cudaError_t launch_two_passes(const BatchNormBackwardParams& p, const Plan& plan, const Scratch& scratch,
                              cudaStream_t stream) {
  if (!p.reduces()) return p.elementwise() ? launch_input_gradient(p, alone(plan.apply), stream) : cudaSuccess;
  if (!p.elementwise()) return launch_reduce(p, plan.reduce, scratch, stream);
  const cudaError_t error = launch_reduce(p, first_of_two(plan), scratch, stream);
  if (error != cudaSuccess) return error;
  return launch_input_gradient(p, plan.apply, stream);
}

}  // namespace

template <class Params>
cudaError_t launch_two_pass_plan(const Params& p, const Plan& plan, const Scratch& scratch, cudaStream_t stream) {
  return launch_two_passes(p, plan, scratch, stream);
}

BNEXT_INSTANTIATE(launch_two_pass_plan, const Plan&, const Scratch&, cudaStream_t)

// A stage on its own is one pass of `two_pass`: plans of other kinds have none for it, or not the fastest.
cudaError_t launch_batch_norm_stats(const BatchNormForwardParams& p, const Plan& plan, const Scratch& scratch,
                                    cudaStream_t stream) {
  if (plan.kind != PlanKind::two_pass) return cudaErrorInvalidValue;
  return launch_reduce(p, plan.reduce, scratch, stream);
}

cudaError_t launch_batch_norm_normalize(const BatchNormForwardParams& p, const Plan& plan, cudaStream_t stream) {
  if (plan.kind != PlanKind::two_pass) return cudaErrorInvalidValue;
  BatchNormForwardParams stage = p;
  stage.num_batches_tracked = nullptr;
  return launch_apply(stage, alone(plan.apply), stream);
}

cudaError_t launch_batch_norm_backward_reduce(const BatchNormBackwardParams& p, const Plan& plan,
                                              const Scratch& scratch, cudaStream_t stream) {
  if (plan.kind != PlanKind::two_pass) return cudaErrorInvalidValue;
  return launch_reduce(p, plan.reduce, scratch, stream);
}

cudaError_t launch_batch_norm_backward_input(const BatchNormBackwardParams& p, const Plan& plan, cudaStream_t stream) {
  if (plan.kind != PlanKind::two_pass) return cudaErrorInvalidValue;
  return launch_input_gradient(p, alone(plan.apply), stream);
}

}  // namespace bnext::cuda
