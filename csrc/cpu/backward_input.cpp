// dy, x, sums -> dx, dresidual?. Reads dy and x once, and a bit for each element; in eval mode x
// only where the activation's sign has to be found again.
#include <algorithm>

#include "../core/half.h"
#include "stages.h"

namespace bnext::cpu {
namespace {

Gate gate_of(const BackwardParams& p) {
  if (p.activation == Activation::none) return Gate::none;
  return p.mask != nullptr ? Gate::mask : Gate::recompute;
}

}  // namespace

template <class A>
Backward<A>::Backward(const BackwardParams& p, const Plan& pl)
    : params(p),
      plan(pl),
      kernels(cpu::kernels<A>(p.dtype)),
      gate(static_cast<int>(gate_of(p))),
      mean(pl),
      scale(pl),
      bias(pl),
      mean_dy(pl),
      slope(pl),
      args{p.dy,
           p.x,
           p.mask,
           mean.data(),
           scale.data(),
           bias.data(),
           mean_dy.data(),
           slope.data(),
           p.dx,
           p.dresidual,
           pl.streams(size_of(p.dtype))} {
  for (int64_t ch = 0; ch < plan.channels; ch++) {
    mean.set(ch, static_cast<const A*>(p.mean)[ch]);
    // As the forward computed them, to the bit.
    scale.set(ch, load_scalar<A>(p.weight, p.weight_dtype, ch, A(1)) * static_cast<const A*>(p.invstd)[ch]);
    bias.set(ch, load_scalar<A>(p.bias, p.weight_dtype, ch, A(0)));
  }
}

template <class A>
void load_sums(Backward<A>& b, int64_t channel) {
  const BackwardParams& p = b.params;
  if (!p.training || p.dx == nullptr) return;
  // In double: invstd squared may be beyond float's range.
  const double count = static_cast<double>(p.count), invstd = static_cast<const A*>(p.invstd)[channel];
  const double sum_dy = static_cast<const A*>(p.sum_dy)[channel];
  const double sum_dy_xmu = static_cast<const A*>(p.sum_dy_xmu)[channel];
  b.mean_dy.set(channel, static_cast<A>(sum_dy / count));
  b.slope.set(channel, static_cast<A>(sum_dy_xmu * invstd * invstd / count));
}

template <class A>
void gradient(const Backward<A>& b, const SubMatrix& block) {
  b.kernels.gradient[b.gate][b.params.training][b.plan.by_column](b.args, block);
}

template <class A>
void gradient_of_all(const Backward<A>& b, const ParallelFor& parallel) {
  const Plan& plan = b.plan;
  for_each_task_reversed(parallel, plan.grains, [&](int64_t task) {
    const int64_t begin = task * plan.grain;
    for_each_block_of_memory(plan, begin, std::min(begin + plan.grain, plan.numel()),
                             [&](const SubMatrix& block) { gradient(b, block); });
  });
}

template struct Backward<float>;
template struct Backward<double>;
template void load_sums(Backward<float>&, int64_t);
template void load_sums(Backward<double>&, int64_t);
template void gradient(const Backward<float>&, const SubMatrix&);
template void gradient(const Backward<double>&, const SubMatrix&);
template void gradient_of_all(const Backward<float>&, const ParallelFor&);
template void gradient_of_all(const Backward<double>&, const ParallelFor&);

void backward_input(const BackwardParams& p, const ParallelFor& parallel) {
  with_acc_type(p.dtype, [&](auto acc) {
    const Plan plan = make_plan(p.shape);
    Backward<decltype(acc)> b(p, plan);
    for (int64_t ch = 0; ch < plan.channels; ch++) load_sums(b, ch);
    gradient_of_all(b, parallel);
  });
}

}  // namespace bnext::cpu
