#include "plan.h"

#include "plan_kinds.h"

namespace bnext::cuda {
namespace {

// The fastest plan of all kinds, or of the kind that is asked for; or two_pass, where that has none.
Plan choose(const Problem& problem, const DeviceProperties& device, const PlanOptions& options, std::string* refusal) {
  const bool automatic = options.plan.kind == PlanKind::automatic;
  std::array<Plan, std::size(kPlanKindNames)> plans = {};  // by kind: a plan is large to copy, for each call
  decltype(Plan::predicted_us) predicted_us = {};
  Plan* best = nullptr;
  const auto consider = [&](PlanKind kind, auto make) {
    if (!automatic && options.plan.kind != kind) return;
    Plan& plan = plans[static_cast<size_t>(kind)];
    if (!make(problem, device, options, &plan, automatic ? nullptr : refusal)) return;
    predicted_us[static_cast<size_t>(kind)] = plan.us();
    if (!best || plan.us() < best->us()) best = &plan;
  };
#define BNEXT_CONSIDER(kind) consider(PlanKind::kind, plan_##kind);
  BNEXT_PLANS(BNEXT_CONSIDER)
#undef BNEXT_CONSIDER
  if (!best) {
    best = &plans[static_cast<size_t>(PlanKind::two_pass)];
    plan_two_pass(problem, device, options, best, nullptr);
  }
  best->predicted_us = predicted_us;
  return *best;
}

}  // namespace

Plan make_plan(const BatchNormForwardParams& p, const DeviceProperties& device, const PlanOptions& options,
               std::string* refusal) {
  Problem problem = {};
  problem.shape = p.shape;
  problem.dtype = p.dtype;
  problem.general = epilogue_of(p) == Epilogue::general;
  problem.masked = masks(epilogue_of(p));
  problem.reads_counter = p.cumulative && p.num_batches_tracked;
  problem.reduce_inputs = 1;
  problem.apply_extras = p.residual ? 1 : 0;
  problem.set_numbers(kForwardNumbers);
  return choose(problem, device, options, refusal);
}

Plan make_plan(const BatchNormBackwardParams& p, const DeviceProperties& device, const PlanOptions& options,
               std::string* refusal) {
  Problem problem = {};
  problem.shape = p.shape;
  problem.dtype = p.dtype;
  problem.general = derivative_of(p) == Derivative::general;
  problem.masked = problem.reduce_masked = masks(derivative_of(p));
  problem.reduce_inputs = 2;
  problem.apply_extras = problem.masked && p.dresidual ? 1 : 0;
  problem.set_numbers(kBackwardNumbers);
  PlanOptions allowed = options;
  if (!p.elementwise() || !p.reduces()) allowed.plan = {PlanKind::two_pass};  // or one pass of it
  return choose(problem, device, allowed, refusal);
}

}  // namespace bnext::cuda
