// dy, x, sums -> dx, dresidual?. Reads dy and x once, and a bit for each element or the residual; in eval mode x only
// where the activation's derivative has to be found again.

#include "stages.h"

namespace bnext::cpu {

template <class A>
InputGradient<A>::InputGradient(const BackwardOperands<A>& operands)
    : ElementwisePass<A, BackwardArgs<A>>(operands.plan, operands.kernels, operands.args,
                                          operands.derivative == Derivative::general),
      params_(operands.params),
      mean_dy_(operands.plan),
      slope_(operands.plan) {
  const bool by_column = operands.plan.by_column;
  BackwardArgs<A>& args = this->args_;
  args.mean = operands.mean.data(by_column);
  args.scale = operands.scale.data(by_column);
  args.bias = operands.bias.data(by_column);
  args.mean_dy = mean_dy_.data(by_column);
  args.slope = slope_.data(by_column);
  Derivative derivative = operands.derivative;
  if (args.dz != nullptr) {
    args.dy = args.dz;
    args.dresidual = nullptr;  // there already, where it is wanted
    derivative = Derivative::none;
  }
  this->kernel_ = this->kernels_.gradient[static_cast<int>(derivative)][params_.training][by_column];
}

template <class A>
void InputGradient<A>::set(int64_t first, int64_t end) {
  if (!params_.training || params_.dx == nullptr) return;
  // In double: invstd squared may be beyond float's range.
  const double share = 1 / static_cast<double>(params_.count);
  A mean_dy[kChannelBatch], slope[kChannelBatch];
  for (int64_t channel = first; channel < end; channel++) {
    const double invstd = static_cast<const A*>(params_.invstd)[channel];
    const double sum_dy = static_cast<const A*>(params_.sum_dy)[channel];
    const double sum_dy_xmu = static_cast<const A*>(params_.sum_dy_xmu)[channel];
    mean_dy[channel - first] = static_cast<A>(sum_dy * share);
    slope[channel - first] = static_cast<A>(sum_dy_xmu * invstd * invstd * share);
  }
  mean_dy_.set(first, end, mean_dy);
  slope_.set(first, end, slope);
}

template class InputGradient<float>;
template class InputGradient<double>;

void batch_norm_backward_input(const BatchNormBackwardParams& p, const ParallelFor& parallel) {
  with_acc_type(p.dtype, [&](auto acc) {
    using A = decltype(acc);
    const Plan plan = make_plan(p.shape);
    BackwardOperands<A> operands(p, plan);
    InputGradient<A> gradient(operands);
    gradient.run_all(parallel, [&](int64_t first, int64_t end) {
      operands.set(first, end);
      gradient.set(first, end);
    });
  });
}

}  // namespace bnext::cpu
