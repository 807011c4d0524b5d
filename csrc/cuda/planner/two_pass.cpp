#include "two_pass.h"

#include <algorithm>

#include "describe_plan.h"
#include "partitioning.h"
#include "plan_kinds.h"
#include "time_model.h"

namespace bnext::cuda {
namespace {

// Blocks to a tile of columns, at most: of the widest tile, 128 channels, the threads of one block load the partial
// results of 16 splits in one go, and then those of 16 sections.
constexpr int64_t kMaxMergedSplits = 256;

// Strides of a block in one elementwise split, at most: enough to amortize a thread's channel coefficients,
// one set in planar form and one for each element of its vector in columns.
constexpr int64_t kPlanarApplyStrides = 8;
constexpr int64_t kColumnsApplyStrides = 16;

Partition reduce_partition(const Shape& shape, int32_t vec, const DeviceProperties& device) {
  if (shape.layout == Layout::planar) {
    Partition partition = planar(shape, vec);
    set_planar_threads(partition, threads_for(ceil_div(partition.steps, kVecsPerThread)));
    int64_t slots = int64_t{device.multiprocessors} * blocks_per_sm(false, partition.planar.aligned) *
                    (kMaxThreads / partition.threads);
    int64_t max_splits = ceil_div(partition.steps, partition.threads * kVecsPerThread);
    set_splits(partition, splits_for(std::max<int64_t>(1, partition.tiles), slots, max_splits), partition.threads);
    return partition;
  }
  Partition partition = columns(shape, vec, shape.c, 1, kMaxTileVecs, /*merges=*/true);
  int64_t slots =
      std::min(kMaxMergedSplits * partition.tiles, device.multiprocessors * int64_t{blocks_per_sm(true, true)});
  int64_t max_splits = ceil_div(partition.steps, partition.columns.thread_rows * kVecsPerThread);
  set_splits(partition, splits_for(std::max<int64_t>(1, partition.tiles), slots, max_splits),
             partition.columns.thread_rows);
  return partition;
}

// At most `max_strides` to a block; so many blocks that they fill whole waves of the device, since the last of another
// wave would run alone.
void set_apply_splits(Partition& partition, int64_t stride, int64_t max_strides, const DeviceProperties& device) {
  const int64_t slots =
      int64_t{device.multiprocessors} * blocks_per_sm(partition.by_columns, true) * (kMaxThreads / partition.threads);
  const int64_t strides = ceil_div(partition.steps, stride), tiles = std::max<int64_t>(1, partition.tiles);
  const int64_t waves = std::max<int64_t>(1, ceil_div(strides * tiles, slots * max_strides));
  set_splits(partition, std::max<int64_t>(1, waves * slots / tiles), stride);
}

Partition apply_partition(const Shape& shape, int32_t vec, const DeviceProperties& device) {
  const bool is_planar = shape.layout == Layout::planar;
  Partition partition;
  if (is_planar && shape.s % vec == 0) {
    partition = planar(shape, vec);
    set_planar_threads(partition, threads_for(partition.steps));
    set_apply_splits(partition, partition.threads, kPlanarApplyStrides, device);
  } else {
    // Planes that are not whole vectors: a vector may hold several channels, which columns provide for.
    partition = is_planar ? columns(shape, vec, shape.c * shape.s, shape.s, kMaxTileVecs, /*merges=*/false)
                          : columns(shape, vec, shape.c, 1, kMaxTileVecs, /*merges=*/false);
    set_apply_splits(partition, partition.columns.thread_rows, kColumnsApplyStrides, device);
  }
  partition.pdl = launches_overlap(device);
  return partition;
}

// How many splits of a tile are merged before all are: as many as there will be sections, so that both take about as
// long; or 1 (none are), where the threads of one block load the partial results of all in one go, or two: as long as
// it takes to count blocks once more.
int32_t merge_section(const Problem& problem, const Partition& merging) {
  if (!merging.by_columns) return 1;
  // Where a channel's columns lie in several tiles, one block merges all of these.
  const int64_t together = merging.splits * (merging.repeat == 1 ? 1 : merging.tiles);
  const int64_t at_once = kMaxThreads * merge_batch(problem.state_bytes, /*columns=*/true);
  if (together * merging.tile_width() <= 2 * at_once) return 1;
  int64_t section = 1;
  while (section * section < together) ++section;
  return static_cast<int32_t>(std::min(section, merging.splits));
}

// What the blocks of a tile need to merge their partial results: shared memory, scratch, and a counter for each tile
// and each section of its splits.
void set_partial_results(const Problem& problem, Plan* plan) {
  Partition& merging = plan->reduce;
  merging.shared_bytes = problem.merge_bytes(merging);
  merging.merge_section = merge_section(problem, merging);
  if (merging.splits == 1 && merging.repeat == 1) return;
  plan->partial_bytes = merging.tiles * merging.splits * merging.tile_width() * problem.state_bytes;
  plan->counters = merging.tiles * (merging.merge_section > 1 ? 1 + merging.merge_sections() : 1);
}

}  // namespace

void make_passes(const Problem& problem, const DeviceProperties& device, Plan* plan) {
  plan->reduce = reduce_partition(problem.shape, problem.reduce_vec(), device);
  plan->apply = apply_partition(problem.shape, problem.vec(), device);
}

void finish_passes(const Problem& problem, const DeviceProperties& device, Plan* plan) {
  // Of what the reduction reads, the second pass should find half an L2 cache full.
  const double fraction =
      static_cast<double>(device.l2_bytes) / 2 / static_cast<double>(std::max<int64_t>(1, problem.bytes()));
  plan->reduce.l2_steps =
      static_cast<int64_t>(static_cast<double>(plan->reduce.steps_per_split) * std::min(1.0, fraction));
  if (plan->apply.by_columns) plan->apply.shared_bytes = problem.coefficient_bytes * kMaxTileVecs * plan->apply.vec;
  set_partial_results(problem, plan);
}

// Any shape on any device has one.
bool plan_two_pass(const Problem& problem, const DeviceProperties& device, const PlanOptions&, Plan* plan,
                   std::string*) {
  plan->kind = PlanKind::two_pass;
  make_passes(problem, device, plan);
  finish_passes(problem, device, plan);
  plan->us() = two_pass_time(problem, device);
  return true;
}

std::string describe_two_pass(const Plan& plan) {
  const int32_t section = plan.reduce.merge_section;
  return "2 launches, of " + describe(plan.reduce) +
         (section > 1 ? ", merged " + std::to_string(section) + " at a time" : "") + ", and of " +
         describe(plan.apply) + (plan.apply.pdl ? "; the second overlaps the first" : "");
}

}  // namespace bnext::cuda
