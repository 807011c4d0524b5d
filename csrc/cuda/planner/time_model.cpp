#include "time_model.h"

#include <algorithm>

namespace bnext::cuda {
namespace {

// How long plans take beyond what their bytes do, after what an H100 took for ResNet-50's layers in bfloat16
// (docs/performance.md says how good the choice is). "Lone" blocks have a multiprocessor to themselves, "paired" ones
// share it with another block.
struct TimeModel {
  // Microseconds of resident plans in clusters, which take the tiles in waves.
  double start = 1.2;             // for the whole launch
  double paired_wave = 3.1;       // for a wave of paired blocks: one loads while the other exchanges
  double lone_wave = 4.0;         // for a wave of lone blocks
  double cluster_wave = 1.6;      // more for a wave of clusters of several blocks, which wait for each other
  double wave_rank = 0.06;        // more for a wave, for each block of a cluster
  double packed_wave = 1.1;       // more for a wave of packed planes
  double tile_state_byte = 0.04;  // more for a wave of interleaved channels, for each byte of a channel's state
  double tile_rank = 0.06;        // more for a wave of interleaved channels, for each block of a cluster

  // Microseconds of resident plans in groups, which take the tiles in rounds and exchange through memory.
  double group_round = 9.0;       // for a round
  double lone_round_input = 0.6;  // more for a round of lone blocks, for each input but the first
  double one_group = 1.0;         // more for the launch, where there is but one group and its blocks are paired

  // Microseconds of two passes.
  double two_pass = 8.0;  // for both launches and the merge between them
  double covered = 2.0;   // more where vectors cover planes that they do not divide
  double columns = 1.2;   // more in interleaved layouts, whose merge is longer

  // Bytes that one block reads and writes in a microsecond.
  double block_rate = 44500;  // in general
  double tile_rate = 34000;   // of a cluster's tile of interleaved channels

  // What is read again, as a multiple of the time that memory takes for it.
  double reread_cached = 1.0;          // what the L2 cache holds
  double reread_uncached = 1.6;        // what it does not
  double reread_lone_input = 0.15;     // more in lone blocks, for each input but the first
  double reread_paired_input = -0.22;  // the same of paired blocks, which have more in flight
  double reread_narrow = 0.13;         // more where rows of a tile are narrow parts of the matrix's

  // What the elementwise pass alone reads, as a multiple of the time that memory takes for it, where blocks have little
  // in flight by then.
  double lone_extras = 1.2;    // of lone blocks in clusters
  double group_extras = 1.6;   // of lone blocks in groups
  double reread_extras = 2.0;  // of all blocks that read parts of their rows again
  double tile_extras = 2.4;    // of clusters' tiles of interleaved channels
};
constexpr TimeModel kTimes;

// The fraction of the memory's bandwidth that rows of so many bytes get.
double row_bandwidth(int64_t bytes) { return bytes >= 256 ? 1.0 : bytes >= 128 ? 0.99 : 0.85; }

// What a wave of clusters takes beyond its bytes.
double wave_time(const Problem& problem, const Partition& partition, int32_t per_sm) {
  const auto ranks = static_cast<double>(partition.splits);
  double us = (per_sm > 1 ? kTimes.paired_wave : kTimes.lone_wave) + kTimes.wave_rank * ranks +
              (ranks > 1 ? kTimes.cluster_wave : 0);
  if (partition.packed()) us += kTimes.packed_wave;
  else if (partition.interleaved())
    us += kTimes.tile_state_byte * static_cast<double>(problem.state_bytes) + kTimes.tile_rank * ranks;
  return us;
}

// A round of groups.
double round_time(const Problem& problem, const Partition& partition, const DeviceProperties& device, int32_t per_sm) {
  const auto more_inputs = static_cast<double>(problem.reduce_inputs - 1);
  const double reread = static_cast<double>(partition.reread_bytes) * static_cast<double>(partition.blocks());
  const double cached = std::min(reread, static_cast<double>(device.l2_bytes) / 2);
  const bool narrow = partition.tiles > 1 && partition.tile_width() * size_of(problem.dtype) < 256;
  return kTimes.group_round + (per_sm == 1 ? kTimes.lone_round_input * more_inputs : 0) +
         (kTimes.reread_cached * cached + kTimes.reread_uncached * (reread - cached)) /
             static_cast<double>(device.bandwidth) *
             (1 + (per_sm == 1 ? kTimes.reread_lone_input : kTimes.reread_paired_input) * more_inputs +
              (narrow ? kTimes.reread_narrow : 0));
}

}  // namespace

int32_t blocks_together(const Problem& problem, const Partition& partition, const DeviceProperties& device) {
  const int64_t bytes =
      partition.resident_bytes + partition.exchange_bytes + reserved_bytes(problem.merge_bytes(partition));
  if (partition.resident_bytes == 0 || bytes > device.shared_per_block) return 0;
  const int32_t max_per_sm = resident_blocks_per_sm(size_of(problem.dtype), problem.general, partition.by_columns);
  return static_cast<int32_t>(std::min<int64_t>(max_per_sm, device.shared_per_multiprocessor / bytes));
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
                      static_cast<double>(problem.reduce_inputs + 1) / static_cast<double>(problem.reduce_inputs);
  auto rate = static_cast<double>(device.bandwidth);
  double once, more, block_rate, slower;
  if (partition.clustered) {
    once = kTimes.start;
    more = wave_time(problem, partition, per_sm);
    block_rate = partition.interleaved() ? kTimes.tile_rate : kTimes.block_rate;
    slower = partition.interleaved() ? kTimes.tile_extras : per_sm == 1 ? kTimes.lone_extras : 1;
  } else {
    // Two blocks of a multiprocessor had better not wait at the same time.
    once = partition.groups < per_sm && partition.splits > 1 ? kTimes.one_group : 0;
    more = round_time(problem, partition, device, per_sm);
    rate *= row_bandwidth(partition.tile_width() * size_of(problem.dtype));
    block_rate = kTimes.block_rate;
    slower = partition.reread_bytes > 0 && partition.tiles > 1 ? kTimes.reread_extras
             : per_sm == 1                                     ? kTimes.group_extras
                                                               : 1;
  }
  const double extras =
      tile * static_cast<double>(problem.apply_extras) / static_cast<double>(problem.reduce_inputs + 1) * slower;
  // Of so many tiles, in waves or rounds.
  const auto moving = [&](int64_t tiles) {
    return std::max((tile + extras) * static_cast<double>(tiles) / rate,
                    (tile + extras) / static_cast<double>(partition.splits) / block_rate);
  };
  const int64_t waves = ceil_div(partition.tiles, std::max<int64_t>(1, together));
  return once + static_cast<double>(waves) * more + static_cast<double>(waves - 1) * moving(together) +
         moving(partition.tiles - (waves - 1) * together);
}

double two_pass_time(const Problem& problem, const DeviceProperties& device) {
  // The second pass finds half an L2 cache full, in half the time.
  const double cached = std::min(static_cast<double>(problem.bytes()), static_cast<double>(device.l2_bytes) / 2);
  const double all = static_cast<double>(problem.bytes()) *
                     static_cast<double>(2 * problem.reduce_inputs + 1 + problem.apply_extras) /
                     static_cast<double>(problem.reduce_inputs);
  const bool is_planar = problem.shape.layout == Layout::planar;
  const bool covers = is_planar && problem.shape.s % problem.vec() != 0;
  return (all - cached / 2) / (0.95 * static_cast<double>(device.bandwidth)) + kTimes.two_pass +
         (covers ? kTimes.covered : 0) + (is_planar ? 0 : kTimes.columns);
}

}  // namespace bnext::cuda
