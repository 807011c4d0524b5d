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
  double prefetched_wave = 1.7;   // less for a wave but the first, part of which was fetched into the L2 cache before
  double tile_state_byte = 0.04;  // more for a wave of interleaved channels, for each byte of a channel's state
  double tile_rank = 0.15;        // more for a wave of interleaved channels, for each block of a cluster
  double tile_input = 1.0;        // more for a wave of interleaved channels, for each input but the first

  // Microseconds of resident plans in groups, which take the tiles in rounds and exchange through memory.
  double group_round = 7.0;     // for a round
  double round_megabyte = 3.0;  // more for a round, for each megabyte of flagged numbers that blocks exchange

  // Microseconds of two passes.
  double two_pass = 8.0;  // for both launches and the merge between them
  double covered = 2.0;   // more where vectors cover planes that they do not divide
  double columns = 1.2;   // more in interleaved layouts, whose merge is longer

  // Bytes that one block reads and writes in a microsecond.
  double block_rate = 44500;  // in general
  double tile_rate = 34000;   // of a cluster's tile of interleaved channels
  double lone_rate = 24000;   // of a group, alone on a multiprocessor

  // What is read again, as a multiple of the time that memory takes for it.
  double reread_cached = 1.24;         // what the L2 cache holds
  double reread_uncached = 1.45;       // what it does not
  double reread_lone_input = 0.21;     // more in lone blocks, for each input but the first
  double reread_paired_input = -0.19;  // the same of paired blocks, which have more in flight
  double reread_rows_128 = 0.3;        // more where rows of a tile are parts of the matrix's, of less than 256 bytes
  double reread_rows_64 = 0.55;        // or of less than 128

  // What the elementwise pass alone reads, as a multiple of the time that memory takes for it, where blocks have little
  // in flight by then.
  double lone_extras = 1.2;    // of lone blocks in clusters
  double group_extras = 1.6;   // of lone blocks in groups
  double reread_extras = 1.7;  // of all blocks that read parts of their rows again
  double tile_extras = 2.4;    // of clusters' tiles of interleaved channels
  double narrow_extras = 2.2;  // of groups' tiles whose rows have less than 128 bytes
};
constexpr TimeModel kTimes;

// The fraction of the memory's bandwidth that groups get whose tiles have so many bytes of the matrix's rows; what
// other groups load at about the same time, of the same rows, helps.
double row_bandwidth(int64_t bytes, int64_t groups, int64_t whole) {
  const int64_t together = std::min(bytes * groups, whole);
  const double narrow = bytes < 128 && bytes < whole ? 0.95 : 1.0;
  return narrow * (together >= 256 || together == whole ? 1.0 : together >= 128 ? 0.99 : whole <= 128 ? 0.87 : 0.55);
}

// What a wave of clusters takes beyond its bytes.
double wave_time(const Problem& problem, const Partition& partition, int32_t per_sm) {
  const auto ranks = static_cast<double>(partition.splits);
  double us = (per_sm > 1 ? kTimes.paired_wave : kTimes.lone_wave) + kTimes.wave_rank * ranks +
              (ranks > 1 ? kTimes.cluster_wave : 0);
  if (partition.packed()) us += kTimes.packed_wave;
  else if (partition.interleaved())
    us += kTimes.tile_state_byte * static_cast<double>(problem.state_bytes) + kTimes.tile_rank * ranks +
          kTimes.tile_input * static_cast<double>(problem.reduce_inputs - 1);
  return us;
}

// A round of groups.
double round_time(const Problem& problem, const Partition& partition, const DeviceProperties& device, int32_t per_sm) {
  const auto more_inputs = static_cast<double>(problem.reduce_inputs - 1);
  const double reread = static_cast<double>(partition.reread_bytes) * static_cast<double>(partition.blocks());
  const double cached = std::min(reread, static_cast<double>(device.l2_bytes) / 2);
  const int64_t row_bytes = partition.tiles > 1 ? partition.tile_width() * size_of(problem.dtype) : 256;
  const double narrow = row_bytes >= 256 ? 0 : row_bytes >= 128 ? kTimes.reread_rows_128 : kTimes.reread_rows_64;
  const int64_t exchanged = flagged_bytes(partition, problem.state_bytes, problem.summary_bytes);
  return kTimes.group_round + kTimes.round_megabyte * static_cast<double>(exchanged) / 1e6 +
         (kTimes.reread_cached * cached + kTimes.reread_uncached * (reread - cached)) /
             static_cast<double>(device.bandwidth) *
             (1 + (per_sm == 1 ? kTimes.reread_lone_input : kTimes.reread_paired_input) * more_inputs + narrow);
}

}  // namespace

int32_t blocks_together(const Problem& problem, const Partition& partition, const DeviceProperties& device) {
  const int64_t bytes =
      partition.resident_bytes + partition.exchange_bytes + reserved_bytes(problem.merge_bytes(partition));
  if (partition.resident_bytes == 0 || bytes > device.shared_per_block) return 0;
  // Groups of fewer blocks than there are multiprocessors are spread over these.
  const bool lone =
      partition.register_vecs > 0 || (!partition.clustered && partition.blocks() <= device.multiprocessors);
  const int32_t max_per_sm =
      lone ? 1 : resident_blocks_per_sm(size_of(problem.dtype), problem.general, partition.by_columns);
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
  const double once = partition.clustered ? kTimes.start : 0;
  double more, block_rate, slower;
  if (partition.clustered) {
    more = wave_time(problem, partition, per_sm);
    block_rate = partition.interleaved() ? kTimes.tile_rate : kTimes.block_rate;
    slower = partition.interleaved() ? kTimes.tile_extras : per_sm == 1 ? kTimes.lone_extras : 1;
  } else {
    more = round_time(problem, partition, device, per_sm);
    const int64_t row_bytes = partition.tile_width() * size_of(problem.dtype);
    rate *= row_bandwidth(row_bytes, partition.groups, partition.columns.cols * size_of(problem.dtype));
    block_rate = per_sm == 1 ? kTimes.lone_rate : kTimes.block_rate;
    slower = partition.reread_bytes > 0 && partition.tiles > 1 ? kTimes.reread_extras
             : per_sm == 1                                     ? kTimes.group_extras
                                                               : 1;
    if (row_bytes < 128) slower = std::max(slower, kTimes.narrow_extras);
  }
  const double extras =
      tile * static_cast<double>(problem.apply_extras) / static_cast<double>(problem.reduce_inputs + 1) * slower;
  // Of so many tiles, in waves or rounds.
  const auto moving = [&](int64_t tiles) {
    return std::max((tile + extras) * static_cast<double>(tiles) / rate,
                    (tile + extras) / static_cast<double>(partition.splits) / block_rate);
  };
  const int64_t waves = ceil_div(partition.tiles, std::max<int64_t>(1, together));
  const bool prefetches = partition.clustered && !partition.interleaved() && problem.apply_extras == 0;
  const double later = more - (prefetches ? kTimes.prefetched_wave : 0);
  return once + more + static_cast<double>(waves - 1) * (later + moving(together)) +
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
