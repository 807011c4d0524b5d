#include <algorithm>

#include "describe_plan.h"
#include "partitioning.h"
#include "plan_kinds.h"
#include "time_model.h"
#include "two_pass.h"

namespace bnext::cuda {
namespace {

// A tensor that is larger than this should use the whole device, even if that means reading it twice; one that
// is not should take one launch.
constexpr int64_t kSmallBytes = 2 * 1024 * 1024;

// Why there is no such plan; empty if there is.
std::string why_not(const Problem& problem, const DeviceProperties& device) {
  if (problem.shape.numel() == 0) return "it is empty";
  if (problem.general) return "it is not compiled for this activation";
  if (!device.cooperative) return "the device has no cooperative launches, or refuses them";
  return {};
}

// Whether it may be faster than two launches. Those that overlap take less time than a barrier of the whole grid:
// measured.
bool pays(const Problem& problem, const DeviceProperties& device) {
  return problem.bytes() <= kSmallBytes && !launches_overlap(device);
}

}  // namespace

bool plan_cooperative(const Problem& problem, const DeviceProperties& device, const PlanOptions& options, Plan* plan,
                      std::string* refusal) {
  if (options.plan.kind == PlanKind::automatic && !pays(problem, device)) return false;
  if (const std::string reason = why_not(problem, device); !reason.empty()) {
    if (refusal) *refusal = reason;
    return false;
  }
  plan->kind = PlanKind::cooperative;
  make_passes(problem, device, plan);
  // Both passes with the same threads; fewer than a pass would take on its own stay idle in it.
  for (Partition* partition : {&plan->reduce, &plan->apply}) {
    if (!partition->by_columns) {
      set_planar_threads(*partition, kMaxThreads);
      set_splits(*partition, ceil_div(partition->steps, partition->steps_per_split), kMaxThreads);
    }
    partition->threads = kMaxThreads;
  }
  plan->blocks = std::min(std::max(plan->reduce.blocks(), plan->apply.blocks()),
                          std::max<int64_t>(1, device.multiprocessors - options.sm_margin));
  finish_passes(problem, device, plan);
  ++plan->counters;  // for the barrier
  // There is no model of a launch's overhead on older devices: equal times mean that this kind is chosen.
  plan->us() = two_pass_time(problem, device);
  return true;
}

std::string describe_cooperative(const Plan& plan) { return "1 launch of " + counted(plan.blocks, "block"); }

}  // namespace bnext::cuda
