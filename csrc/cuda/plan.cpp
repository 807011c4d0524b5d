#include "plan.h"

#include <algorithm>
#include <numeric>

namespace bnext::cuda {
namespace {

// A tensor that is larger than this should use the whole device, even if that means reading it twice; one that
// is not should take one launch.
constexpr int64_t kSmallBytes = 2 * 1024 * 1024;

// A column tile is kMaxTileVecs vectors wide: 256-byte rows. In a resident pass it may be as narrow as 64 bytes: still
// whole sectors, and more tiles out of few channels, of which more rows fit the device.
constexpr int64_t kNarrowBytes = 64;

// So many bytes of partial results make a share of their merge: one for each thread of a block, where they are largest.
constexpr int64_t kMergeShareBytes = 4 * 1024;
constexpr int64_t kMaxMergeShares = 8;    // tests/simt has room for as many blocks
constexpr int64_t kMoreMergeShares = 16;  // of resident blocks, where that saves a batch: see merge_batch()

// Blocks to a tile of columns: as many partial results as a block that merges 16 channels of them has in flight.
constexpr int64_t kMaxMergedSplits = 256;

// Strides of a block in one elementwise split, at most: enough to amortize a thread's channel coefficients,
// one set in planar form and one for each element of its vector in columns.
constexpr int64_t kPlanarApplyStrides = 8;
constexpr int64_t kColumnsApplyStrides = 16;

// Vectors that a thread of a planar reduction should have before a block gets more threads.
constexpr int64_t kVecsPerThread = 4;

int32_t threads_for(int64_t work) {
  int32_t threads = 32;
  while (threads < kMaxThreads && threads < work) threads *= 2;
  return threads;
}

// Splits that fill whole waves of `slots` resident blocks: the fewest waves that leave at most a
// tenth of the slots idle, else the best of four.
int64_t splits_for(int64_t tiles, int64_t slots, int64_t most) {
  int64_t best = 1;
  double best_filled = 0;
  for (int64_t waves = 1; waves <= 4 && best_filled < 0.9; ++waves) {
    int64_t splits = waves * slots / tiles;
    double filled = static_cast<double>(splits * tiles) / static_cast<double>(waves * slots);
    if (splits >= 1 && filled > best_filled) {
      best = splits;
      best_filled = filled;
    }
  }
  return std::min(best, std::max<int64_t>(1, most));
}

void set_splits(Partition& partition, int64_t splits, int64_t stride) {
  const int64_t most = std::max<int64_t>(1, kMaxCount / 2 / std::max<int64_t>(1, partition.tiles));
  splits = std::clamp<int64_t>(splits, 1, most);
  partition.steps_per_split = std::max(stride, ceil_div(ceil_div(partition.steps, splits), stride) * stride);
  partition.splits = std::max<int64_t>(1, ceil_div(partition.steps, partition.steps_per_split));
  partition.groups = partition.tiles;
}

Partition planar(const Shape& shape, int32_t vec) {
  Partition partition = {};
  partition.vec = vec;
  partition.vecs = ceil_div(shape.numel(), vec);
  partition.planar.aligned = shape.s % vec == 0;
  partition.planar.plane_vecs = partition.planar.aligned ? shape.s / vec : (shape.s + 2 * vec - 2) / vec;
  partition.tiles = shape.c;
  partition.steps = shape.n * partition.planar.plane_vecs;
  partition.repeat = 1;
  return partition;
}

void set_planar_threads(Partition& partition, int32_t threads) {
  partition.threads = threads;
  partition.planar.stride_planes =
      partition.planar.plane_vecs > 0 ? static_cast<int32_t>(threads / partition.planar.plane_vecs) : 0;
  partition.planar.stride_vecs =
      static_cast<int32_t>(threads - partition.planar.stride_planes * partition.planar.plane_vecs);
}

// Rows that a block of `columns.lanes` to a row takes in one stride, of `steps` that it has.
void set_thread_rows(Partition& partition, int64_t steps) {
  const int64_t lanes = partition.columns.lanes;
  const int64_t rows = std::clamp<int64_t>(ceil_div(steps, kVecsPerThread), 1, kMaxThreads / lanes);
  partition.columns.thread_rows = static_cast<int32_t>(rows);
  partition.threads = static_cast<int32_t>(ceil_div(lanes * rows, kWarp) * kWarp);
}

// Tiles of so many vectors of a row. `merges`: the threads of a block will merge what they have.
void set_tile_vecs(Partition& partition, int64_t tile_vecs, bool merges) {
  partition.tiles = ceil_div(partition.columns.cols / partition.vec, tile_vecs);
  partition.columns.tile_vecs = static_cast<int32_t>(tile_vecs);
  int32_t lanes = 1;
  while (lanes < tile_vecs) lanes *= 2;
  partition.columns.lanes = merges ? lanes : partition.columns.tile_vecs;
  set_thread_rows(partition, partition.steps);
}

// `period` is the number of elements after which channels recur: c, or c * s for planes.
Partition columns(const Shape& shape, int32_t vec, int64_t period, int64_t channel_stride, int64_t tile_vecs,
                  bool merges) {
  Partition partition = {};
  partition.by_columns = true;
  partition.vec = vec;
  partition.vecs = ceil_div(shape.numel(), vec);
  partition.columns.channel_stride = channel_stride;
  partition.repeat = static_cast<int32_t>(vec / std::gcd(period, int64_t{vec}));
  partition.columns.cols = partition.repeat * period;
  partition.steps = partition.columns.cols > 0 ? ceil_div(shape.numel(), partition.columns.cols) : 0;
  const int64_t vecs = partition.columns.cols / vec, tiles = ceil_div(vecs, tile_vecs);
  set_tile_vecs(partition, std::max<int64_t>(1, ceil_div(vecs, std::max<int64_t>(1, tiles))), merges);
  return partition;
}

Partition reduce_partition(const Shape& shape, int32_t vec, const DeviceProperties& device) {
  if (shape.layout == Layout::planar) {
    Partition partition = planar(shape, vec);
    set_planar_threads(partition, threads_for(ceil_div(partition.steps, kVecsPerThread)));
    int64_t slots = int64_t{device.multiprocessors} * blocks_per_sm(false, partition.planar.aligned) *
                    (kMaxThreads / partition.threads);
    int64_t most = ceil_div(partition.steps, partition.threads * kVecsPerThread);
    set_splits(partition, splits_for(std::max<int64_t>(1, partition.tiles), slots, most), partition.threads);
    return partition;
  }
  Partition partition = columns(shape, vec, shape.c, 1, kMaxTileVecs, /*merges=*/true);
  int64_t slots =
      std::min(kMaxMergedSplits * partition.tiles, device.multiprocessors * int64_t{blocks_per_sm(true, true)});
  int64_t most = ceil_div(partition.steps, partition.columns.thread_rows * kVecsPerThread);
  set_splits(partition, splits_for(std::max<int64_t>(1, partition.tiles), slots, most), partition.columns.thread_rows);
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

// What a resident block needs beside its fraction: `merge_bytes` and some more, and what the system reserves.
int64_t reserved_bytes(int64_t merge_bytes) { return merge_bytes + 2048; }

// What the plans of one direction have in common.
struct Problem {
  Shape shape;
  DType dtype;
  bool general;               // an activation without kernels of its own
  bool masked;                // the elementwise pass reads or writes a mask
  bool reduce_masked;         // the reduction reads it
  int64_t tensors;            // that the reduction reads
  int64_t beside;             // that the elementwise pass alone reads, or writes beside its output
  int64_t state_bytes;        // of a partial result
  int64_t coefficient_bytes;  // of a channel, in the elementwise pass

  int32_t vec_of(bool with_mask) const { return with_mask ? 8 : static_cast<int32_t>(16 / size_of(dtype)); }
  int32_t vec() const { return vec_of(masked); }
  int64_t vec_bytes() const { return vec() * size_of(dtype) * tensors; }
  int64_t bytes() const { return shape.numel() * size_of(dtype) * tensors; }
  // Shared memory that merges the states of a block's threads.
  int64_t merge_bytes(const Partition& partition) const {
    const int64_t acc = acc_size_of(dtype), numbers = state_bytes / acc;
    if (!partition.by_columns) return planar_merge_bytes(numbers, acc);
    return partition.packed() ? packed_merge_bytes(numbers, acc) : column_merge_bytes(partition.vec, numbers, acc);
  }
};

// Planes that are not whole vectors, side by side; without tiles where the channels do not come out even, or a row has
// more vectors than a block has room for, and no parts to go through it in.
Partition packed_planes(const Shape& shape, int32_t vec) {
  Partition partition = {};
  if (shape.s < vec) return partition;  // a vector would have more channels than two
  const int64_t channels = vec / std::gcd(shape.s, int64_t{vec});
  const int64_t row_vecs = channels * shape.s / vec;
  // Equal parts, of a quarter of a kilobyte in a row at least; so many at most that nobody would search for long.
  constexpr int64_t kMinTileVecs = 16, kMaxPacks = 64;
  int64_t packs = ceil_div(row_vecs, kMaxThreads / 2);
  while (packs < kMaxPacks && row_vecs % packs != 0) ++packs;
  const bool even = row_vecs % packs == 0 && (packs == 1 || row_vecs / packs >= kMinTileVecs);
  if (shape.c % channels != 0 || packs > kMaxPacks || !even) return partition;
  partition.by_columns = true;
  partition.vec = vec;
  partition.vecs = ceil_div(shape.numel(), vec);
  partition.columns.channel_stride = shape.s;
  partition.repeat = 1;
  partition.columns.cols = shape.c * shape.s;
  partition.steps = shape.n;
  partition.columns.tile_channels = static_cast<int32_t>(channels);
  partition.tiles = shape.c / channels;
  partition.columns.packs = static_cast<int32_t>(packs);
  partition.columns.tile_vecs = partition.columns.lanes = static_cast<int32_t>(row_vecs / packs);
  return partition;
}

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

// How long plans take, in microseconds beyond what their bytes do, after what an H100 took for ResNet-50's layers in
// bfloat16 (docs/performance.md says how good the choice is).
struct TimeModel {
  double start = 1.2;          // a pass of clusters, once
  double pair = 3.1;           // a wave of them, two blocks to a multiprocessor: one loads while the other exchanges
  double alone = 4.0;          // of blocks that are alone there
  double cluster = 1.6;        // of clusters of more than one block, which wait for each other
  double rank = 0.06;          // and for each block
  double packed = 1.1;         // of packed planes
  double tile = 0.04;          // of tiles of interleaved channels, for each byte of a channel's state,
  double tile_rank = 0.06;     // and for each block besides
  double grid = 9.0;           // a round of groups, which exchange through memory
  double alone_inputs = 0.6;   // of blocks that are alone, for each input but the first
  double one_group = 1.0;      // of groups, where there is but one of two blocks to a multiprocessor
  double two_pass = 8.0;       // two launches, and the merge in between
  double covered = 2.0;        // vectors that cover planes, in the first of them
  double columns = 1.2;        // interleaved layouts, whose merge is longer
  double block_rate = 44500;   // bytes a microsecond that one block reads and writes,
  double tile_rate = 34000;    // and one of such tiles
  double again = 1.0;          // what is read again, of what memory takes for it: from the L2 cache,
  double from_memory = 1.6;    // and what is no longer there;
  double again_alone = 0.15;   // for each input but the first, of blocks that are alone,
  double again_pair = -0.22;   // and of pairs, which have enough in flight then;
  double again_narrow = 0.13;  // of rows that are narrow parts of the matrix's
  double beside = 1.2;         // what blocks that are alone move only then, as they have little in flight: of clusters,
  double grid_beside = 1.6;    // of groups,
  double again_beside = 2.0;   // and, also in pairs, of those that read parts of the matrix's rows again,
  double tile_beside = 2.4;    // and of clusters' tiles of interleaved channels
};
constexpr TimeModel kTimes;

// How much of the memory's bandwidth rows of so many bytes get.
double share_of_rows(int64_t bytes) { return bytes >= 256 ? 1.0 : bytes >= 128 ? 0.99 : 0.85; }

// Whether the tiles of a resident pass are of interleaved channels.
bool interleaved(const Partition& partition) { return partition.by_columns && !partition.packed(); }

// Blocks of a resident pass that find room on a multiprocessor, at most two of them; 0 where one does not.
int32_t blocks_together(const Problem& problem, const Partition& partition, const DeviceProperties& device) {
  const int64_t bytes =
      partition.resident_bytes + partition.exchange_bytes + reserved_bytes(problem.merge_bytes(partition));
  if (partition.resident_bytes == 0 || bytes > device.shared_per_block) return 0;
  const int32_t most = resident_blocks_per_sm(size_of(problem.dtype), problem.general, partition.by_columns);
  return static_cast<int32_t>(std::min<int64_t>(most, device.shared_per_multiprocessor / bytes));
}

// Clusters of `size` blocks that are on the device together, with `per_sm` of the blocks on a multiprocessor.
int64_t clusters_together(const DeviceProperties& device, int64_t size, int32_t per_sm) {
  if (size == 1) return int64_t{per_sm} * device.multiprocessors;
  int32_t i = 0;
  while (int64_t{2} << i < size) ++i;
  return int64_t{per_sm} * device.clusters_together[i];
}

// What a wave of clusters takes beyond its bytes.
double wave_time(const Problem& problem, const Partition& partition, int32_t per_sm) {
  const auto ranks = static_cast<double>(partition.splits);
  double us = (per_sm > 1 ? kTimes.pair : kTimes.alone) + kTimes.rank * ranks + (ranks > 1 ? kTimes.cluster : 0);
  if (partition.packed()) us += kTimes.packed;
  else if (interleaved(partition))
    us += kTimes.tile * static_cast<double>(problem.state_bytes) + kTimes.tile_rank * ranks;
  return us;
}

// A round of groups.
double round_time(const Problem& problem, const Partition& partition, const DeviceProperties& device, int32_t per_sm) {
  const auto more_inputs = static_cast<double>(problem.tensors - 1);
  const double again = static_cast<double>(partition.again_bytes) * static_cast<double>(partition.blocks());
  const double cached = std::min(again, static_cast<double>(device.l2_bytes) / 2);
  const bool narrow = partition.tiles > 1 && partition.tile_width() * size_of(problem.dtype) < 256;
  return kTimes.grid + (per_sm == 1 ? kTimes.alone_inputs * more_inputs : 0) +
         (kTimes.again * cached + kTimes.from_memory * (again - cached)) / static_cast<double>(device.bandwidth) *
             (1 + (per_sm == 1 ? kTimes.again_alone : kTimes.again_pair) * more_inputs +
              (narrow ? kTimes.again_narrow : 0));
}

// Tiles are taken in waves of clusters, or in rounds of groups.
double resident_time(const Problem& problem, const Partition& partition, const DeviceProperties& device) {
  const int32_t per_sm = blocks_together(problem, partition, device);
  const int64_t together = std::min(
      partition.tiles, partition.clustered ? clusters_together(device, partition.splits, per_sm) : partition.groups);
  // Of a wave, in and out; or of one of its blocks, where there are few.
  const double tile = static_cast<double>(problem.bytes()) / static_cast<double>(partition.tiles) *
                      static_cast<double>(problem.tensors + 1) / static_cast<double>(problem.tensors);
  auto rate = static_cast<double>(device.bandwidth);
  double once, more, block_rate, slower;
  if (partition.clustered) {
    once = kTimes.start;
    more = wave_time(problem, partition, per_sm);
    block_rate = interleaved(partition) ? kTimes.tile_rate : kTimes.block_rate;
    slower = interleaved(partition) ? kTimes.tile_beside : per_sm == 1 ? kTimes.beside : 1;
  } else {
    // Two blocks of a multiprocessor had better not wait at the same time.
    once = partition.groups < per_sm && partition.splits > 1 ? kTimes.one_group : 0;
    more = round_time(problem, partition, device, per_sm);
    rate *= share_of_rows(partition.tile_width() * size_of(problem.dtype));
    block_rate = kTimes.block_rate;
    slower = partition.again_bytes > 0 && partition.tiles > 1 ? kTimes.again_beside
             : per_sm == 1                                    ? kTimes.grid_beside
                                                              : 1;
  }
  const double beside = tile * static_cast<double>(problem.beside) / static_cast<double>(problem.tensors + 1) * slower;
  // Of so many tiles, in waves or rounds.
  const auto moving = [&](int64_t tiles) {
    return std::max((tile + beside) * static_cast<double>(tiles) / rate,
                    (tile + beside) / static_cast<double>(partition.splits) / block_rate);
  };
  const int64_t waves = ceil_div(partition.tiles, std::max<int64_t>(1, together));
  return once + static_cast<double>(waves) * more + static_cast<double>(waves - 1) * moving(together) +
         moving(partition.tiles - (waves - 1) * together);
}

double two_pass_time(const Problem& problem, const DeviceProperties& device) {
  // The second pass finds half an L2 cache full, in half the time.
  const double again = std::min(static_cast<double>(problem.bytes()), static_cast<double>(device.l2_bytes) / 2);
  const double all = static_cast<double>(problem.bytes()) *
                     static_cast<double>(2 * problem.tensors + 1 + problem.beside) /
                     static_cast<double>(problem.tensors);
  const bool is_planar = problem.shape.layout == Layout::planar;
  const bool covers = is_planar && problem.shape.s % problem.vec() != 0;
  return (all - again / 2) / (0.95 * static_cast<double>(device.bandwidth)) + kTimes.two_pass +
         (covers ? kTimes.covered : 0) + (is_planar ? 0 : kTimes.columns);
}

// A resident pass, if its resident_bytes are above 0, and its time, if there was another to compare it with.
struct TimedPartition {
  Partition partition = {};
  double us = 0;

  bool exists() const { return partition.resident_bytes > 0; }
};

// Keeps the faster of two passes, the first of equals.
void keep_faster(TimedPartition& best, const Problem& problem, const Partition& other, const DeviceProperties& device) {
  const double us = resident_time(problem, other, device);
  if (!best.exists() || us < best.us) best = {other, us};
}

// Of pairs of blocks to a multiprocessor that take several waves, the second of the first wave wait for as long as it
// takes the first to load what they keep.
void set_turns(Partition& partition, const Problem& problem, const DeviceProperties& device) {
  if (partition.resident_bytes == 0 || blocks_together(problem, partition, device) < 2) return;
  const int64_t together = clusters_together(device, partition.splits, 2);
  if (partition.tiles <= together) return;
  partition.first_wave = static_cast<uint32_t>(together);
  partition.late_ns =
      static_cast<uint32_t>(1000 * partition.resident_bytes * device.multiprocessors / device.bandwidth);
}

// With clusters of the size that takes the least time, if that is less than `best` takes; or of the size that is asked
// for.
void keep_fastest_cluster(TimedPartition& best, const Problem& problem, const Partition& base,
                          const DeviceProperties& device, int32_t wanted) {
  const bool has_clusters = device.compute_capability >= 90 && device.clusters;
  for (int32_t cluster = 1; cluster <= kLargeCluster; cluster *= 2) {
    if (wanted > 0 && cluster != wanted) continue;
    if (cluster > base.steps || (cluster > 1 && (!has_clusters || clusters_together(device, cluster, 1) == 0)))
      continue;
    const Partition partition = clustered(problem, base, cluster);
    // Where blocks exchange columns, there is a thread to each of them.
    if (partition.exchange_bytes > 0 && partition.threads < partition.tile_width()) continue;
    if (blocks_together(problem, partition, device) > 0) keep_faster(best, problem, partition, device);
  }
}

TimedPartition resident_planar(const Problem& problem, const DeviceProperties& device, int32_t wanted) {
  const int32_t vec = problem.vec();
  const Partition base = problem.shape.s % vec == 0 ? planar(problem.shape, vec) : packed_planes(problem.shape, vec);
  TimedPartition best;
  if (base.tiles == 0) return best;
  keep_fastest_cluster(best, problem, base, device, wanted);
  set_turns(best.partition, problem, device);
  return best;
}

// Groups of blocks that together fill `slots`, and take the tiles in turn: in the fewest rounds whose shares fit into
// `capacity` bytes of a block, or with as many groups, or blocks in each, as are asked for. resident_bytes is 0 where
// nothing fits.
Partition in_groups(Partition partition, int64_t slots, int64_t capacity, int64_t vec_bytes, const PlanChoice& wanted) {
  const int64_t stride_bytes = partition.threads * vec_bytes;
  const int64_t max_steps = capacity / stride_bytes * partition.columns.thread_rows;
  if (max_steps <= 0) return {};
  const int64_t splits = wanted.splits ? wanted.splits : ceil_div(partition.steps, max_steps);
  const int64_t most = std::min(partition.tiles, slots / splits);
  if (most == 0 || wanted.groups > most) return {};
  const int64_t groups = wanted.groups   ? wanted.groups
                         : wanted.splits ? most
                                         : ceil_div(partition.tiles, ceil_div(partition.tiles, most));
  set_splits(partition, wanted.splits ? wanted.splits : slots / groups, partition.columns.thread_rows);
  partition.groups = groups;
  partition.resident_bytes = partition.steps_per_split / partition.columns.thread_rows * stride_bytes;
  const bool fits = partition.blocks() <= slots && partition.resident_bytes <= capacity;
  return fits && (wanted.splits == 0 || wanted.splits == partition.splits) ? partition : Partition{};
}

// The same of tiles that do not fit: as much of each block's share as does, in whole resident_strides().
Partition partly_in_groups(Partition partition, int64_t slots, int64_t capacity, const Problem& problem,
                           const DeviceProperties& device, const PlanChoice& wanted) {
  const int64_t groups = wanted.groups ? wanted.groups : 1;
  const int64_t splits = wanted.splits ? wanted.splits : slots / groups;
  if (groups > partition.tiles || splits < 2 || groups * splits > slots) return {};
  set_splits(partition, splits, partition.columns.thread_rows);
  partition.groups = groups;
  const int64_t stride_bytes = partition.threads * problem.vec_bytes();
  const int64_t strides = ceil_div(partition.steps_per_split, partition.columns.thread_rows);
  const int64_t multiple = resident_strides(problem.tensors), kept = capacity / stride_bytes / multiple * multiple;
  if (kept == 0 || kept >= strides || partition.splits < 2) return {};
  if (wanted.splits && wanted.splits != partition.splits) return {};
  partition.resident_bytes = kept * stride_bytes;
  partition.again_bytes = (strides - kept) * stride_bytes;
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
  const PlanChoice& wanted = options.plan;
  const int64_t vecs = partition.columns.cols / partition.vec;
  if (wanted.tile_vecs > vecs) return {};
  if (wanted.tile_vecs > 0) set_tile_vecs(partition, wanted.tile_vecs, /*merges=*/true);
  const int64_t vec_bytes = problem.vec_bytes();
  const int64_t reserved = reserved_bytes(problem.merge_bytes(partition));
  TimedPartition best;
  for (int32_t tile_vecs = kMaxTileVecs; tile_vecs >= narrow; tile_vecs /= 2) {
    if (wanted.tile_vecs == 0) set_tile_vecs(partition, ceil_div(vecs, ceil_div(vecs, tile_vecs)), /*merges=*/true);
    if (!wanted.grouped()) keep_fastest_cluster(best, problem, partition, device, wanted.cluster);
    const bool has_groups = device.cooperative && wanted.cluster == 0;
    for (int32_t per_sm = max_per_sm; per_sm >= 1 && has_groups; --per_sm) {
      const int64_t slots = per_sm * std::max<int64_t>(1, device.multiprocessors - options.sm_margin);
      const int64_t capacity = std::min(device.shared_per_block, device.shared_per_multiprocessor / per_sm) - reserved;
      Partition grouped = in_groups(partition, slots, capacity, vec_bytes, wanted);
      if (grouped.resident_bytes == 0) grouped = partly_in_groups(partition, slots, capacity, problem, device, wanted);
      if (grouped.resident_bytes > 0) keep_faster(best, problem, grouped, device);
    }
    if (wanted.tile_vecs > 0) break;
  }
  return best;
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

TimedPartition resident_partition(const Problem& problem, const DeviceProperties& device, const PlanOptions& options) {
  const PlanChoice& wanted = options.plan;
  if (problem.general && problem.dtype == DType::f64) return {};  // not compiled: see Op::kResident
  if (problem.shape.layout == Layout::planar) {
    return wanted.interleaved_details() ? TimedPartition{} : resident_planar(problem, device, wanted.cluster);
  }
  const int32_t max_per_sm = resident_blocks_per_sm(size_of(problem.dtype), problem.general, true);
  return resident_columns(problem, max_per_sm, device, options);
}

// The wish that gives this pass.
PlanChoice choice_of(const Partition& resident) {
  PlanChoice choice = {};
  choice.kind = PlanKind::resident;
  if (resident.clustered) choice.cluster = static_cast<uint8_t>(resident.splits);
  if (interleaved(resident)) choice.tile_vecs = static_cast<uint8_t>(resident.columns.tile_vecs);
  if (!resident.clustered) {
    // Else a block to a tile, of which there may be many.
    if (resident.splits > 1 || resident.groups < resident.tiles) {
      choice.groups = static_cast<uint16_t>(resident.groups);
      choice.splits = static_cast<uint16_t>(resident.splits);
    }
  }
  return choice;
}

// Why there is no resident pass of the wanted details, and which one there is.
std::string why_not_resident(const Problem& problem, const DeviceProperties& device, const PlanOptions& options) {
  const PlanChoice& wanted = options.plan;
  const bool is_planar = problem.shape.layout == Layout::planar;
  if (is_planar && wanted.interleaved_details()) return "in a planar layout, the one detail is cluster";
  if (wanted.cluster > 1 && device.compute_capability < 90) return "clusters need compute capability 9.0";
  const std::string capacity =
      std::to_string(std::max<int64_t>(1, device.multiprocessors - (is_planar ? 0 : options.sm_margin))) +
      " multiprocessors of " + std::to_string(device.shared_per_multiprocessor) + " bytes of shared memory";
  if (!wanted.details()) return "its channels do not fit " + capacity + ", or make no whole vecs of 16 bytes";
  PlanOptions open = options;
  open.plan = {PlanKind::resident};
  const TimedPartition allowed = resident_partition(problem, device, open);
  const std::string other =
      allowed.exists() ? "'" + to_string(choice_of(allowed.partition)) + "' does" : "nor does any other 'resident'";
  return "it does not fit " + capacity + "; " + other;
}

Plan make_plan(const Problem& problem, const DeviceProperties& device, const PlanOptions& options,
               std::string* refusal) {
  const Shape& shape = problem.shape;
  Plan plan = {};
  plan.kind = PlanKind::two_pass;
  plan.reduce = reduce_partition(shape, problem.vec_of(problem.reduce_masked), device);
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
    *refusal = shape.numel() == 0                   ? "it is empty"
               : requested == PlanKind::cooperative ? problem.general
                                                          ? "it is not compiled for this activation"
                                                          : "the device has no cooperative launches, or refuses them"
                                                    : why_not_resident(problem, device, options);
  }

  // Of what the reduction reads, the second pass should find half an L2 cache full.
  const double fraction =
      static_cast<double>(device.l2_bytes) / 2 / static_cast<double>(std::max<int64_t>(1, problem.bytes()));
  plan.reduce.l2_steps =
      static_cast<int64_t>(static_cast<double>(plan.reduce.steps_per_split) * std::min(1.0, fraction));

  Partition& merging = plan.kind == PlanKind::resident ? plan.resident : plan.reduce;
  merging.shared_bytes = problem.merge_bytes(merging);
  if (plan.apply.by_columns) plan.apply.shared_bytes = problem.coefficient_bytes * kMaxTileVecs * plan.apply.vec;
  if ((merging.splits > 1 || merging.repeat > 1) && !merging.clustered) {
    plan.partial_bytes = merging.tiles * merging.splits * merging.tile_width() * problem.state_bytes;
    plan.counters = merging.tiles;
  }
  // Blocks that share a merge wait for each other, so that all of them must have room, and none another tile to go on
  // to, unless it waits for the merge itself.
  merging.merge_shares = 1;
  if (plan.kind == PlanKind::two_pass || merging.cooperative()) {
    const int64_t blocks = merging.repeat == 1 ? merging.splits : merging.blocks();
    const int64_t states = blocks * merging.tile_width();
    // More of blocks that are all there, where threads would merge what they have in two batches.
    const bool batches = states > kMaxMergeShares * kMaxThreads * merge_batch(problem.state_bytes);
    const int64_t most = merging.cooperative() && batches ? kMoreMergeShares : kMaxMergeShares;
    merging.merge_shares = static_cast<int32_t>(std::clamp<int64_t>(
        states * problem.state_bytes / kMergeShareBytes, 1, std::min({most, blocks, int64_t{device.multiprocessors}})));
  }
  if (plan.kind == PlanKind::cooperative) ++plan.counters;  // for the barrier
  return plan;
}

}  // namespace

Plan plan_forward(const BatchNormForwardParams& p, const DeviceProperties& device, const PlanOptions& options,
                  std::string* refusal) {
  // The kernels of relu behind a residual, and of all other activations, write a byte of mask for every 8 elements, if
  // it is wanted.
  const bool general = is_general(p.activation), masked = general || (p.residual && p.activation != Activation::none);
  Problem problem = {};
  problem.shape = p.shape;
  problem.dtype = p.dtype;
  problem.general = general;
  problem.masked = masked;
  problem.tensors = 1;
  problem.beside = p.residual ? 1 : 0;
  problem.state_bytes = 4 * acc_size_of(p.dtype);
  problem.coefficient_bytes = 3 * acc_size_of(p.dtype);
  Plan plan = make_plan(problem, device, options, refusal);
  // One more, where a resident kernel has to know when all have read num_batches_tracked.
  if (p.cumulative && p.num_batches_tracked && plan.kind == PlanKind::resident) ++plan.counters;
  return plan;
}

Plan plan_backward(const BatchNormBackwardParams& p, const DeviceProperties& device, const PlanOptions& options,
                   std::string* refusal) {
  const bool general = derivative_of(p) == Derivative::general;
  Problem problem = {};
  problem.shape = p.shape;
  problem.dtype = p.dtype;
  problem.general = general;
  problem.masked = problem.reduce_masked = general || derivative_of(p) == Derivative::mask;
  problem.tensors = 2;
  problem.beside = problem.masked && p.dresidual ? 1 : 0;
  problem.state_bytes = 2 * acc_size_of(p.dtype);
  problem.coefficient_bytes = 7 * acc_size_of(p.dtype);
  PlanOptions allowed = options;
  if (!p.elementwise() || !p.reduces()) allowed.plan = {PlanKind::two_pass};  // or one pass of it
  return make_plan(problem, device, allowed, refusal);
}

}  // namespace bnext::cuda
