// Training forward: statistics, running statistics, normalization. One parallel region, and x read
// from memory once, where tasks can own whole channels; two regions otherwise.
#include "../core/half.h"
#include "stages.h"

namespace bnext::cpu {
namespace {

template <class A>
void update_running(const BatchNormForwardParams& p, const RunningUpdate<A>& update, int64_t ch, A mean, A var) {
  const A old_mean = load_scalar<A>(p.running_mean, p.running_dtype, ch, A(0));
  const A old_var = load_scalar<A>(p.running_var, p.running_dtype, ch, A(0));
  store_scalar(p.running_mean, p.running_dtype, ch, update.mean(old_mean, mean));
  store_scalar(p.running_var, p.running_dtype, ch, update.var(old_var, var));
}

}  // namespace

void forward(const BatchNormForwardParams& p, const ParallelFor& parallel) {
  with_acc_type(p.dtype, [&](auto acc) {
    using A = decltype(acc);
    const Plan plan = make_plan(p.shape);
    Normalizer<A> normalizer(p, plan);
    const auto update = RunningUpdate<A>::of(p, p.shape.per_channel());
    const auto finish = [&](int64_t ch, const Welford<double>& stats) {
      const A mean = static_cast<A>(stats.mean()), var = static_cast<A>(stats.var);
      const A invstd = inverse_std(var, p.eps);
      static_cast<A*>(p.mean)[ch] = mean;
      static_cast<A*>(p.invstd)[ch] = invstd;
      update_running(p, update, ch, mean, var);
      normalizer.set(ch, mean, invstd);
    };

    if (!plan.by_column && plan.pieces == 1 && (p.mask == nullptr || plan.whole_bytes)) {
      const int64_t each = p.mask == nullptr ? plan.channels_per_task : plan.channels_per_masked_task;
      for_each_group(parallel, plan, each, [&](int64_t first, int64_t end) {
        for (int64_t ch = first; ch < end; ch++) finish(ch, stats_of_strip<A>(p, plan, ch));
        for_each_block_of_group(plan, first, end, [&](const SubMatrix& block) { normalizer.run(block); });
      });
    } else {
      stats_of_all<A>(p, plan, parallel, finish);
      normalizer.run_all(parallel);
    }
  });
  if (p.num_batches_tracked != nullptr) ++*p.num_batches_tracked;
}

}  // namespace bnext::cpu
