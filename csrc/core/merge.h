// The statistics of several processes, merged: what each has is one row of BatchNormMergeParams::stats. One channel at
// a time, for host and device.
//
// A process sends its mean in two parts, since rounding would cost the merged variance what a large mean has more
// digits than the deviations from it; its variance; and its count. The merge is Welford::merge in double, in the order
// of the ranks: so all processes of a group get the same bits, and keep equal running statistics.
#pragma once

#include "half.h"
#include "welford.h"

namespace bnext {

// Zero-initialised ({}), every pointer nullable unless it says otherwise.
struct BatchNormMergeParams {
  int64_t ranks, c;
  DType dtype;          // of the statistics: f32 or f64
  DType running_dtype;  // of running_mean and running_var

  // [ranks][3 * c + 2], required: mean, what rounding took from it, biased variance, count / kCountBase,
  // count % kCountBase. Of a rank without values, nothing else is looked at.
  const void* stats;

  void* mean;      // [c], required
  void* invstd;    // [c], required
  int64_t* count;  // [1], required: of all ranks

  // Both or neither; left alone where no rank has a value.
  void* running_mean;                  // [c]
  void* running_var;                   // [c]
  const int64_t* num_batches_tracked;  // [1]; read, where `cumulative`, and not changed
  double momentum;
  bool cumulative;  // momentum=None: the weight is 1 / (num_batches_tracked + 1)
  bool biased;      // running_var takes the biased variance
  double eps;
};

// A float32 holds every integer up to this, and no channel has its square of values.
constexpr int64_t kCountBase = int64_t{1} << 24;

template <class A>
BNEXT_HD int64_t count_of_rank(const BatchNormMergeParams& p, int64_t rank) {
  const A* count = static_cast<const A*>(p.stats) + (rank + 1) * (3 * p.c + 2) - 2;
  return static_cast<int64_t>(count[0]) * kCountBase + static_cast<int64_t>(count[1]);
}

template <class A>
BNEXT_HD void merge_channel(const BatchNormMergeParams& p, int64_t channel) {
  Welford<double> whole = {};
  int64_t m = 0;
  for (int64_t rank = 0; rank < p.ranks; ++rank) {
    const A* row = static_cast<const A*>(p.stats) + rank * (3 * p.c + 2);
    const int64_t n = count_of_rank<A>(p, rank);
    whole.merge({static_cast<double>(n), row[channel], row[p.c + channel], row[2 * p.c + channel]});
    m += n;
  }
  if (channel == 0) *p.count = m;
  const A mean = static_cast<A>(whole.mean()), var = static_cast<A>(whole.var);
  static_cast<A*>(p.mean)[channel] = mean;
  static_cast<A*>(p.invstd)[channel] = m == 0 ? A(0) : inverse_std(var, p.eps);
  if (p.running_mean == nullptr || m == 0) return;
  const auto update = RunningUpdate<A>::of(p, m);
  const A running_mean = load_scalar<A>(p.running_mean, p.running_dtype, channel, A(0));
  const A running_var = load_scalar<A>(p.running_var, p.running_dtype, channel, A(0));
  store_scalar<A>(p.running_mean, p.running_dtype, channel, update.mean(running_mean, mean));
  store_scalar<A>(p.running_var, p.running_dtype, channel, update.var(running_var, var));
}

}  // namespace bnext
