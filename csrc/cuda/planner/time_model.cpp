#include "time_model.h"

#include <algorithm>

namespace bnext::cuda {
namespace {

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

// What a wave of clusters takes beyond its bytes.
double wave_time(const Problem& problem, const Partition& partition, int32_t per_sm) {
  const auto ranks = static_cast<double>(partition.splits);
  double us = (per_sm > 1 ? kTimes.pair : kTimes.alone) + kTimes.rank * ranks + (ranks > 1 ? kTimes.cluster : 0);
  if (partition.packed()) us += kTimes.packed;
  else if (partition.interleaved())
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

}  // namespace

int32_t blocks_together(const Problem& problem, const Partition& partition, const DeviceProperties& device) {
  const int64_t bytes =
      partition.resident_bytes + partition.exchange_bytes + reserved_bytes(problem.merge_bytes(partition));
  if (partition.resident_bytes == 0 || bytes > device.shared_per_block) return 0;
  const int32_t most = resident_blocks_per_sm(size_of(problem.dtype), problem.general, partition.by_columns);
  return static_cast<int32_t>(std::min<int64_t>(most, device.shared_per_multiprocessor / bytes));
}

int64_t clusters_together(const DeviceProperties& device, int64_t size, int32_t per_sm) {
  if (size == 1) return int64_t{per_sm} * device.multiprocessors;
  int32_t i = 0;
  while (int64_t{2} << i < size) ++i;
  return int64_t{per_sm} * device.clusters_together[i];
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
    block_rate = partition.interleaved() ? kTimes.tile_rate : kTimes.block_rate;
    slower = partition.interleaved() ? kTimes.tile_beside : per_sm == 1 ? kTimes.beside : 1;
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

}  // namespace bnext::cuda
