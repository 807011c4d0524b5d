// The passes of `two_pass`, which `cooperative` runs in one launch.
#pragma once

#include "problem.h"

namespace bnext::cuda {

// Whether the second of two launches may begin while the first is running.
constexpr bool launches_overlap(const DeviceProperties& device) { return device.compute_capability >= 90; }

// Both passes, as fast as each is on its own.
void make_passes(const Problem&, const DeviceProperties&, Plan*);

// What depends on how their blocks share them out.
void finish_passes(const Problem&, const DeviceProperties&, Plan*);

}  // namespace bnext::cuda
