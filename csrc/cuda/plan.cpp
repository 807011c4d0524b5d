#include "plan.h"

#include <algorithm>
#include <numeric>

namespace bnext::cuda {
namespace {

// One block per tile, without a word to any other, as long as a tile stays about this small.
constexpr int64_t kSmallTileBytes = 64 * 1024;

// A tensor that is larger than this should use the whole device, even if that means reading it twice.
constexpr int64_t kFewBlocksBytes = 2 * 1024 * 1024;

// A column tile is 16 units wide: 256-byte rows. Where a tile's blocks have to exchange results, or one block
// owns it, it is 64 bytes: still whole sectors, and more tiles out of few channels.
constexpr int64_t kLanes = 16;
constexpr int64_t kNarrowBytes = 64;

// Strides of a block in one elementwise split: enough to amortize a thread's channel coefficients,
// one set in planar form and one for each element of its unit in columns.
constexpr int64_t kPlanarApplyStrides = 8;
constexpr int64_t kColumnsApplyStrides = 16;

// Units that a thread of a planar reduction should have before a block gets more threads.
constexpr int64_t kUnitsPerThread = 4;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

void set_splits(Pass& pass, int64_t splits, int64_t stride) {
  const int64_t most = std::max<int64_t>(1, kMaxCount / 2 / std::max<int64_t>(1, pass.tiles));
  splits = std::clamp<int64_t>(splits, 1, most);
  pass.steps_per_split = std::max(stride, ceil_div(ceil_div(pass.steps, splits), stride) * stride);
  pass.splits = std::max<int64_t>(1, ceil_div(pass.steps, pass.steps_per_split));
}

Pass planar(const Shape& shape, int32_t unit) {
  Pass pass = {};
  pass.unit = unit;
  pass.aligned = shape.s % unit == 0;
  pass.plane_units = pass.aligned ? shape.s / unit : (shape.s + 2 * unit - 2) / unit;
  pass.tiles = shape.c;
  pass.steps = shape.n * pass.plane_units;
  pass.repeat = 1;
  return pass;
}

void set_planar_threads(Pass& pass, int32_t threads) {
  pass.threads = threads;
  pass.stride_planes = pass.plane_units > 0 ? static_cast<int32_t>(threads / pass.plane_units) : 0;
  pass.stride_units = static_cast<int32_t>(threads - pass.stride_planes * pass.plane_units);
}

// `period` is the number of elements after which channels recur: c, or c * s for planes.
Pass columns(const Shape& shape, int32_t unit, int64_t period, int64_t channel_stride, int64_t lanes) {
  Pass pass = {};
  pass.columns = true;
  pass.unit = unit;
  pass.channel_stride = channel_stride;
  pass.repeat = static_cast<int32_t>(unit / std::gcd(period, int64_t{unit}));
  pass.cols = pass.repeat * period;
  pass.steps = pass.cols > 0 ? ceil_div(shape.numel(), pass.cols) : 0;
  int64_t units = pass.cols / unit;
  pass.tiles = ceil_div(units, lanes);
  pass.lanes = static_cast<int32_t>(std::max<int64_t>(1, ceil_div(units, std::max<int64_t>(1, pass.tiles))));
  pass.lane_rows =
      static_cast<int32_t>(std::clamp<int64_t>(ceil_div(pass.steps, kUnitsPerThread), 1, kMaxThreads / pass.lanes));
  pass.threads = static_cast<int32_t>(ceil_div(int64_t{pass.lanes} * pass.lane_rows, 32) * 32);
  return pass;
}

Pass reduce_pass(const Shape& shape, int32_t unit, const DeviceProperties& device) {
  if (shape.layout == Layout::planar) {
    Pass pass = planar(shape, unit);
    set_planar_threads(pass, threads_for(ceil_div(pass.steps, kUnitsPerThread)));
    int64_t slots = int64_t{device.multiprocessors} * blocks_per_sm(false, pass.aligned) * (kMaxThreads / pass.threads);
    int64_t most = ceil_div(pass.steps, pass.threads * kUnitsPerThread);
    set_splits(pass, splits_for(std::max<int64_t>(1, pass.tiles), slots, most), pass.threads);
    return pass;
  }
  Pass pass = columns(shape, unit, shape.c, 1, kLanes);
  int64_t slots = int64_t{device.multiprocessors} * blocks_per_sm(true, true);
  int64_t most = ceil_div(pass.steps, pass.lane_rows * kUnitsPerThread);
  set_splits(pass, splits_for(std::max<int64_t>(1, pass.tiles), slots, most), pass.lane_rows);
  return pass;
}

Pass apply_pass(const Shape& shape, int32_t unit) {
  bool is_planar = shape.layout == Layout::planar;
  if (is_planar && shape.s % unit == 0) {
    Pass pass = planar(shape, unit);
    set_planar_threads(pass, threads_for(pass.steps));
    set_splits(pass, ceil_div(pass.steps, pass.threads * kPlanarApplyStrides), pass.threads);
    return pass;
  }
  // Planes that are not whole units: a unit may hold several channels, which columns provide for.
  Pass pass =
      is_planar ? columns(shape, unit, shape.c * shape.s, shape.s, kLanes) : columns(shape, unit, shape.c, 1, kLanes);
  set_splits(pass, ceil_div(pass.steps, pass.lane_rows * kColumnsApplyStrides), pass.lane_rows);
  return pass;
}

// Channels that are not whole units wide, one element to a thread.
Pass small_pass(const Shape& shape, DType dtype) {
  Pass pass = columns(shape, 1, shape.c, 1, kNarrowBytes / size_of(dtype));
  pass.splits = 1;
  pass.steps_per_split = std::max<int64_t>(1, pass.steps);
  return pass;
}

// What a resident block needs beside its share: `merge_bytes` and some more, and what the system reserves.
int64_t overhead(int64_t merge_bytes) { return merge_bytes + 2048; }

// The least cluster whose blocks keep their shares in shared memory, two blocks to a multiprocessor, and
// fill the device; or else the largest that still has work for every thread. kept_bytes is 0 where
// nothing fits.
Pass resident_planar(const Shape& shape, int32_t unit, bool masked, int64_t unit_bytes, int64_t merge_bytes,
                     const DeviceProperties& device) {
  Pass best = {};
  if (masked && shape.s % unit != 0) return best;  // two blocks would share a byte of mask
  const int32_t max_cluster = device.compute_capability >= 90 ? kMaxCluster : 1;
  for (int32_t cluster = 1; cluster <= max_cluster; cluster *= 2) {
    Pass pass = planar(shape, unit);
    pass.splits = cluster;
    pass.steps_per_split = ceil_div(pass.steps, cluster);
    pass.kept_bytes = pass.steps_per_split * unit_bytes;
    if (pass.kept_bytes + overhead(merge_bytes) > device.shared_per_block) continue;
    if (best.kept_bytes > 0 && pass.steps_per_split < kMaxThreads) break;
    set_planar_threads(pass, threads_for(ceil_div(pass.steps_per_split, kUnitsPerThread)));
    best = pass;
    const bool in_pairs = 2 * (pass.kept_bytes + overhead(merge_bytes)) <= device.shared_per_multiprocessor;
    if (in_pairs && pass.blocks() >= device.multiprocessors) break;
  }
  return best;
}

// As many blocks to a tile as the device holds of them at a time, in pairs on a multiprocessor or, for
// larger shares, one by one. kept_bytes is 0 where nothing fits.
Pass resident_columns(const Shape& shape, int32_t unit, int64_t unit_bytes, int64_t row_bytes, int64_t merge_bytes,
                      int32_t most_per_sm, const DeviceProperties& device) {
  Pass pass = columns(shape, unit, shape.c, 1, std::max<int64_t>(1, kNarrowBytes / row_bytes));
  if (pass.repeat > 1) return {};
  const bool alone = pass.steps * pass.lanes * unit_bytes <= kSmallTileBytes;
  for (int32_t per_sm = most_per_sm; per_sm >= 1; --per_sm) {
    const int64_t splits = alone ? 1 : int64_t{device.multiprocessors} * per_sm / pass.tiles;
    if (splits < 1) continue;
    set_splits(pass, splits, pass.lane_rows);
    pass.kept_bytes = pass.steps_per_split / pass.lane_rows * pass.threads * unit_bytes;
    const int64_t bytes = pass.kept_bytes + overhead(merge_bytes);
    if (bytes <= device.shared_per_block && (alone || per_sm * bytes <= device.shared_per_multiprocessor)) return pass;
  }
  return {};
}

int32_t unit_of(DType dtype, bool masked) { return masked ? 8 : static_cast<int32_t>(16 / size_of(dtype)); }

// `tensors` is how many the reduction reads; `state_bytes` the size of one partial result.
Plan make_plan(const Shape& shape, DType dtype, bool masked, bool reduces_masked, int tensors, int64_t state_bytes,
               const DeviceProperties& device, PlanChoice choice) {
  const int32_t unit = unit_of(dtype, masked);
  const bool is_planar = shape.layout == Layout::planar;
  const int64_t slots = state_bytes * (kMaxThreads / 2);
  Plan plan = {};
  plan.kind = PlanKind::two_pass;
  plan.reduce = reduce_pass(shape, unit_of(dtype, reduces_masked), device);
  plan.apply = apply_pass(shape, unit);

  const int64_t unit_bytes = unit * size_of(dtype) * tensors;
  Pass resident = {};
  if (shape.numel() > 0) {
    resident = is_planar ? resident_planar(shape, unit, masked, unit_bytes, slots, device)
                         : resident_columns(shape, unit, unit_bytes, unit * size_of(dtype), slots * (unit + 1),
                                            dtype == DType::f64 ? 1 : 2, device);
  }
  const bool spreads =
      2 * resident.blocks() >= device.multiprocessors || shape.numel() * size_of(dtype) * tensors <= kFewBlocksBytes;
  const Pass small = small_pass(shape, dtype);
  const int64_t tile_bytes = small.steps * small.tile_width() * size_of(dtype) * tensors;
  // Elements one by one could not write bytes of mask.
  const bool can_be_small = !is_planar && !masked && small.fits();

  const bool automatic = choice == PlanChoice::automatic;
  if (resident.kept_bytes > 0 && (choice == PlanChoice::resident || (automatic && spreads))) {
    plan.kind = PlanKind::resident;
    plan.whole = resident;
  } else if (can_be_small && (choice == PlanChoice::small || (automatic && tile_bytes <= kSmallTileBytes))) {
    plan.kind = PlanKind::small;
    plan.whole = small;
  }

  for (Pass* pass : {&plan.reduce, &plan.whole}) {
    pass->shared_bytes = slots * (pass->columns && pass->unit > 1 ? pass->unit + 1 : 1);
  }
  for (const Pass& pass : {plan.reduce, plan.whole}) {
    if (pass.splits <= 1 && pass.repeat <= 1) continue;
    if (!pass.columns && pass.kept_bytes > 0) continue;  // clusters exchange through shared memory
    plan.partial_bytes = std::max(plan.partial_bytes, pass.blocks() * pass.tile_width() * state_bytes);
    plan.counters = std::max(plan.counters, pass.tiles);
  }
  return plan;
}

}  // namespace

Plan plan_forward(const ForwardParams& p, const DeviceProperties& device, PlanChoice choice) {
  // relu behind a residual: the kernels write a byte of mask for every 8 elements, if it is wanted.
  const bool masked = p.residual != nullptr && p.activation != Activation::none;
  Plan plan = make_plan(p.shape, p.dtype, masked, false, 1, 4 * acc_size_of(p.dtype), device, choice);
  // One more, where a kernel that does everything has to know when all have read num_batches_tracked.
  if (p.cumulative && p.num_batches_tracked) ++plan.counters;
  return plan;
}

Plan plan_backward(const BackwardParams& p, const DeviceProperties& device, PlanChoice choice) {
  const bool masked = p.mask != nullptr && p.activation != Activation::none;
  return make_plan(p.shape, p.dtype, masked, masked, 2, 2 * acc_size_of(p.dtype), device, choice);
}

}  // namespace bnext::cuda
