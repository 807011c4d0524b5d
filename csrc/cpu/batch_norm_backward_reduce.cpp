// dy, x -> sum_dy, sum_dy_xmu, dweight?, dbias?. Kernels give the sums of blocks; they are added up
// here, in double and in the order of the data. Reads dy and x once, and a bit for each element.
#include <algorithm>

#include "stages.h"

namespace bnext::cpu {
namespace {

// Those that a backward reads and writes.
int64_t tensors_of(const BatchNormBackwardParams& p) {
  return 2 + (p.residual != nullptr) + (p.dx != nullptr) + (p.dresidual != nullptr);
}

template <class A>
Sums sums_of_piece(const BackwardOperands<A>& b, int64_t channel, int64_t piece) {
  const int64_t strip = b.plan.outer * b.plan.inner, begin = piece * b.plan.piece;
  const int64_t end = std::min(begin + b.plan.piece, strip);
  Sums total = {};
  for_each_block_of_strip(b.plan, channel, begin, end, [&](const SubMatrix& block, int64_t next) {
    Sums part;
    b.sums(block, 1, next, &part);
    total.add(part);
  });
  return total;
}

template <class A>
void sums_of_pieces(const BackwardOperands<A>& b, const ParallelFor& parallel, const SumsSink& sink) {
  const Plan& plan = b.plan;
  std::vector<Sums> parts(plan.channels * plan.pieces);
  for_each_task(parallel, plan.channels * plan.pieces,
                [&](int64_t task) { parts[task] = sums_of_piece(b, task / plan.pieces, task % plan.pieces); });
  for_all_channels(parallel, plan, plan.pieces, [&](int64_t first, int64_t end) {
    Sums whole[kChannelBatch] = {};
    for (int64_t channel = first; channel < end; channel++)
      for (int64_t i = 0; i < plan.pieces; i++) whole[channel - first].add(parts[channel * plan.pieces + i]);
    sink(first, end, whole);
  });
}

// Sums of columns.
template <class A>
class ColumnSums {
 public:
  ColumnSums(const BackwardOperands<A>& b, const ColumnEntries& entries)
      : operands_(b), entries_(entries), dy_(entries.size()), dy_xmu_(entries.size()) {}

  void set(int64_t down, const SubMatrix& block) {
    const int64_t at = entries_.at(down, block.param);
    const BackwardOperands<A>& b = operands_;
    b.kernels.column_sums[static_cast<int>(b.derivative)](b.args, block, &dy_[at], &dy_xmu_[at]);
  }

  // Adds up the columns of each of channels [first, end), at most kChannelBatch, and passes the result on.
  void merge(int64_t first, int64_t end, const SumsSink& sink) const {
    Sums whole[kChannelBatch] = {};
    for (int64_t down = 0; down < entries_.splits(); down++) {
      entries_.for_each(down, first, end,
                        [&](int64_t channel, int64_t at) { whole[channel - first].add({dy_[at], dy_xmu_[at]}); });
    }
    sink(first, end, whole);
  }

 private:
  const BackwardOperands<A>& operands_;
  const ColumnEntries entries_;
  std::vector<double> dy_, dy_xmu_;
};

template <class A>
void sums_of_columns(const BackwardOperands<A>& b, const ParallelFor& parallel, const SumsSink& sink) {
  const Plan& plan = b.plan;
  ColumnSums<A> sums(b, ColumnEntries(plan));
  reduce_columns(parallel, plan, sums);
  for_all_channels(parallel, plan, plan.splits() * (plan.width / plan.channels),
                   [&](int64_t first, int64_t end) { sums.merge(first, end, sink); });
}

}  // namespace

template <class A>
BackwardOperands<A>::BackwardOperands(const BatchNormBackwardParams& p, const Plan& pl, bool keeps_dz)
    : params(p),
      plan(pl),
      kernels(cpu::kernels<A>(p.dtype)),
      derivative(derivative_of(p)),
      mean(pl, /*reductions_read_it=*/true),
      scale(pl, finds_argument()),
      bias(pl, finds_argument()),
      args{p.dy,
           p.x,
           p.mask,
           p.residual,
           mean.data(pl.sums_by_column),
           scale.data(pl.sums_by_column),
           bias.data(pl.sums_by_column),
           nullptr,
           nullptr,
           p.activation,
           static_cast<A>(p.activation_param),
           p.dx,
           p.dresidual,
           keeps_dz ? (p.dresidual != nullptr ? p.dresidual : p.dx) : nullptr,
           exceeds_cache(tensors_of(p) * pl.numel() * size_of(p.dtype))} {}

template <class A>
void BackwardOperands<A>::set(int64_t first, int64_t end) {
  A scales[kChannelBatch], biases[kChannelBatch];
  load_channels(scales, params.weight, params.weight_dtype, first, end, A(1));
  // As the forward computed them, to the bit.
  for (int64_t channel = first; channel < end; channel++)
    scales[channel - first] *= static_cast<const A*>(params.invstd)[channel];
  mean.set(first, end, static_cast<const A*>(params.mean) + first);
  scale.set(first, end, scales);
  if (!finds_argument()) return;
  load_channels(biases, params.bias, params.weight_dtype, first, end, A(0));
  bias.set(first, end, biases);
}

template <class A>
void sums_of_group(BackwardOperands<A>& b, int64_t first, int64_t end, const SumsSink& sink) {
  for_each_step(first, end, [&](int64_t begin, int64_t stop) { b.set(begin, stop); });
  if (b.plan.sums_by_column) {
    const SubMatrix group = columns_of_group(b.plan, first, end);
    ColumnSums<A> sums(b, ColumnEntries(b.plan, group));
    reduce_columns(group, sums);
    for_each_step(first, end, [&](int64_t begin, int64_t stop) { sums.merge(begin, stop, sink); });
    return;
  }
  for_each_step(first, end, [&](int64_t begin, int64_t stop) {
    Sums whole[kChannelBatch];
    if (b.plan.channel_is_block()) {
      b.sums(b.plan.block_of_channel(begin), stop - begin, stop * b.plan.inner, whole);
    } else {
      for (int64_t channel = begin; channel < stop; channel++) whole[channel - begin] = sums_of_piece(b, channel, 0);
    }
    sink(begin, stop, whole);
  });
}

template <class A>
void sums_of_all(BackwardOperands<A>& b, const ParallelFor& parallel, const SumsSink& sink) {
  const Plan& plan = b.plan;
  if (plan.channels_per_task > 0) {
    for_each_group(parallel, plan, plan.channels_per_task,
                   [&](int64_t first, int64_t end) { sums_of_group(b, first, end, sink); });
  } else {
    for_all_channels(parallel, plan, kSetChannel, [&](int64_t first, int64_t end) { b.set(first, end); });
    if (plan.sums_by_column) sums_of_columns(b, parallel, sink);
    else sums_of_pieces(b, parallel, sink);
  }
}

template <class A>
void store_sums(const BatchNormBackwardParams& p, int64_t first, int64_t end, const Sums* sums) {
  A* const dy = static_cast<A*>(p.sum_dy) + first;
  A* const dy_xmu = static_cast<A*>(p.sum_dy_xmu) + first;
  A dweight[kChannelBatch];
  for (int64_t i = 0; i < end - first; i++) {
    dy[i] = static_cast<A>(sums[i].dy);
    dy_xmu[i] = static_cast<A>(sums[i].dy_xmu);
    dweight[i] = dy_xmu[i] * static_cast<const A*>(p.invstd)[first + i];
  }
  store_channels(dweight, p.dweight, p.weight_dtype, first, end);
  store_channels(dy, p.dbias, p.weight_dtype, first, end);
}

template struct BackwardOperands<float>;
template struct BackwardOperands<double>;
template void sums_of_group(BackwardOperands<float>&, int64_t, int64_t, const SumsSink&);
template void sums_of_group(BackwardOperands<double>&, int64_t, int64_t, const SumsSink&);
template void sums_of_all(BackwardOperands<float>&, const ParallelFor&, const SumsSink&);
template void sums_of_all(BackwardOperands<double>&, const ParallelFor&, const SumsSink&);
template void store_sums<float>(const BatchNormBackwardParams&, int64_t, int64_t, const Sums*);
template void store_sums<double>(const BatchNormBackwardParams&, int64_t, int64_t, const Sums*);

void batch_norm_backward_reduce(const BatchNormBackwardParams& p, const ParallelFor& parallel) {
  with_acc_type(p.dtype, [&](auto acc) {
    using A = decltype(acc);
    const Plan plan = make_plan(p.shape);
    BackwardOperands<A> operands(p, plan);
    sums_of_all(operands, parallel,
                [&](int64_t first, int64_t end, const Sums* sums) { store_sums<A>(p, first, end, sums); });
  });
}

}  // namespace bnext::cpu
