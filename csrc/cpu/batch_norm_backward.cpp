// Backward: sums, then input gradient, or whichever of the two the outputs ask for. One parallel
// region, and dy and x read from memory once, where tasks can own whole channels; two otherwise.
#include "stages.h"

namespace bnext::cpu {
namespace {

template <class A>
void reduce_and_differentiate(const BatchNormBackwardParams& p, const ParallelFor& parallel) {
  const Plan plan = make_plan(p.shape);
  // A smooth activation's derivative takes more instructions than a store and a load of dy', where those round nothing.
  const bool keeps_dz = saves_of(p.activation) == Saves::residual && size_of(p.dtype) == acc_size_of(p.dtype);
  BackwardOperands<A> operands(p, plan, keeps_dz);
  InputGradient<A> gradient(operands);
  const SumsSink finish = [&](int64_t first, int64_t end, const Sums* sums) {
    store_sums<A>(p, first, end, sums);
    gradient.set(first, end);
  };

  if (plan.channels_per_task > 0) {
    for_each_group(parallel, plan, plan.channels_per_task, [&](int64_t first, int64_t end) {
      sums_of_group(operands, first, end, finish);
      gradient.run_group(first, end);
    });
  } else {
    sums_of_all(operands, parallel, finish);
    gradient.run_all(parallel);
  }
}

}  // namespace

void batch_norm_backward(const BatchNormBackwardParams& p, const ParallelFor& parallel) {
  if (p.reduces() && p.elementwise()) {
    with_acc_type(p.dtype, [&](auto acc) { reduce_and_differentiate<decltype(acc)>(p, parallel); });
  } else if (p.reduces()) {
    batch_norm_backward_reduce(p, parallel);
  } else if (p.elementwise()) {
    batch_norm_backward_input(p, parallel);
  }
}

}  // namespace bnext::cpu
