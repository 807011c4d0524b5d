// What the blocks of a tile need to merge their partial results: shared memory, scratch, and who merges.
#pragma once

#include "problem.h"

namespace bnext::cuda {

// Shared memory of the pass's blocks and, where they exchange through the device's memory, the plan's partial results
// and a counter for each tile.
void set_partial_results(const Problem&, Partition* merging, Plan*);

// Blocks that share the merge of a tile. They wait for each other: all of them must have room, and none another tile to
// go on to, unless that waits for the merge itself.
void set_merge_workers(const Problem&, const DeviceProperties&, Partition* merging);

}  // namespace bnext::cuda
