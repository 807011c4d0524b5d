// x, residual? -> y, mask?. Reads x and the residual once, writes y and a bit for each element.

#include "stages.h"

namespace bnext::cpu {

template <class A>
Normalizer<A>::Normalizer(const BatchNormForwardParams& p, const Plan& plan, bool after_stats)
    : ElementwisePass<A, NormalizeArgs<A>>(plan, kernels<A>(p.dtype), {}, epilogue_of(p) == Epilogue::general),
      params_(p),
      mean_(plan),
      scale_(plan),
      bias_(plan) {
  NormalizeArgs<A>& args = this->args_;
  args.x = p.x;
  args.residual = p.residual;
  args.y = p.y;
  args.mask = p.mask;
  args.mean = mean_.data(plan.by_column);
  args.scale = scale_.data(plan.by_column);
  args.bias = bias_.data(plan.by_column);
  args.activation = p.activation;
  args.activation_param = static_cast<A>(p.activation_param);
  const int64_t tensors = (after_stats ? 3 : 2) + (p.residual == nullptr ? 0 : 1);
  const int64_t bytes = tensors * plan.numel() * size_of(p.dtype);
  // What a cache holds of an output is found there by whoever comes next; so it takes twice a cache. It takes one where
  // there is a residual to read, where tasks take whole channels, and in backward, since there stores past the caches
  // save more than that loses.
  const bool takes_whole_channels = after_stats && plan.channels_per_task > 0;
  args.beyond_cache = exceeds_cache(takes_whole_channels || p.residual != nullptr ? bytes : bytes / 2);
  // What is in a cache anyway is found sooner in ascending order, which the hardware foresees. (Backward, which reads
  // two tensors, it makes no difference on 1 thread, and takes 4 % more on 2.)
  this->from_end_ = args.beyond_cache;
  this->kernel_ = this->kernels_.normalize[static_cast<int>(epilogue_of(p))][plan.by_column];
}

template <class A>
void Normalizer<A>::set(int64_t first, int64_t end, const A* mean, const A* invstd) {
  A scale[kChannelBatch], bias[kChannelBatch];
  load_channels(scale, params_.weight, params_.weight_dtype, first, end, A(1));
  load_channels(bias, params_.bias, params_.weight_dtype, first, end, A(0));
  for (int64_t i = 0; i < end - first; i++) scale[i] *= invstd[i];
  mean_.set(first, end, mean);
  scale_.set(first, end, scale);
  bias_.set(first, end, bias);
}

template class Normalizer<float>;
template class Normalizer<double>;

void batch_norm_normalize(const BatchNormForwardParams& p, const ParallelFor& parallel) {
  with_acc_type(p.dtype, [&](auto acc) {
    using A = decltype(acc);
    const Plan plan = make_plan(p.shape);
    Normalizer<A> normalizer(p, plan, /*after_stats=*/false);
    constexpr DType acc_dtype = dtype_of<A>::value;
    normalizer.run_all(parallel, [&](int64_t first, int64_t end) {
      A mean[kChannelBatch], invstd[kChannelBatch];
      if (p.running_mean == nullptr) {
        load_channels(mean, p.mean, acc_dtype, first, end, A(0));
        load_channels(invstd, p.invstd, acc_dtype, first, end, A(1));
      } else {
        load_channels(mean, p.running_mean, p.running_dtype, first, end, A(0));
        load_channels(invstd, p.running_var, p.running_dtype, first, end, A(1));
        for (int64_t i = 0; i < end - first; i++) invstd[i] = inverse_std(invstd[i], p.eps);
        store_channels(mean, p.mean, acc_dtype, first, end);
        store_channels(invstd, p.invstd, acc_dtype, first, end);
      }
      normalizer.set(first, end, mean, invstd);
    });
  });
}

}  // namespace bnext::cpu
