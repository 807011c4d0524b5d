// Training forward: statistics, running statistics, normalization. One parallel region, and x read
// from memory once, where tasks can own whole channels; two regions otherwise.
#include "stages.h"

namespace bnext::cpu {
namespace {

template <class A>
void update_running(const BatchNormForwardParams& p, const RunningUpdate<A>& update, int64_t first, int64_t end,
                    const A* mean, const A* var) {
  if (p.running_mean == nullptr) return;
  A running_mean[kChannelBatch], running_var[kChannelBatch];
  load_channels(running_mean, p.running_mean, p.running_dtype, first, end, A(0));
  load_channels(running_var, p.running_var, p.running_dtype, first, end, A(0));
  for (int64_t i = 0; i < end - first; i++) {
    running_mean[i] = update.mean(running_mean[i], mean[i]);
    running_var[i] = update.var(running_var[i], var[i]);
  }
  store_channels(running_mean, p.running_mean, p.running_dtype, first, end);
  store_channels(running_var, p.running_var, p.running_dtype, first, end);
}

}  // namespace

void batch_norm_forward(const BatchNormForwardParams& p, const ParallelFor& parallel) {
  with_acc_type(p.dtype, [&](auto acc) {
    using A = decltype(acc);
    const Plan plan = make_plan(p.shape);
    Normalizer<A> normalizer(p, plan, /*after_stats=*/true);
    const auto update = RunningUpdate<A>::of(p, p.shape.per_channel());
    const StatsSink finish = [&](int64_t first, int64_t end, const Welford<double>* stats) {
      A* const mean = static_cast<A*>(p.mean) + first;
      A* const invstd = static_cast<A*>(p.invstd) + first;
      A var[kChannelBatch];
      for (int64_t i = 0; i < end - first; i++) {
        mean[i] = static_cast<A>(stats[i].mean());
        var[i] = static_cast<A>(stats[i].var);
        invstd[i] = inverse_std(var[i], p.eps);
      }
      update_running(p, update, first, end, mean, var);
      normalizer.set(first, end, mean, invstd);
    };

    const int64_t each = p.mask == nullptr ? plan.channels_per_task : plan.channels_per_masked_task;
    if (each > 0) {
      for_each_group(parallel, plan, each, [&](int64_t first, int64_t end) {
        stats_of_group<A>(p, plan, first, end, finish);
        normalizer.run_group(first, end);
      });
    } else {
      stats_of_all<A>(p, plan, parallel, finish);
      normalizer.run_all(parallel);
    }
  });
  if (p.num_batches_tracked != nullptr) ++*p.num_batches_tracked;
}

}  // namespace bnext::cpu
