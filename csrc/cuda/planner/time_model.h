// How long plans take: what the automatic plan goes by. docs/performance.md says how good its choices are.
#pragma once

#include "plan.h"
#include "problem.h"

namespace bnext::cuda {

// Blocks of a resident pass that find room on a multiprocessor, at most two of them; 0 where one does not.
int32_t blocks_together(const Problem&, const Partition&, const DeviceProperties&);

// Clusters of `size` blocks that are on the device together, with `per_sm` of the blocks on a multiprocessor.
int64_t clusters_together(const DeviceProperties&, int64_t size, int32_t per_sm);

// Microseconds of a resident pass and of two passes.
double resident_time(const Problem&, const Partition&, const DeviceProperties&);
double two_pass_time(const Problem&, const DeviceProperties&);

}  // namespace bnext::cuda
