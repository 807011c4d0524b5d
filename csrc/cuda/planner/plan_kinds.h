// What the planner has of each kind of plan, in a file of that name.
#pragma once

#include <optional>
#include <string>

#include "problem.h"

namespace bnext::cuda {

// plan_KIND: the fastest plan of that kind, as `options` ask for it, and its predicted time; nothing where the shape or
// the device does not allow one. If `refusal` is not null, *refusal then says why. The automatic choice, which passes
// null, also gets nothing where a plan is known to be slower than another kind's.
//
// describe_KIND: what such a plan launches, in words.
#define BNEXT_DECLARE(kind)                                                                                           \
  std::optional<Plan> plan_##kind(const Problem&, const DeviceProperties&, const PlanOptions&, std::string* refusal); \
  std::string describe_##kind(const Plan&);
BNEXT_PLANS(BNEXT_DECLARE)
#undef BNEXT_DECLARE

}  // namespace bnext::cuda
