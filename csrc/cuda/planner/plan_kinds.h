// What the planner has of each kind of plan, in a file of that name.
#pragma once

#include <string>

#include "problem.h"

namespace bnext::cuda {

// plan_KIND: makes *plan, which is zero-initialised, the fastest plan of that kind, as `options` ask for it, with its
// predicted time. False where the shape or the device does not allow one; if `refusal` is not null, *refusal then says
// why. The automatic choice, which passes null, also gets none where another kind is known to be faster.
//
// describe_KIND: what such a plan launches, in words.
#define BNEXT_DECLARE(kind)                                                                                        \
  bool plan_##kind(const Problem&, const DeviceProperties&, const PlanOptions&, Plan* plan, std::string* refusal); \
  std::string describe_##kind(const Plan&);
BNEXT_PLANS(BNEXT_DECLARE)
#undef BNEXT_DECLARE

}  // namespace bnext::cuda
