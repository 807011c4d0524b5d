// The fastest resident pass of a problem, or the one that is asked for.
#pragma once

#include "plan.h"
#include "problem.h"

namespace bnext::cuda {

// A resident pass, if its resident_bytes are above 0, and how long it takes.
struct TimedPartition {
  Partition partition = {};
  double us = 0;

  bool exists() const { return partition.resident_bytes > 0; }
};

TimedPartition resident_partition(const Problem&, const DeviceProperties&, const PlanOptions&);

// Why there is no resident pass of the wanted details, and which one there is.
std::string why_not_resident(const Problem&, const DeviceProperties&, const PlanOptions&);

}  // namespace bnext::cuda
