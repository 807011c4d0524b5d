#include <cstdio>

#include "plan.h"

namespace bnext::cuda {
namespace {

std::string counted(int64_t count, const std::string& what) {
  return std::to_string(count) + " " + what + (count == 1 ? "" : "s");
}

}  // namespace

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
  return out + "; " + std::to_string(partition.shared_bytes + partition.resident_bytes + partition.exchange_bytes) +
         " bytes of shared memory a block";
}

std::string describe(const Plan& plan) {
  std::string out = name_of(plan.kind);
  switch (plan.kind) {
    case PlanKind::resident: out += ": 1 launch of " + describe(plan.resident); break;
    case PlanKind::cooperative: out += ": 1 launch of " + counted(plan.blocks, "block"); break;
    case PlanKind::automatic:  // never a plan
    case PlanKind::two_pass:
      out += ": 2 launches, of " + describe(plan.reduce) +
             (plan.reduce.merge_workers > 1 ? ", the last " + std::to_string(plan.reduce.merge_workers) + " merging"
                                            : "") +
             ", and of " + describe(plan.apply) + (plan.apply.pdl ? "; the second overlaps the first" : "");
  }
  if (plan.partial_bytes > 0) out += "; partial results of " + std::to_string(plan.partial_bytes) + " bytes";
  if (plan.resident_us > 0) {
    char times[80];
    std::snprintf(times, sizeof(times), "; predicted: resident %.1f us, two_pass %.1f us", plan.resident_us,
                  plan.two_pass_us);
    out += times;
  }
  return out;
}

}  // namespace bnext::cuda
