#include "plan.h"

#include <algorithm>

#include "partitioning.h"
#include "problem.h"
#include "resident.h"
#include "time_model.h"

namespace bnext::cuda {
namespace {

// A tensor that is larger than this should use the whole device, even if that means reading it twice; one that
// is not should take one launch.
constexpr int64_t kSmallBytes = 2 * 1024 * 1024;

// So many bytes of partial results take another block to merge them: one for each thread of a block, where they are
// largest.
constexpr int64_t kMergeWorkerBytes = 4 * 1024;
constexpr int64_t kMaxMergeWorkers = 8;    // tests/simt has room for as many blocks
constexpr int64_t kMoreMergeWorkers = 16;  // of resident blocks, where that saves a batch: see merge_batch()

// Blocks to a tile of columns: as many partial results as a block that merges 16 channels of them has in flight.
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
  partition.pdl = device.compute_capability >= 90;
  return partition;
}

// Both passes with the same threads; fewer than a pass would take on its own stay idle in it.
void set_cooperative(Plan& plan, const DeviceProperties& device, const PlanOptions& options) {
  plan.kind = PlanKind::cooperative;
  for (Partition* partition : {&plan.reduce, &plan.apply}) {
    if (!partition->by_columns) {
      set_planar_threads(*partition, kMaxThreads);
      set_splits(*partition, ceil_div(partition->steps, partition->steps_per_split), kMaxThreads);
    }
    partition->threads = kMaxThreads;
  }
  plan.blocks = std::min(std::max(plan.reduce.blocks(), plan.apply.blocks()),
                         std::max<int64_t>(1, device.multiprocessors - options.sm_margin));
}

// Why the plan is none that `options` ask for.
std::string why_not(const Problem& problem, const DeviceProperties& device, const PlanOptions& options) {
  if (problem.shape.numel() == 0) return "it is empty";
  if (options.plan.kind != PlanKind::cooperative) return why_not_resident(problem, device, options);
  if (problem.general) return "it is not compiled for this activation";
  return "the device has no cooperative launches, or refuses them";
}

// What the blocks of a tile need to merge their partial results: shared memory, scratch, and who merges.
void set_merge(Plan& plan, const Problem& problem, const DeviceProperties& device) {
  Partition& merging = plan.kind == PlanKind::resident ? plan.resident : plan.reduce;
  merging.shared_bytes = problem.merge_bytes(merging);
  if ((merging.splits > 1 || merging.repeat > 1) && !merging.clustered) {
    plan.partial_bytes = merging.tiles * merging.splits * merging.tile_width() * problem.state_bytes;
    plan.counters = merging.tiles;
    if (plan.kind == PlanKind::resident) {
      // Two numbers to a channel, of whose words each has a flag.
      plan.counters = summaries_at(merging.tiles) + merging.groups * merging.tile_width() * acc_size_of(problem.dtype);
    }
  }
  // Blocks that share a merge wait for each other, so that all of them must have room, and none another tile to go on
  // to, unless it waits for the merge itself.
  merging.merge_workers = 1;
  if (plan.kind == PlanKind::two_pass || merging.cooperative()) {
    const int64_t blocks = merging.repeat == 1 ? merging.splits : merging.blocks();
    const int64_t states = blocks * merging.tile_width();
    // More of blocks that are all there, where threads would merge what they have in two batches.
    const bool batches = states > kMaxMergeWorkers * kMaxThreads * merge_batch(problem.state_bytes, merging.by_columns);
    const int64_t max_workers = merging.cooperative() && batches ? kMoreMergeWorkers : kMaxMergeWorkers;
    merging.merge_workers =
        static_cast<int32_t>(std::clamp<int64_t>(states * problem.state_bytes / kMergeWorkerBytes, 1,
                                                 std::min({max_workers, blocks, int64_t{device.multiprocessors}})));
  }
  if (plan.kind == PlanKind::cooperative) ++plan.counters;  // for the barrier
}

Plan make_plan(const Problem& problem, const DeviceProperties& device, const PlanOptions& options,
               std::string* refusal) {
  const Shape& shape = problem.shape;
  Plan plan = {};
  plan.kind = PlanKind::two_pass;
  plan.reduce = reduce_partition(shape, problem.reduce_vec(), device);
  plan.apply = apply_partition(shape, problem.vec(), device);

  const PlanKind requested = options.plan.kind;
  if (shape.numel() > 0 && (requested == PlanKind::automatic || requested == PlanKind::resident)) {
    const TimedPartition resident = resident_partition(problem, device, options);
    if (resident.exists()) {
      plan.resident_us = resident.us;
      plan.two_pass_us = two_pass_time(problem, device);
      if (requested == PlanKind::resident || plan.resident_us < plan.two_pass_us) {
        plan.kind = PlanKind::resident;
        plan.resident = resident.partition;
      }
    }
  }
  const bool fits_caches = problem.bytes() <= kSmallBytes && plan.kind == PlanKind::two_pass;
  // Two launches that overlap take less time than a barrier of the whole grid: measured.
  const bool one_launch_pays = fits_caches && !plan.apply.pdl;
  if (shape.numel() > 0 && device.cooperative && !problem.general &&
      (requested == PlanKind::cooperative || (requested == PlanKind::automatic && one_launch_pays))) {
    set_cooperative(plan, device, options);
  }
  if (refusal && requested != PlanKind::automatic && requested != plan.kind) {
    *refusal = why_not(problem, device, options);
  }

  // Of what the reduction reads, the second pass should find half an L2 cache full.
  const double fraction =
      static_cast<double>(device.l2_bytes) / 2 / static_cast<double>(std::max<int64_t>(1, problem.bytes()));
  plan.reduce.l2_steps =
      static_cast<int64_t>(static_cast<double>(plan.reduce.steps_per_split) * std::min(1.0, fraction));

  if (plan.apply.by_columns) plan.apply.shared_bytes = problem.coefficient_bytes * kMaxTileVecs * plan.apply.vec;
  set_merge(plan, problem, device);
  return plan;
}

}  // namespace

Plan plan_forward(const BatchNormForwardParams& p, const DeviceProperties& device, const PlanOptions& options,
                  std::string* refusal) {
  Problem problem = {};
  problem.shape = p.shape;
  problem.dtype = p.dtype;
  problem.general = epilogue_of(p) == Epilogue::general;
  problem.masked = masks(epilogue_of(p));
  problem.reduce_inputs = 1;
  problem.apply_extras = p.residual ? 1 : 0;
  problem.set_numbers(kForwardNumbers);
  Plan plan = make_plan(problem, device, options, refusal);
  // Clusters count nothing but who has read num_batches_tracked.
  if (p.cumulative && p.num_batches_tracked && plan.kind == PlanKind::resident && plan.resident.clustered) {
    plan.counters = 1;
  }
  return plan;
}

Plan plan_backward(const BatchNormBackwardParams& p, const DeviceProperties& device, const PlanOptions& options,
                   std::string* refusal) {
  Problem problem = {};
  problem.shape = p.shape;
  problem.dtype = p.dtype;
  problem.general = derivative_of(p) == Derivative::general;
  problem.masked = problem.reduce_masked = masks(derivative_of(p));
  problem.reduce_inputs = 2;
  problem.apply_extras = problem.masked && p.dresidual ? 1 : 0;
  problem.set_numbers(kBackwardNumbers);
  PlanOptions allowed = options;
  if (!p.elementwise() || !p.reduces()) allowed.plan = {PlanKind::two_pass};  // or one pass of it
  return make_plan(problem, device, allowed, refusal);
}

}  // namespace bnext::cuda
