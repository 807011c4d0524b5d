#include "partitioning.h"

#include <algorithm>
#include <numeric>

namespace bnext::cuda {

int32_t threads_for(int64_t work) {
  int32_t threads = 32;
  while (threads < kMaxThreads && threads < work) threads *= 2;
  return threads;
}

int64_t splits_for(int64_t tiles, int64_t slots, int64_t max_splits) {
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
  return std::min(best, std::max<int64_t>(1, max_splits));
}

void set_splits(Partition& partition, int64_t splits, int64_t stride) {
  const int64_t max_splits = std::max<int64_t>(1, kMaxCount / 2 / std::max<int64_t>(1, partition.tiles));
  splits = std::clamp<int64_t>(splits, 1, max_splits);
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

void set_thread_rows(Partition& partition, int64_t steps) {
  const int64_t lanes = partition.columns.row_threads;
  const int64_t rows = std::clamp<int64_t>(ceil_div(steps, kVecsPerThread), 1, kMaxThreads / lanes);
  partition.columns.thread_rows = static_cast<int32_t>(rows);
  partition.threads = static_cast<int32_t>(ceil_div(lanes * rows, kWarp) * kWarp);
}

void set_tile_vecs(Partition& partition, int64_t tile_vecs, bool merges) {
  partition.tiles = ceil_div(partition.columns.cols / partition.vec, tile_vecs);
  partition.columns.tile_vecs = static_cast<int32_t>(tile_vecs);
  int32_t lanes = 1;
  while (lanes < tile_vecs) lanes *= 2;
  partition.columns.row_threads = merges ? lanes : partition.columns.tile_vecs;
  set_thread_rows(partition, partition.steps);
}

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
  partition.columns.tile_vecs = partition.columns.row_threads = static_cast<int32_t>(row_vecs / packs);
  return partition;
}

}  // namespace bnext::cuda
