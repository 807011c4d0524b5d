#include "plan.h"

#include <algorithm>
#include <numeric>

namespace bnext::cuda {
namespace {

// A block that owns whole channels reads them twice: the second time from L1 or L2, as long as a
// tile stays about this small. Above it one block per tile is too little parallelism as well.
constexpr int64_t kSmallTileBytes = 64 * 1024;

// A tensor that is larger than this should use the whole device, even if that means reading it twice.
constexpr int64_t kFewBlocksBytes = 2 * 1024 * 1024;

// Lanes of a column tile: 16 units make 256-byte rows; a small plan takes 4, whose 64-byte rows are
// still whole sectors, to get more blocks out of few channels.
constexpr int64_t kLanes = 16;
constexpr int64_t kSmallLanes = 4;

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
  pass.lane_rows = static_cast<int32_t>(
      std::clamp<int64_t>(ceil_div(pass.steps, kUnitsPerThread), 1, kMaxThreads / pass.lanes));
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
  Pass pass = is_planar ? columns(shape, unit, shape.c * shape.s, shape.s, kLanes)
                        : columns(shape, unit, shape.c, 1, kLanes);
  set_splits(pass, ceil_div(pass.steps, pass.lane_rows * kColumnsApplyStrides), pass.lane_rows);
  return pass;
}

// Tiles are whole channels, so that a block can normalize what it reduced.
Pass small_pass(const Shape& shape, int32_t unit) {
  const bool wide = shape.c % unit == 0;
  Pass pass = columns(shape, wide ? unit : 1, shape.c, 1, wide ? kSmallLanes : kSmallLanes * unit);
  pass.splits = 1;
  pass.steps_per_split = std::max<int64_t>(1, pass.steps);
  return pass;
}

// The least cluster whose blocks keep their shares in shared memory, two blocks to a multiprocessor, and
// fill the device; or else the largest that still has work for every thread. kept_bytes is 0 where
// nothing fits.
Pass resident_pass(const Shape& shape, int32_t unit, bool masked, int64_t unit_bytes, int64_t merge_bytes,
                   const DeviceProperties& device) {
  Pass best = {};
  if (shape.layout != Layout::planar || shape.numel() == 0) return best;
  if (masked && shape.s % unit != 0) return best;  // two blocks would share a byte of mask
  const int64_t overhead = merge_bytes + 1024;  // and what the system reserves for a block
  const int32_t max_cluster = device.compute_capability >= 90 ? kMaxCluster : 1;
  for (int32_t cluster = 1; cluster <= max_cluster; cluster *= 2) {
    Pass pass = planar(shape, unit);
    pass.splits = cluster;
    pass.steps_per_split = ceil_div(pass.steps, cluster);
    pass.kept_bytes = pass.steps_per_split * unit_bytes;
    if (pass.kept_bytes + overhead > device.shared_per_block) continue;
    if (best.kept_bytes > 0 && pass.steps_per_split < kMaxThreads) break;
    set_planar_threads(pass, threads_for(ceil_div(pass.steps_per_split, kUnitsPerThread)));
    best = pass;
    const bool in_pairs = 2 * (pass.kept_bytes + overhead) <= device.shared_per_multiprocessor;
    if (in_pairs && pass.blocks() >= device.multiprocessors) break;
  }
  return best;
}

int32_t unit_of(DType dtype, bool masked) { return masked ? 8 : static_cast<int32_t>(16 / size_of(dtype)); }

// `tensors` is how many the reduction reads; `state_bytes` the size of one partial result.
Plan make_plan(const Shape& shape, DType dtype, bool masked, bool reduces_masked, int tensors, int64_t state_bytes,
               const DeviceProperties& device, PlanChoice choice) {
  const int32_t unit = unit_of(dtype, masked);
  const int64_t slots = state_bytes * (kMaxThreads / 2);
  Plan plan = {};
  plan.kind = PlanKind::two_pass;
  plan.reduce = reduce_pass(shape, unit_of(dtype, reduces_masked), device);
  plan.apply = apply_pass(shape, unit);

  const Pass resident = resident_pass(shape, unit, masked, unit * size_of(dtype) * tensors, slots, device);
  const bool spreads = 2 * resident.blocks() >= device.multiprocessors ||
                       shape.numel() * size_of(dtype) * tensors <= kFewBlocksBytes;
  const Pass small = small_pass(shape, unit);
  const int64_t tile_bytes = small.steps * small.tile_width() * size_of(dtype) * tensors;
  // A byte of mask must not be shared between two blocks, so masked units cannot be single elements.
  const bool can_be_small = shape.layout == Layout::interleaved && small.fits() && (!masked || small.unit == unit);

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
  const bool merges = plan.reduce.splits > 1 || plan.reduce.repeat > 1;
  plan.partial_bytes = merges ? plan.reduce.blocks() * plan.reduce.tile_width() * state_bytes : 0;
  plan.counters = std::max<int64_t>(1, merges ? plan.reduce.groups() : 0);
  return plan;
}

}  // namespace

Plan plan_forward(const ForwardParams& p, const DeviceProperties& device, PlanChoice choice) {
  // relu behind a residual: the kernels write a byte of mask for every 8 elements, if it is wanted.
  const bool masked = p.residual != nullptr && p.activation != Activation::none;
  return make_plan(p.shape, p.dtype, masked, false, 1, 4 * acc_size_of(p.dtype), device, choice);
}

Plan plan_backward(const BackwardParams& p, const DeviceProperties& device, PlanChoice choice) {
  const bool masked = p.mask != nullptr && p.activation != Activation::none;
  return make_plan(p.shape, p.dtype, masked, masked, 2, 2 * acc_size_of(p.dtype), device, choice);
}

}  // namespace bnext::cuda
