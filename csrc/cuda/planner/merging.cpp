#include "merging.h"

#include <algorithm>

namespace bnext::cuda {
namespace {

// So many bytes of partial results take another block to merge them: one for each thread of a block, where they are
// largest.
constexpr int64_t kMergeWorkerBytes = 4 * 1024;
constexpr int64_t kMaxMergeWorkers = 8;    // tests/simt has room for as many blocks
constexpr int64_t kMoreMergeWorkers = 16;  // of resident blocks, where that saves a batch: see merge_batch()

}  // namespace

void set_partial_results(const Problem& problem, Partition* merging, Plan* plan) {
  merging->shared_bytes = problem.merge_bytes(*merging);
  merging->merge_workers = 1;
  if (merging->clustered || (merging->splits == 1 && merging->repeat == 1)) return;
  plan->partial_bytes = merging->tiles * merging->splits * merging->tile_width() * problem.state_bytes;
  plan->counters = merging->tiles;
}

void set_merge_workers(const Problem& problem, const DeviceProperties& device, Partition* merging) {
  const int64_t blocks = merging->repeat == 1 ? merging->splits : merging->blocks();
  const int64_t states = blocks * merging->tile_width();
  // More of blocks that are all there, where threads would merge what they have in two batches.
  const bool batches = states > kMaxMergeWorkers * kMaxThreads * merge_batch(problem.state_bytes, merging->by_columns);
  const int64_t max_workers = merging->cooperative() && batches ? kMoreMergeWorkers : kMaxMergeWorkers;
  merging->merge_workers =
      static_cast<int32_t>(std::clamp<int64_t>(states * problem.state_bytes / kMergeWorkerBytes, 1,
                                               std::min({max_workers, blocks, int64_t{device.multiprocessors}})));
}

}  // namespace bnext::cuda
