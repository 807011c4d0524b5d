// x -> mean, var. Kernels give count, mean and variance of blocks; they are merged here, in double
// and in an order that is the data's alone. Reads x once.
#include <algorithm>

#include "stages.h"

namespace bnext::cpu {
namespace {

// Merges a sequence pairwise, as a binary counter counts: rounding errors grow with the logarithm
// of its length, which float64 data would notice.
class Merger {
 public:
  void add(Welford<double> w) {
    int level = 0;
    for (; (length_ >> level & 1) != 0; level++) {
      levels_[level].merge(w);
      w = levels_[level];
    }
    levels_[level] = w;
    length_++;
  }
  Welford<double> total() const {
    Welford<double> w = {};
    int level = 0;
    while (length_ >> level != 0) level++;
    while (level-- > 0)
      if ((length_ >> level & 1) != 0) w.merge(levels_[level]);
    return w;
  }

 private:
  uint64_t length_ = 0;
  Welford<double> levels_[64];
};

// Of so few numbers, the mean of a fourth may well be off by half their deviation; and a lane of a vector sums up few.
constexpr double kFew = 256;

template <class A>
Welford<double> stats_of_piece(const BatchNormForwardParams& p, const Plan& plan, int64_t channel, int64_t piece) {
  const Kernels<A>& k = kernels<A>(p.dtype);
  const int64_t strip = plan.outer * plan.inner, begin = piece * plan.piece;
  Merger merger;
  double seen = 0, mean = 0;
  const auto add = [&](const SubMatrix& block, int64_t next) {
    const double count = static_cast<double>(block.rows * block.width);
    // The mean of what came before, if that is enough: else it may be far from theirs.
    const A centre = count <= kPerCentre * seen ? static_cast<A>(mean) : k.centre(p.x, block);
    Welford<double> part = k.moments(p.x, block, centre, next);
    // Where the block is to one side of the centre, its squares cancel: again, about its own mean, from the cache.
    if (4 * part.offset * part.offset > part.var && count > kFew)
      part = k.moments(p.x, block, static_cast<A>(part.mean()), next);
    seen += count;
    mean += (part.mean() - mean) * (count / seen);
    merger.add(part);
  };
  for_each_block_of_strip(plan, channel, begin, std::min(begin + plan.piece, strip), add);
  return merger.total();
}

template <class A>
void stats_of_pieces(const BatchNormForwardParams& p, const Plan& plan, const ParallelFor& parallel,
                     const StatsSink& sink) {
  std::vector<Welford<double>> parts(plan.channels * plan.pieces);
  for_each_task(parallel, plan.channels * plan.pieces, [&](int64_t task) {
    parts[task] = stats_of_piece<A>(p, plan, task / plan.pieces, task % plan.pieces);
  });
  constexpr int64_t kMerge = 8;  // additions' time
  for_all_channels(parallel, plan, kMerge * plan.pieces, [&](int64_t first, int64_t end) {
    Welford<double> whole[kChannelBatch] = {};
    for (int64_t channel = first; channel < end; channel++)
      for (int64_t i = 0; i < plan.pieces; i++) whole[channel - first].merge(parts[channel * plan.pieces + i]);
    sink(first, end, whole);
  });
}

// Statistics of columns.
template <class A>
class ColumnStats {
 public:
  ColumnStats(const BatchNormForwardParams& p, const Plan& plan, const ColumnEntries& entries)
      : params_(p),
        plan_(plan),
        kernels_(kernels<A>(p.dtype)),
        entries_(entries),
        shift_(entries.size()),
        offset_(entries.size()),
        var_(entries.size()) {}

  void set(int64_t down, const SubMatrix& block) {
    const int64_t at = entries_.at(down, block.param);
    kernels_.column_moments(params_.x, block, &shift_[at], &offset_[at], &var_[at]);
  }

  // Merges the columns of each of channels [first, end), at most kChannelBatch, and passes the result on. Two passes
  // over them, as over the data: no division for each.
  void merge(int64_t first, int64_t end, const StatsSink& sink) const {
    if (plan_.width == plan_.channels && entries_.splits() == 1) return pass_on(first, end, sink);
    double centre[kChannelBatch], mean[kChannelBatch], m2[kChannelBatch];
    for (int64_t channel = first; channel < end; channel++)
      centre[channel - first] = shift_[entries_.at(0, channel * plan_.inner)];
    const double count = static_cast<double>(plan_.outer * plan_.inner);
    sum(first, end, mean, [&](int64_t i, int64_t at) { return (shift_[at] - centre[i]) + offset_[at]; });
    for (int64_t i = 0; i < end - first; i++) mean[i] /= count;
    sum(first, end, m2, [&](int64_t i, int64_t at) {
      const double d = ((shift_[at] - centre[i]) + offset_[at]) - mean[i];
      return var_[at] + d * d;
    });
    Welford<double> whole[kChannelBatch];
    for (int64_t i = 0; i < end - first; i++) whole[i] = {count, centre[i], mean[i], m2[i] / count};
    sink(first, end, whole);
  }

 private:
  // Where each channel is one column.
  void pass_on(int64_t first, int64_t end, const StatsSink& sink) const {
    Welford<double> whole[kChannelBatch];
    const double count = static_cast<double>(plan_.outer);
    const int64_t at = entries_.at(0, first);
    for (int64_t i = 0; i < end - first; i++) whole[i] = {count, shift_[at + i], offset_[at + i], var_[at + i]};
    sink(first, end, whole);
  }

  // Sums of term(channel - first, entry of a column of that channel), each as often as the column has rows.
  template <class F>
  void sum(int64_t first, int64_t end, double* totals, F term) const {
    std::fill(totals, totals + (end - first), 0.0);
    for (int64_t down = 0; down < entries_.splits(); down++) {
      double parts[kChannelBatch] = {};
      entries_.for_each(down, first, end,
                        [&](int64_t channel, int64_t at) { parts[channel - first] += term(channel - first, at); });
      const double rows = static_cast<double>(block_of_columns(plan_, down, 0).rows);
      for (int64_t i = 0; i < end - first; i++) totals[i] += parts[i] * rows;
    }
  }

  const BatchNormForwardParams& params_;
  const Plan& plan_;
  const Kernels<A>& kernels_;
  const ColumnEntries entries_;
  std::vector<A> shift_;
  std::vector<double> offset_, var_;
};

template <class A>
void stats_of_columns(const BatchNormForwardParams& p, const Plan& plan, const ParallelFor& parallel,
                      const StatsSink& sink) {
  ColumnStats<A> stats(p, plan, ColumnEntries(plan));
  reduce_columns(parallel, plan, stats);
  for_all_channels(parallel, plan, 4 * plan.splits() * (plan.width / plan.channels),
                   [&](int64_t first, int64_t end) { stats.merge(first, end, sink); });
}

}  // namespace

template <class A>
void stats_of_group(const BatchNormForwardParams& p, const Plan& plan, int64_t first, int64_t end,
                    const StatsSink& sink) {
  if (plan.sums_by_column) {
    const SubMatrix group = columns_of_group(plan, first, end);
    ColumnStats<A> stats(p, plan, ColumnEntries(plan, group));
    reduce_columns(group, stats);
    for_each_step(first, end, [&](int64_t begin, int64_t stop) { stats.merge(begin, stop, sink); });
    return;
  }
  for_each_step(first, end, [&](int64_t begin, int64_t stop) {
    Welford<double> whole[kChannelBatch];
    for (int64_t channel = begin; channel < stop; channel++)
      whole[channel - begin] = stats_of_piece<A>(p, plan, channel, 0);
    sink(begin, stop, whole);
  });
}

template <class A>
void stats_of_all(const BatchNormForwardParams& p, const Plan& plan, const ParallelFor& parallel,
                  const StatsSink& sink) {
  if (plan.channels_per_task > 0) {
    for_each_group(parallel, plan, plan.channels_per_task,
                   [&](int64_t first, int64_t end) { stats_of_group<A>(p, plan, first, end, sink); });
  } else if (plan.sums_by_column) {
    stats_of_columns<A>(p, plan, parallel, sink);
  } else {
    stats_of_pieces<A>(p, plan, parallel, sink);
  }
}

template void stats_of_group<float>(const BatchNormForwardParams&, const Plan&, int64_t, int64_t, const StatsSink&);
template void stats_of_group<double>(const BatchNormForwardParams&, const Plan&, int64_t, int64_t, const StatsSink&);
template void stats_of_all<float>(const BatchNormForwardParams&, const Plan&, const ParallelFor&, const StatsSink&);
template void stats_of_all<double>(const BatchNormForwardParams&, const Plan&, const ParallelFor&, const StatsSink&);

void batch_norm_stats(const BatchNormForwardParams& p, const ParallelFor& parallel) {
  with_acc_type(p.dtype, [&](auto acc) {
    using A = decltype(acc);
    stats_of_all<A>(p, make_plan(p.shape), parallel, [&](int64_t first, int64_t end, const Welford<double>* stats) {
      for (int64_t channel = first; channel < end; channel++) {
        const Welford<double>& of_channel = stats[channel - first];
        const A mean = static_cast<A>(of_channel.mean());
        static_cast<A*>(p.mean)[channel] = mean;
        static_cast<A*>(p.var)[channel] = static_cast<A>(of_channel.var);
        if (p.mean_rest == nullptr) continue;
        static_cast<A*>(p.mean_rest)[channel] = of_channel.mean_rest(mean);
      }
    });
  });
}

}  // namespace bnext::cpu
