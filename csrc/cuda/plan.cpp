#include "plan.h"

#include <algorithm>
#include <numeric>

namespace bnext::cuda {
namespace {

// One block per tile, without a word to any other, as long as a tile stays about this small.
constexpr int64_t kSmallTileBytes = 64 * 1024;

// A tensor that is larger than this should use the whole device, even if that means reading it twice; one that
// is not should take one launch.
constexpr int64_t kSmallBytes = 2 * 1024 * 1024;

// A column tile is 16 units wide: 256-byte rows. In a resident pass it is 64 bytes: still whole sectors, and more
// tiles out of few channels.
constexpr int64_t kLanes = 16;
constexpr int64_t kNarrowBytes = 64;

// Strides of a block in one elementwise split, at most: enough to amortize a thread's channel coefficients,
// one set in planar form and one for each element of its unit in columns.
constexpr int64_t kPlanarApplyStrides = 8;
constexpr int64_t kColumnsApplyStrides = 16;

// Units that a thread of a planar reduction should have before a block gets more threads.
constexpr int64_t kUnitsPerThread = 4;

// Large clusters leave multiprocessors idle where their groups on the chip are no multiple of 16. Reading once
// instead of twice moves 2/3 of the bytes forward, 3/5 backward: worth it if this many take part.
constexpr double kLargeClustersPay = 0.75;

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
  pass.groups = pass.tiles;
}

Pass planar(const Shape& shape, int32_t unit) {
  Pass pass = {};
  pass.unit = unit;
  pass.units = ceil_div(shape.numel(), unit);
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
  pass.units = ceil_div(shape.numel(), unit);
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

// `most_strides` to a block, or as many as leave two blocks for each multiprocessor.
void set_apply_splits(Pass& pass, int64_t stride, int64_t most_strides, const DeviceProperties& device) {
  const int64_t strides = ceil_div(pass.steps, stride);
  const int64_t share = strides * pass.tiles / (2 * int64_t{device.multiprocessors});
  set_splits(pass, ceil_div(strides, std::clamp<int64_t>(share, 1, most_strides)), stride);
}

Pass apply_pass(const Shape& shape, int32_t unit, const DeviceProperties& device) {
  const bool is_planar = shape.layout == Layout::planar;
  Pass pass;
  if (is_planar && shape.s % unit == 0) {
    pass = planar(shape, unit);
    set_planar_threads(pass, threads_for(pass.steps));
    set_apply_splits(pass, pass.threads, kPlanarApplyStrides, device);
  } else {
    // Planes that are not whole units: a unit may hold several channels, which columns provide for.
    pass =
        is_planar ? columns(shape, unit, shape.c * shape.s, shape.s, kLanes) : columns(shape, unit, shape.c, 1, kLanes);
    set_apply_splits(pass, pass.lane_rows, kColumnsApplyStrides, device);
  }
  pass.overlaps = device.compute_capability >= 90;
  return pass;
}

// What a resident block needs beside its share: `merge_bytes` and some more, and what the system reserves.
int64_t overhead(int64_t merge_bytes) { return merge_bytes + 2048; }

// What the plans of one direction have in common.
struct Problem {
  Shape shape;
  DType dtype;
  bool masked;          // the elementwise pass reads or writes a mask
  bool reduce_masked;   // the reduction reads it
  int64_t tensors;      // that the reduction reads
  int64_t state_bytes;  // of a partial result

  int32_t unit_of(bool with_mask) const { return with_mask ? 8 : static_cast<int32_t>(16 / size_of(dtype)); }
  int32_t unit() const { return unit_of(masked); }
  int64_t unit_bytes() const { return unit() * size_of(dtype) * tensors; }
  int64_t bytes() const { return shape.numel() * size_of(dtype) * tensors; }
  // Shared memory that merges the states of a block's threads, `width` to a thread.
  int64_t merge_bytes(int64_t width) const { return state_bytes * kStateSlots * width; }
  // Of a pass over columns: a thread's own, and one in the merge of the blocks.
  int64_t merge_bytes(const Pass& pass) const { return merge_bytes(pass.columns ? pass.unit + 1 : 1); }
};

// Planes that are not whole units, side by side; without tiles where the channels do not come out even, or a row has
// more units than a block has room for, and no parts to go through it in.
Pass side_by_side(const Shape& shape, int32_t unit) {
  Pass pass = {};
  const int64_t channels = unit / std::gcd(shape.s, int64_t{unit});
  const int64_t row_units = channels * shape.s / unit;
  // Equal parts, of a quarter of a kilobyte in a row at least; so many at most that nobody would search for long.
  constexpr int64_t kLeastLanes = 16, kMostParts = 64;
  int64_t parts = ceil_div(row_units, kStateSlots);
  while (parts < kMostParts && row_units % parts != 0) ++parts;
  const bool even = row_units % parts == 0 && (parts == 1 || row_units / parts >= kLeastLanes);
  if (shape.c % channels != 0 || parts > kMostParts || !even) return pass;
  pass.columns = true;
  pass.unit = unit;
  pass.units = ceil_div(shape.numel(), unit);
  pass.channel_stride = shape.s;
  pass.repeat = 1;
  pass.cols = shape.c * shape.s;
  pass.steps = shape.n;
  pass.tile_channels = static_cast<int32_t>(channels);
  pass.tiles = shape.c / channels;
  pass.parts = static_cast<int32_t>(parts);
  pass.lanes = static_cast<int32_t>(row_units / parts);
  return pass;
}

// A pass of resident_planar with clusters of that size: its threads, and what its blocks keep.
Pass clustered(Pass pass, int32_t cluster, int64_t unit_bytes) {
  pass.clustered = true;
  pass.stages = 1;
  pass.groups = pass.tiles;
  pass.splits = cluster;
  pass.steps_per_split = ceil_div(pass.steps, cluster);
  if (pass.columns) {
    const int64_t rows = ceil_div(pass.steps_per_split, kUnitsPerThread);
    pass.lane_rows = static_cast<int32_t>(std::clamp<int64_t>(rows, 1, kMaxThreads / pass.lanes));
    pass.threads = static_cast<int32_t>(ceil_div(int64_t{pass.lanes} * pass.lane_rows, 32) * 32);
    pass.kept_bytes = pass.parts * ceil_div(pass.steps_per_split, pass.lane_rows) * pass.threads * unit_bytes;
  } else {
    set_planar_threads(pass, threads_for(ceil_div(pass.steps_per_split, kUnitsPerThread)));
    pass.kept_bytes = pass.steps_per_split * unit_bytes;
  }
  return pass;
}

// The least cluster whose blocks keep their shares in shared memory, two blocks to a multiprocessor, and
// fill the device; or else the largest that still has work for every thread. kept_bytes is 0 where
// nothing fits.
Pass resident_planar(const Problem& problem, const DeviceProperties& device) {
  const int32_t unit = problem.unit();
  const Pass base = problem.shape.s % unit == 0 ? planar(problem.shape, unit) : side_by_side(problem.shape, unit);
  auto fit = [&](const Pass& pass, int32_t per_sm) {
    const int64_t bytes = pass.kept_bytes + overhead(problem.merge_bytes(pass));
    return bytes <= device.shared_per_block && per_sm * bytes <= device.shared_per_multiprocessor &&
           pass.splits <= device.multiprocessors;
  };
  auto share_units = [](const Pass& pass) {
    return pass.columns ? pass.steps_per_split * pass.lanes * pass.parts : pass.steps_per_split;
  };
  Pass best = {};
  if (base.tiles == 0) return best;
  const int64_t most = device.compute_capability >= 90 ? std::min<int64_t>(kMaxCluster, base.steps) : 1;
  for (int32_t cluster = 1; cluster <= most; cluster *= 2) {
    const Pass pass = clustered(base, cluster, problem.unit_bytes());
    if (!fit(pass, 1)) continue;
    if (best.kept_bytes > 0 && share_units(pass) < kMaxThreads) break;
    best = pass;
    if (fit(pass, 2) && pass.blocks() >= device.multiprocessors) break;
  }
  const bool large_pay = device.large_clusters * kLargeCluster >= kLargeClustersPay * device.multiprocessors;
  if (best.kept_bytes == 0 && large_pay && base.steps >= kLargeCluster) {
    const Pass pass = clustered(base, kLargeCluster, problem.unit_bytes());
    if (fit(pass, 1)) best = pass;
  }
  return best;
}

// Groups of blocks that together fill `slots`, and take the tiles in turn, `stages` at a time: the least
// rounds whose shares fit into `capacity` bytes of a block, or somewhat more, where a tenth of the slots or of
// the last round would be idle. kept_bytes is 0 where nothing fits.
Pass in_groups(Pass pass, int64_t slots, int32_t stages, int64_t capacity, int64_t unit_bytes) {
  Pass best = {};
  const int64_t stride_bytes = pass.threads * unit_bytes;
  const int64_t most_steps = capacity / stages / stride_bytes * pass.lane_rows;
  if (most_steps <= 0) return best;
  const int64_t most_groups = std::min(pass.tiles, slots / ceil_div(pass.steps, most_steps));
  if (most_groups == 0) return best;
  const int64_t least_rounds = std::max<int64_t>(stages, ceil_div(pass.tiles, most_groups));
  double best_used = 0;
  for (int64_t rounds = least_rounds; rounds <= std::min(pass.tiles, least_rounds + 7) && best_used < 0.9; ++rounds) {
    const int64_t groups = ceil_div(pass.tiles, rounds);
    set_splits(pass, slots / groups, pass.lane_rows);
    pass.groups = groups;
    const double used = static_cast<double>(pass.tiles * pass.steps) /
                        static_cast<double>(ceil_div(pass.tiles, groups) * pass.steps_per_split * slots);
    if (used <= best_used) continue;
    best_used = used;
    best = pass;
    best.stages = stages;
    best.kept_bytes = stages * (pass.steps_per_split / pass.lane_rows) * stride_bytes;
  }
  return best;
}

// One block to a tile where that is small; else all blocks that the device holds at a time, in pairs on a
// multiprocessor or, where that does not fit, one by one; rather one by one than without a second stage.
Pass resident_columns(const Problem& problem, int32_t most_per_sm, const DeviceProperties& device,
                      const PlanOptions& options) {
  const int64_t row_bytes = problem.unit() * size_of(problem.dtype);
  Pass pass =
      columns(problem.shape, problem.unit(), problem.shape.c, 1, std::max<int64_t>(1, kNarrowBytes / row_bytes));
  if (pass.repeat > 1) return {};
  const int64_t unit_bytes = problem.unit_bytes();
  const int64_t beside = overhead(problem.merge_bytes(pass));
  if (pass.steps * pass.lanes * unit_bytes <= kSmallTileBytes) {
    set_splits(pass, 1, pass.lane_rows);
    pass.stages = 1;
    pass.kept_bytes = pass.steps_per_split / pass.lane_rows * pass.threads * unit_bytes;
    if (pass.kept_bytes + beside <= device.shared_per_block) return pass;
  }
  // A second round of a small tensor would take longer than what it hides.
  const bool in_stages = problem.bytes() > kSmallBytes || options.kind == PlanKind::resident;
  for (int32_t stages = in_stages ? 2 : 1; stages >= 1; --stages) {
    for (int32_t per_sm = most_per_sm; per_sm >= 1; --per_sm) {
      const int64_t slots = per_sm * std::max<int64_t>(1, device.multiprocessors - options.sm_margin);
      const int64_t capacity = std::min(device.shared_per_block, device.shared_per_multiprocessor / per_sm) - beside;
      const Pass grouped = in_groups(pass, slots, stages, capacity, unit_bytes);
      if (grouped.kept_bytes > 0) return grouped;
    }
  }
  return {};
}

// Both passes with the same threads; fewer than a pass would take on its own stay idle in it.
void set_small(Plan& plan, const DeviceProperties& device, const PlanOptions& options) {
  plan.kind = PlanKind::small;
  for (Pass* pass : {&plan.reduce, &plan.apply}) {
    if (!pass->columns) {
      set_planar_threads(*pass, kMaxThreads);
      set_splits(*pass, ceil_div(pass->steps, pass->steps_per_split), kMaxThreads);
    }
    pass->threads = kMaxThreads;
  }
  plan.blocks = std::min(std::max(plan.reduce.blocks(), plan.apply.blocks()),
                         std::max<int64_t>(1, device.multiprocessors - options.sm_margin));
}

Plan make_plan(const Problem& problem, const DeviceProperties& device, const PlanOptions& options) {
  const Shape& shape = problem.shape;
  const bool is_planar = shape.layout == Layout::planar;
  Plan plan = {};
  plan.kind = PlanKind::two_pass;
  plan.reduce = reduce_pass(shape, problem.unit_of(problem.reduce_masked), device);
  plan.apply = apply_pass(shape, problem.unit(), device);

  const PlanKind wish = options.kind;
  if (shape.numel() > 0 && (wish == PlanKind::automatic || wish == PlanKind::resident)) {
    const Pass resident = is_planar ? resident_planar(problem, device)
                                    : resident_columns(problem, problem.dtype == DType::f64 ? 1 : 2, device, options);
    const bool spreads = 2 * resident.blocks() >= device.multiprocessors || problem.bytes() <= kSmallBytes;
    if (resident.kept_bytes > 0 && (spreads || wish == PlanKind::resident)) {
      plan.kind = PlanKind::resident;
      plan.resident = resident;
    }
  }
  const bool is_small = problem.bytes() <= kSmallBytes && plan.kind == PlanKind::two_pass;
  if (shape.numel() > 0 && (wish == PlanKind::small || (wish == PlanKind::automatic && is_small))) {
    set_small(plan, device, options);
  }

  // Of what the reduction reads, the second pass should find half an L2 cache full.
  const double share =
      static_cast<double>(device.l2_bytes) / 2 / static_cast<double>(std::max<int64_t>(1, problem.bytes()));
  plan.reduce.retained_steps =
      static_cast<int64_t>(static_cast<double>(plan.reduce.steps_per_split) * std::min(1.0, share));

  Pass& merging = plan.kind == PlanKind::resident ? plan.resident : plan.reduce;
  merging.shared_bytes = problem.merge_bytes(merging);
  if ((merging.splits > 1 || merging.repeat > 1) && !merging.clustered) {
    plan.partial_bytes = merging.tiles * merging.splits * merging.tile_width() * problem.state_bytes;
    plan.counters = merging.tiles;
  }
  if (plan.kind == PlanKind::small) ++plan.counters;  // for the barrier
  return plan;
}

}  // namespace

Plan plan_forward(const ForwardParams& p, const DeviceProperties& device, const PlanOptions& options) {
  // relu behind a residual: the kernels write a byte of mask for every 8 elements, if it is wanted.
  const bool masked = p.residual != nullptr && p.activation != Activation::none;
  Plan plan = make_plan({p.shape, p.dtype, masked, false, 1, 4 * acc_size_of(p.dtype)}, device, options);
  // One more, where a resident kernel has to know when all have read num_batches_tracked.
  if (p.cumulative && p.num_batches_tracked && plan.kind == PlanKind::resident) ++plan.counters;
  return plan;
}

Plan plan_backward(const BackwardParams& p, const DeviceProperties& device, const PlanOptions& options) {
  const bool masked = p.mask != nullptr && p.activation != Activation::none;
  PlanOptions possible = options;
  if (!p.elementwise() || !p.reduces()) possible.kind = PlanKind::two_pass;  // or one pass of it
  return make_plan({p.shape, p.dtype, masked, masked, 2, 2 * acc_size_of(p.dtype)}, device, possible);
}

}  // namespace bnext::cuda
