// Backward: sums, then input gradient, or whichever of the two the outputs ask for. One parallel
// region, and dy and x read from memory once, where tasks can own whole channels; two otherwise.
#include "stages.h"

namespace bnext::cpu {
namespace {

template <class A>
void reduce_and_differentiate(const BackwardParams& p, const ParallelFor& parallel) {
  const Plan plan = make_plan(p.shape);
  Backward<A> b(p, plan);
  if (!plan.by_column && plan.pieces == 1) {
    for_each_group(parallel, plan, [&](int64_t first, int64_t end) {
      for (int64_t ch = first; ch < end; ch++) {
        store_sums<A>(p, ch, sums_of_strip(b, ch));
        load_sums(b, ch);
      }
      for_each_block_of_group(plan, first, end, [&](const SubMatrix& block) { gradient(b, block); });
    });
    return;
  }
  const std::vector<Sums> all = sums_of_all(b, parallel);
  for (int64_t ch = 0; ch < plan.channels; ch++) {
    store_sums<A>(p, ch, all[ch]);
    load_sums(b, ch);
  }
  gradient_of_all(b, parallel);
}

}  // namespace

void backward(const BackwardParams& p, const ParallelFor& parallel) {
  const bool wants_input = p.dx != nullptr || p.dresidual != nullptr;
  const bool wants_sums = p.dweight != nullptr || p.dbias != nullptr || (p.training && p.dx != nullptr);
  if (wants_sums && wants_input) {
    with_acc_type(p.dtype, [&](auto acc) { reduce_and_differentiate<decltype(acc)>(p, parallel); });
  } else if (wants_sums) {
    backward_reduce(p, parallel);
  } else if (wants_input) {
    backward_input(p, parallel);
  }
}

}  // namespace bnext::cpu
