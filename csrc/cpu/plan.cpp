#include "plan.h"

#include <algorithm>
#include <numeric>

namespace bnext::cpu {
namespace {

// A run that fills at least one vector of floats is worth a strip.
constexpr int64_t kShortestRun = 16;
// Elements that are not worth a second thread: some microseconds of work. Where another process keeps a processor busy,
// a call on two threads waits until that process is descheduled: a time slice, some milliseconds.
constexpr int64_t kOneThread = 32768;
// Elements of a task, where there is work for several threads: so few that tasks share out evenly.
constexpr int64_t kGrain = 8192;
// Tasks that a reduction is cut into where the shape has enough for it, a power of two: enough to keep
// many cores busy, few enough that merging their results costs nothing.
constexpr int64_t kTasks = 64;
// Grains of an elementwise pass, at most. Few of them, and few tasks that take whole channels, are a power of two, so
// that they share out evenly.
constexpr int64_t kMaxGrains = 1024, kFew = 16;
// Fewer channels than this do not keep many cores busy: their strips are cut.
constexpr int64_t kEnoughChannels = 16;
// Contiguous elements that are worth the latency of finding the next ones, and elements that stay in
// a second-level cache.
constexpr int64_t kLongRun = 2048;
constexpr int64_t kCached = 65536;
// A matrix of columns should be this wide, so that a row is worth a loop, and a block of it at least
// so high, so that the columns' states are merged seldom.
constexpr int64_t kWidth = 128;
constexpr int64_t kHeight = 256;
constexpr int64_t kNarrowestBlock = 64;
// A matrix of no more rows stays in cache by groups of whole channels. There, what is done once for each column takes
// as long as so many rows.
constexpr int64_t kLowMatrix = 64, kRowsPerColumn = 16;

// Whether reductions take strips as columns: a run takes as long as it has elements and then some, to find it, and a
// column as long as it has rows and then some, to merge it. The one is about as much as the other.
bool scattered(const Plan& p) { return p.inner < p.outer && p.outer >= kLowMatrix; }

int64_t grain_of(int64_t elements) { return elements <= kOneThread ? kOneThread : kGrain; }

// The next power of two from n up, and the next one from n > 0 down.
int64_t power_of_two_above(int64_t n) {
  int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}
int64_t power_of_two_below(int64_t n) { return power_of_two_above(n / 2 + 1); }

// Tasks of `each` channels or less, a multiple of `unit`: few tasks are a power of two, so that they share out evenly.
// Where they write masks, so many that these are whole bytes, if that leaves enough tasks.
void plan_groups(Plan& p, int64_t each, int64_t unit) {
  const int64_t tasks = ceil_div(p.channels, each);
  p.channels_per_task = round_up(tasks < kFew ? ceil_div(p.channels, power_of_two_above(tasks)) : each, unit);
  if (p.channels * p.inner % 8 != 0) return;
  const int64_t masked = round_up(p.channels_per_task, 8 / std::gcd(p.inner, int64_t{8}));
  if (masked == p.channels_per_task || p.channels / masked >= kEnoughChannels) p.channels_per_masked_task = masked;
}

void plan_strips(Plan& p) {
  const int64_t strip = p.outer * p.inner, grain = grain_of(p.numel());
  const bool cut = p.channels < kEnoughChannels;
  const int64_t wanted = cut ? power_of_two_below(std::clamp<int64_t>(strip / grain, 1, 2 * kTasks / p.channels)) : 1;
  p.rows_per_block = std::max<int64_t>(1, kRowElements / round_up(p.inner, kRowStep));
  p.piece = std::max<int64_t>(1, ceil_div(strip, wanted));
  p.pieces = std::max<int64_t>(1, ceil_div(strip, p.piece));
  if (p.pieces > 1) return;

  // Adjacent channels, where runs are short, so that a task reads and writes longer pieces of
  // memory; but few enough that they stay in the second-level cache between the two looks.
  int64_t each = std::max(ceil_div(grain, strip), std::min(ceil_div(kLongRun, p.inner), kCached / strip));
  each = std::min(each, std::max(ceil_div(grain, strip), p.channels / kEnoughChannels));
  plan_groups(p, std::max<int64_t>(1, each), 1);
}

// The matrix of columns, with so many outer indices in a row, and how reductions cut it.
void plan_matrix(Plan& p, int64_t fold) {
  p.sums_by_column = true;
  p.width = p.channels * p.inner * fold;
  p.rows = p.outer / fold;
  p.tail = p.outer % fold * p.channels * p.inner;

  const int64_t tasks = power_of_two_below(std::clamp<int64_t>(p.numel() / grain_of(p.numel()), 1, kTasks));
  const int64_t down = power_of_two_below(std::clamp<int64_t>(p.rows / kHeight, 1, tasks));
  p.block_rows = std::max<int64_t>(1, ceil_div(p.rows, down));
  p.blocks_down = ceil_div(p.rows, p.block_rows);
  const int64_t across = std::clamp<int64_t>(p.width / kNarrowestBlock, 1, tasks / down);
  p.block_width = std::min(round_up(ceil_div(p.width, across), kPadding), kColumns);
  p.blocks_across = ceil_div(p.width, p.block_width);
}

void plan_columns(Plan& p) {
  p.by_column = true;
  const int64_t period = p.channels * p.inner;
  int64_t fold = 1;
  if (period < kWidth) {
    fold = 16 / std::gcd(period, int64_t{16});
    fold *= ceil_div(kWidth, fold * period);
    fold = std::clamp<int64_t>(fold, 1, std::max<int64_t>(1, p.outer / 16));
  }
  plan_matrix(p, fold);
  if (fold > 1 || p.rows > kLowMatrix) return;
  const int64_t strip = (p.rows + kRowsPerColumn) * p.inner, grain = grain_of(p.channels * strip);
  plan_groups(p, std::max(ceil_div(grain, strip), ceil_div(kNarrowestBlock, p.inner)), kPadding);
}

}  // namespace

Plan make_plan(const Shape& shape) {
  Plan p = {};
  const bool planar = shape.layout == Layout::planar;
  p.outer = planar ? shape.n : shape.n * shape.s;
  p.channels = shape.c;
  p.inner = planar ? shape.s : 1;
  if (p.channels == 1) {
    p.inner *= p.outer;
    p.outer = 1;
  }
  if (p.numel() == 0) return p;
  // Long grains: memory comes in order within each, and the grains of a thread from the last to the first.
  int64_t grains = std::min(ceil_div(p.numel(), kOneThread), kMaxGrains);
  if (grains < kFew) grains = power_of_two_above(grains);
  p.grain = round_up(ceil_div(p.numel(), grains), 64);
  p.grains = ceil_div(p.numel(), p.grain);
  if (p.channels > 1 && p.inner < kShortestRun) {
    plan_columns(p);
  } else if (p.channels > 1 && scattered(p)) {
    plan_matrix(p, 1);
  } else {
    plan_strips(p);
  }
  return p;
}

SubMatrix block_of_columns(const Plan& p, int64_t down, int64_t across) {
  const bool tail = down == p.blocks_down;
  const int64_t row = tail ? p.rows : down * p.block_rows;
  const int64_t column = across * p.block_width;
  const int64_t end = tail ? p.tail : p.width;
  return {row * p.width + column,
          tail ? 1 : std::min(p.block_rows, p.rows - row),
          std::clamp<int64_t>(end - column, 0, p.block_width),
          p.width,
          column,
          0};
}

}  // namespace bnext::cpu
