#include "describe_plan.h"

#include <cstdio>

#include "plan_kinds.h"

namespace bnext::cuda {
namespace {

std::string describe_launches(const Plan& plan) {
  switch (plan.kind) {
    case PlanKind::automatic: break;  // never a plan
#define BNEXT_CASE(kind) \
  case PlanKind::kind: return describe_##kind(plan);
      BNEXT_PLANS(BNEXT_CASE)
#undef BNEXT_CASE
  }
  BNEXT_UNREACHABLE();
}

}  // namespace

std::string counted(int64_t count, const std::string& what) {
  return std::to_string(count) + " " + what + (count == 1 ? "" : "s");
}

std::string describe(const Partition& partition) {
  std::string out = counted(partition.tiles, "tile") + ", " + counted(partition.splits, "block") + " of " +
                    std::to_string(partition.threads) + " threads each";
  if (partition.resident_bytes == 0) return out;
  if (partition.clustered) {
    out += partition.splits > 1 ? ", in clusters" : "";
  } else if (partition.groups < partition.tiles) {
    out += ", " + std::to_string(partition.groups) + " at a time";
  }
  if (partition.reread_bytes > 0) out += ", " + std::to_string(partition.reread_bytes) + " bytes a block read again";
  out += "; " + std::to_string(partition.shared_bytes + partition.resident_bytes + partition.exchange_bytes) +
         " bytes of shared memory a block";
  if (partition.register_vecs == 0) return out;
  return out + ", and " + counted(partition.register_vecs, "vector") + " of each input in each thread's registers";
}

std::string describe(const Plan& plan) {
  std::string out = name_of(plan.kind) + (": " + describe_launches(plan));
  if (plan.partial_bytes > 0) out += "; partial results of " + std::to_string(plan.partial_bytes) + " bytes";
  const char* separator = "; predicted: ";
  for (size_t kind = 0; kind < plan.predicted_us.size(); ++kind) {
    if (plan.predicted_us[kind] == 0) continue;
    char time[80];
    std::snprintf(time, sizeof(time), "%s%s %.1f us", separator, kPlanKindNames[kind], plan.predicted_us[kind]);
    out += time;
    separator = ", ";
  }
  return out;
}

}  // namespace bnext::cuda
