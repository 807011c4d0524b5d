// From a plan to its kernels.
#include "launch.h"

#include "plans/plans.h"

namespace bnext::cuda {
namespace {

template <class Params>
cudaError_t launch_plan(const Params& p, const Plan& plan, const Scratch& scratch, cudaStream_t stream) {
  switch (plan.kind) {
    case PlanKind::automatic: break;  // is never what runs
#define BNEXT_CASE(kind) \
  case PlanKind::kind: return launch_##kind##_plan(p, plan, scratch, stream);
      BNEXT_PLANS(BNEXT_CASE)
#undef BNEXT_CASE
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_batch_norm_forward(const BatchNormForwardParams& p, const Plan& plan, const Scratch& scratch,
                                      cudaStream_t stream) {
  return launch_plan(p, plan, scratch, stream);
}

cudaError_t launch_batch_norm_backward(const BatchNormBackwardParams& p, const Plan& plan, const Scratch& scratch,
                                       cudaStream_t stream) {
  return launch_plan(p, plan, scratch, stream);
}

}  // namespace bnext::cuda
