#include <algorithm>

#include "describe_plan.h"
#include "partitioning.h"
#include "plan_kinds.h"
#include "time_model.h"

namespace bnext::cuda {
namespace {

// A resident pass, if its resident_bytes are above 0, and how long it takes.
struct TimedPartition {
  Partition partition = {};
  double us = 0;

  bool exists() const { return partition.resident_bytes > 0; }
};

// A column tile is kMaxTileVecs vectors wide: 256-byte rows. In a resident pass it may be as narrow as 64 bytes: still
// whole sectors, and more tiles out of few channels, of which more rows fit the device.
constexpr int64_t kNarrowBytes = 64;

// A resident pass with clusters of that size: its threads, and what its blocks keep.
Partition clustered(const Problem& problem, Partition partition, int32_t cluster) {
  const int64_t vec_bytes = problem.vec_bytes();
  partition.clustered = true;
  partition.groups = partition.tiles;
  partition.splits = cluster;
  partition.steps_per_split = ceil_div(partition.steps, cluster);
  if (partition.by_columns) {
    set_thread_rows(partition, partition.steps_per_split);
    if (!partition.packed()) partition.exchange_bytes = partition.tile_width() * problem.state_bytes;
    partition.resident_bytes = std::max<int64_t>(1, partition.columns.packs) *
                               ceil_div(partition.steps_per_split, partition.columns.thread_rows) * partition.threads *
                               vec_bytes;
  } else {
    set_planar_threads(partition, threads_for(ceil_div(partition.steps_per_split, kVecsPerThread)));
    partition.resident_bytes = partition.steps_per_split * vec_bytes;
  }
  return partition;
}

// Keeps the faster of two passes, the first of equals.
void keep_faster(TimedPartition& best, const Problem& problem, const Partition& other, const DeviceProperties& device) {
  const double us = resident_time(problem, other, device);
  if (!best.exists() || us < best.us) best = {other, us};
}

// What waves of clusters do for each other. Of pairs of blocks to a multiprocessor that take several waves, the second
// of the first wave wait for as long as it takes the first to load what they keep. And all blocks fetch as much of what
// comes next as memory brings while they exchange.
void set_waves(Partition& partition, const Problem& problem, const DeviceProperties& device) {
  constexpr double kCyclesPerUs = 1700;  // about
  constexpr double kPrefetchUs = 2.7;
  if (partition.resident_bytes == 0) return;
  const int32_t per_sm = blocks_together(problem, partition, device);
  const int64_t together = clusters_together(device, partition.splits, per_sm);
  if (partition.tiles > together) {
    partition.first_wave = static_cast<uint32_t>(together);
    const double us =
        static_cast<double>(partition.resident_bytes * device.multiprocessors) / static_cast<double>(device.bandwidth);
    if (per_sm > 1) partition.stagger_cycles = static_cast<uint32_t>(us * kCyclesPerUs);
  } else if (problem.apply_extras == 0) {
    return;
  }
  const double bytes =
      std::min(kPrefetchUs * static_cast<double>(device.bandwidth), static_cast<double>(device.l2_bytes) / 4);
  const int64_t threads = std::min(partition.tiles, together) * partition.splits * partition.threads;
  const int64_t parts = std::max(1, partition.columns.packs);
  partition.prefetch_vecs = static_cast<int32_t>(bytes / static_cast<double>(threads * parts * problem.vec_bytes()));
}

// With clusters of the size that takes the least time, if that is less than `best` takes; or of the size that is asked
// for.
void keep_fastest_cluster(TimedPartition& best, const Problem& problem, const Partition& base,
                          const DeviceProperties& device, int32_t requested) {
  const bool has_clusters = device.compute_capability >= 90 && device.clusters;
  for (int32_t cluster = 1; cluster <= kLargeCluster; cluster *= 2) {
    if (requested > 0 && cluster != requested) continue;
    if (cluster > base.steps || (cluster > 1 && (!has_clusters || clusters_together(device, cluster, 1) == 0)))
      continue;
    const Partition partition = clustered(problem, base, cluster);
    // Where blocks exchange columns, there is a thread to each of them.
    if (partition.exchange_bytes > 0 && partition.threads < partition.tile_width()) continue;
    if (blocks_together(problem, partition, device) > 0) keep_faster(best, problem, partition, device);
  }
}

TimedPartition resident_planar(const Problem& problem, const DeviceProperties& device, int32_t requested) {
  const int32_t vec = problem.vec();
  const Partition base = problem.shape.s % vec == 0 ? planar(problem.shape, vec) : packed_planes(problem.shape, vec);
  TimedPartition best;
  if (base.tiles == 0) return best;
  keep_fastest_cluster(best, problem, base, device, requested);
  set_waves(best.partition, problem, device);
  return best;
}

// What the blocks of a group have room for: so many of them are on the device at a time, each with so much shared
// memory, and so much of their threads' registers.
struct Room { int64_t slots, capacity, register_bytes; };

// Groups of blocks that together fill the device, and take the tiles in turn: in the fewest rounds whose slices fit, or
// with as many groups, or blocks in each, as are asked for. resident_bytes is 0 where nothing fits, or where a block
// holds a tile: that is a cluster of one.
Partition in_groups(Partition partition, const Room& room, const Problem& problem, const PlanChoice& requested) {
  const auto [slots, capacity, register_bytes] = room;
  const int64_t stride_bytes = partition.threads * problem.vec_bytes();
  const int64_t register_vecs = register_bytes / problem.vec_bytes();
  const int64_t max_steps = (capacity / stride_bytes + register_vecs) * partition.columns.thread_rows;
  if (max_steps <= 0) return {};
  const int64_t splits = requested.splits ? requested.splits : ceil_div(partition.steps, max_steps);
  const int64_t max_groups = std::min({partition.tiles, slots / splits, kMaxGroups});
  if (max_groups == 0 || requested.groups > max_groups) return {};
  const int64_t groups = requested.groups   ? requested.groups
                         : requested.splits ? max_groups
                                            : ceil_div(partition.tiles, ceil_div(partition.tiles, max_groups));
  set_splits(partition, requested.splits ? requested.splits : slots / groups, partition.columns.thread_rows);
  partition.groups = groups;
  int64_t strides = partition.steps_per_split / partition.columns.thread_rows;
  if (strides * stride_bytes > capacity) {
    if (strides <= register_vecs) return {};
    partition.register_vecs = static_cast<int32_t>(register_vecs);
    // The last split may have less than registers hold, and then is kept as far as whole chunks of it go.
    const int64_t multiple = resident_strides(problem.reduce_inputs);
    strides = ceil_div(strides - register_vecs, multiple) * multiple;
  }
  partition.resident_bytes = strides * stride_bytes;
  const bool fits = partition.splits > 1 && partition.blocks() <= slots && partition.resident_bytes <= capacity;
  return fits && (requested.splits == 0 || requested.splits == partition.splits) ? partition : Partition{};
}

// So many groups whose tiles do not fit: as much of each block's slice as does, in whole resident_strides().
Partition partly_in_groups(Partition partition, int64_t groups, const Room& room, const Problem& problem,
                           const DeviceProperties& device, const PlanChoice& requested) {
  const auto [slots, capacity, register_bytes] = room;
  const int64_t splits = requested.splits ? requested.splits : slots / groups;
  if (groups > std::min(partition.tiles, kMaxGroups) || splits < 2 || groups * splits > slots) return {};
  set_splits(partition, splits, partition.columns.thread_rows);
  partition.groups = groups;
  const int64_t stride_bytes = partition.threads * problem.vec_bytes();
  int64_t strides = ceil_div(partition.steps_per_split, partition.columns.thread_rows);
  const int64_t register_vecs = register_bytes / problem.vec_bytes();
  if (strides > register_vecs) {
    partition.register_vecs = static_cast<int32_t>(register_vecs);
    strides -= register_vecs;
  }
  const int64_t multiple = resident_strides(problem.reduce_inputs),
                kept = capacity / stride_bytes / multiple * multiple;
  if (kept == 0 || kept >= strides || partition.splits < 2) return {};
  if (requested.splits && requested.splits != partition.splits) return {};
  partition.resident_bytes = kept * stride_bytes;
  partition.reread_bytes = (strides - kept) * stride_bytes;
  const int64_t cached = device.l2_bytes / 2 / partition.blocks() / stride_bytes;
  partition.l2_steps = std::min(cached, strides - kept) * partition.columns.thread_rows;
  return partition;
}

// In clusters, or in groups of all blocks that the device holds at a time, in pairs on a multiprocessor or one by one;
// and with tiles as wide as take the least time.
TimedPartition resident_columns(const Problem& problem, int32_t max_per_sm, const DeviceProperties& device,
                                const PlanOptions& options) {
  const int64_t row_bytes = problem.vec() * size_of(problem.dtype);
  const auto narrow = static_cast<int32_t>(std::max<int64_t>(1, kNarrowBytes / row_bytes));
  Partition partition = columns(problem.shape, problem.vec(), problem.shape.c, 1, narrow, /*merges=*/true);
  if (partition.repeat > 1) return {};
  const PlanChoice& requested = options.plan;
  const int64_t vecs = partition.columns.cols / partition.vec;
  if (requested.tile_vecs > vecs) return {};
  if (requested.tile_vecs > 0) set_tile_vecs(partition, requested.tile_vecs, /*merges=*/true);
  const int64_t reserved = reserved_bytes(problem.merge_bytes(partition));
  TimedPartition best;
  for (int32_t tile_vecs = kMaxTileVecs; tile_vecs >= narrow; tile_vecs /= 2) {
    if (requested.tile_vecs == 0) set_tile_vecs(partition, ceil_div(vecs, ceil_div(vecs, tile_vecs)), /*merges=*/true);
    if (!requested.grouped()) keep_fastest_cluster(best, problem, partition, device, requested.cluster);
    const bool has_groups = device.cooperative && requested.cluster == 0;
    for (int32_t per_sm = max_per_sm; per_sm >= 1 && has_groups; --per_sm) {
      const int64_t slots = per_sm * std::max<int64_t>(1, device.multiprocessors - options.sm_margin);
      const int64_t capacity = std::min(device.shared_per_block, device.shared_per_multiprocessor / per_sm) - reserved;
      const Room room = {slots, capacity, per_sm == 1 ? problem.register_bytes() : 0};
      const Partition whole = in_groups(partition, room, problem, requested);
      int64_t rounds = partition.tiles;
      if (whole.resident_bytes > 0) {
        keep_faster(best, problem, whole, device);
        rounds = ceil_div(whole.tiles, whole.groups) - 1;
      }
      // To read some again may take less time than another round.
      if (rounds == 0) continue;
      const int64_t groups = requested.groups ? requested.groups : ceil_div(partition.tiles, rounds);
      const Partition partly = partly_in_groups(partition, groups, room, problem, device, requested);
      if (partly.resident_bytes > 0) keep_faster(best, problem, partly, device);
    }
    if (requested.tile_vecs > 0) break;
  }
  return best;
}

// The PlanChoice that reproduces this partition.
PlanChoice choice_of(const Partition& resident) {
  PlanChoice choice = {};
  choice.kind = PlanKind::resident;
  if (resident.clustered) choice.cluster = static_cast<uint8_t>(resident.splits);
  if (resident.interleaved()) choice.tile_vecs = static_cast<uint8_t>(resident.columns.tile_vecs);
  if (!resident.clustered) {
    choice.groups = static_cast<uint16_t>(resident.groups);
    choice.splits = static_cast<uint16_t>(resident.splits);
  }
  return choice;
}

TimedPartition resident_partition(const Problem& problem, const DeviceProperties& device, const PlanOptions& options) {
  const PlanChoice& requested = options.plan;
  if (problem.shape.numel() == 0 || !has_resident_kernels(size_of(problem.dtype), problem.general)) return {};
  if (problem.shape.layout == Layout::planar) {
    return requested.interleaved_details() ? TimedPartition{} : resident_planar(problem, device, requested.cluster);
  }
  const int32_t max_per_sm = resident_blocks_per_sm(size_of(problem.dtype), problem.general, true);
  return resident_columns(problem, max_per_sm, device, options);
}

// Why there is no resident pass of the wanted details, and which one there is.
std::string why_not(const Problem& problem, const DeviceProperties& device, const PlanOptions& options) {
  if (problem.shape.numel() == 0) return "it is empty";
  if (!has_resident_kernels(size_of(problem.dtype), problem.general)) return "it is not compiled for this activation";
  const PlanChoice& requested = options.plan;
  const bool is_planar = problem.shape.layout == Layout::planar;
  if (is_planar && requested.interleaved_details()) return "in a planar layout, the one detail is cluster";
  if (requested.cluster > 1 && device.compute_capability < 90) return "clusters need compute capability 9.0";
  if (requested.cluster > 1 && !device.clusters) return "the device refuses clusters";
  if (requested.grouped() && !device.cooperative) return "the device has no cooperative launches, or refuses them";
  const std::string capacity =
      std::to_string(std::max<int64_t>(1, device.multiprocessors - (is_planar ? 0 : options.sm_margin))) +
      " multiprocessors of " + std::to_string(device.shared_per_multiprocessor) + " bytes of shared memory";
  if (!requested.details())
    return "its channels do not fit " + capacity + ", or its rows are not whole 16-byte vectors";
  PlanOptions open = options;
  open.plan = {PlanKind::resident};
  const TimedPartition allowed = resident_partition(problem, device, open);
  const std::string other =
      allowed.exists() ? "'" + to_string(choice_of(allowed.partition)) + "' does" : "nor does any other 'resident'";
  return "it does not fit " + capacity + "; " + other;
}

}  // namespace

bool plan_resident(const Problem& problem, const DeviceProperties& device, const PlanOptions& options, Plan* plan,
                   std::string* refusal) {
  const TimedPartition found = resident_partition(problem, device, options);
  if (!found.exists()) {
    if (refusal) *refusal = why_not(problem, device, options);
    return false;
  }
  plan->kind = PlanKind::resident;
  plan->us() = found.us;
  Partition& partition = plan->resident = found.partition;
  partition.shared_bytes = problem.merge_bytes(partition);
  plan->counters = problem.reads_counter ? 1 : 0;  // nothing but blocks that have read it
  if (partition.cooperative())
    plan->flagged_bytes = flagged_bytes(partition, problem.state_bytes, problem.summary_bytes);
  return true;
}

std::string describe_resident(const Plan& plan) {
  const std::string exchange = "; an exchange of " + std::to_string(plan.flagged_bytes) + " bytes";
  return "1 launch of " + describe(plan.resident) + (plan.flagged_bytes > 0 ? exchange : "");
}

}  // namespace bnext::cuda
