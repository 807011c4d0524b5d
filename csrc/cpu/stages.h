// The halves that stages are made of, for A the accumulation type. `forward` and `backward` run two of them on some
// channels after others, while these are in cache; where tasks do not take whole channels, they run the first on all
// channels and then the second.
#pragma once

#include <algorithm>
#include <limits>

#include "cache.h"
#include "channels.h"
#include "cpu.h"

namespace bnext::cpu {

// Calls run(task) for every task, or from each thread's last task to its first.
template <class F>
void for_each_task(const ParallelFor& parallel, int64_t tasks, F run) {
  if (tasks == 0) return;
  parallel(tasks, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) run(task);
  });
}
template <class F>
void for_each_task_reversed(const ParallelFor& parallel, int64_t tasks, F run) {
  if (tasks == 0) return;
  parallel(tasks, [&](int64_t begin, int64_t end) {
    for (int64_t task = end; task-- > begin;) run(task);
  });
}

// Calls run(first, end) for groups of `each` adjacent channels.
template <class F>
void for_each_group(const ParallelFor& parallel, const Plan& plan, int64_t each, F run) {
  for_each_task(parallel, ceil_div(plan.channels, each),
                [&](int64_t task) { run(task * each, std::min((task + 1) * each, plan.channels)); });
}

// What a channel's parameters are set in, in additions' time.
constexpr int64_t kSetChannel = 16;

// Calls run(first, end) for all channels, some together, each of which is `work` additions or as much: some
// microseconds of them to a task.
template <class F>
void for_all_channels(const ParallelFor& parallel, const Plan& plan, int64_t work, F run) {
  constexpr int64_t kWork = 8192;
  for_each_group(parallel, plan, std::max<int64_t>(1, kWork / work),
                 [&](int64_t first, int64_t end) { for_each_step(first, end, run); });
}

// Channels [first, end) of a plan by columns whose tasks take whole channels.
inline SubMatrix columns_of_group(const Plan& plan, int64_t first, int64_t end) {
  return {first * plan.inner, plan.rows, (end - first) * plan.inner, plan.width, first * plan.inner, 0};
}

// The blocks of channels [first, end): few, of many rows, unless runs are so short that it takes less to read them as
// they lie in memory. Strips come last image first: what was read last is what is still in cache.
template <class F>
void for_each_block_of_group(const Plan& plan, int64_t first, int64_t end, F f) {
  constexpr int64_t kLongRows = 128;
  const int64_t inner = plan.inner, image = plan.channels * inner;
  if (plan.by_column) {
    f(columns_of_group(plan, first, end));
  } else if (end - first == 1 || (end - first <= plan.outer && inner >= kLongRows)) {
    for (int64_t channel = first; channel < end; channel++)
      f(SubMatrix{(plan.outer - 1) * image + channel * inner, plan.outer, inner, -image, channel, 0});
  } else {
    for (int64_t o = plan.outer; o-- > 0;) f(SubMatrix{o * image + first * inner, end - first, inner, inner, first, 1});
  }
}

// A block in pieces of at most `width` columns.
template <class F>
void for_each_piece(const Plan& plan, const SubMatrix& block, int64_t width, F f) {
  if (block.width <= width) return f(block);
  for (int64_t r = 0; r < block.rows; r++) {
    for (int64_t j = 0; j < block.width; j += width) {
      const int64_t param = block.param + r * block.param_step + (plan.by_column ? j : 0);
      f(SubMatrix{block.first + r * block.stride + j, 1, std::min(width, block.width - j), block.stride, param, 0});
    }
  }
}

// A block of columns in groups of at most so many columns, all rows of each.
template <class F>
void for_each_group_of_columns(const SubMatrix& block, int64_t columns, F f) {
  for (int64_t j = 0; j < block.width; j += columns)
    f(SubMatrix{block.first + j, block.rows, std::min(columns, block.width - j), block.stride, block.param + j, 0});
}

// Calls columns.set(down, block) for the blocks of a group, which is one split, or for all, on several threads.
template <class Columns>
void reduce_columns(const SubMatrix& group, Columns& columns) {
  for_each_group_of_columns(group, kColumns, [&](const SubMatrix& block) { columns.set(0, block); });
}
template <class Columns>
void reduce_columns(const ParallelFor& parallel, const Plan& plan, Columns& columns) {
  for_each_task(parallel, plan.blocks_down * plan.blocks_across, [&](int64_t task) {
    for_each_block_of_columns(plan, task, [&](int64_t down, const SubMatrix& block) { columns.set(down, block); });
  });
}

// batch_norm_stats.cpp. Calls sink(first, end, statistics of channels [first, end)), at most kChannelBatch of them at a
// time, for a task's channels where it takes whole ones, or for all channels, on several threads.
using StatsSink = std::function<void(int64_t first, int64_t end, const Welford<double>*)>;
template <class A>
void stats_of_group(const BatchNormForwardParams&, const Plan&, int64_t first, int64_t end, const StatsSink& sink);
template <class A>
void stats_of_all(const BatchNormForwardParams&, const Plan&, const ParallelFor&, const StatsSink& sink);

// An elementwise pass, once what belongs to each channel is set: of a task's channels, where it takes whole ones, or of
// all, on several threads.
template <class A, class Args>
class ElementwisePass {
 public:
  void run_group(int64_t first, int64_t end) const {
    for_each_block_of_group(plan_, first, end, [&](const SubMatrix& block) { run(block); });
    end_task();
  }
  void run_all(const ParallelFor& parallel) const {
    const auto run_grain = [&](int64_t task) {
      const int64_t begin = task * plan_.grain;
      for_each_block_of_memory(plan_, begin, std::min(begin + plan_.grain, plan_.numel()),
                               [&](const SubMatrix& block) { run(block); });
      end_task();
    };
    if (from_end_) for_each_task_reversed(parallel, plan_.grains, run_grain);
    else for_each_task(parallel, plan_.grains, run_grain);
  }
  // The same, each channel after set(first, end), of at most kChannelBatch channels.
  template <class F>
  void run_all(const ParallelFor& parallel, F set) const {
    const int64_t each = args_.mask == nullptr ? plan_.channels_per_task : plan_.channels_per_masked_task;
    // Of a few rows: to set what each column has takes as long as these.
    if (plan_.by_column && each > 0) {
      for_each_group(parallel, plan_, each, [&](int64_t first, int64_t end) {
        for_each_step(first, end, set);
        run_group(first, end);
      });
    } else {
      for_all_channels(parallel, plan_, kSetChannel, set);
      run_all(parallel);
    }
  }

 protected:
  // `general`: of the kernels' `general` variant, whose rows are limited.
  ElementwisePass(const Plan& plan, const Kernels<A>& kernels, const Args& args, bool general)
      : plan_(plan),
        kernels_(kernels),
        args_(args),
        widest_(general ? kGeneralRow : std::numeric_limits<int64_t>::max()) {}

  const Plan& plan_;
  const Kernels<A>& kernels_;
  Args args_;
  int64_t widest_;
  // Whether run_all goes from the end of memory: what the pass before read last may still be in a cache.
  bool from_end_ = true;
  void (*kernel_)(const Args&, const SubMatrix&) = nullptr;

 private:
  void run(const SubMatrix& block) const {
    const auto run_kernel = [&](const SubMatrix& part) { kernel_(args_, part); };
    // The parameters of so many columns, of up to five arrays, stay in the first-level cache while the rows pass by.
    // Not of tensors beyond the cache, which are read as memory comes, nor where rows share a byte of a mask, which is
    // written in order.
    constexpr int64_t kColumnsOfParameters = 1536;
    static_assert(kColumnsOfParameters <= kGeneralRow);
    if (plan_.by_column && plan_.width % 8 == 0 && !args_.beyond_cache) {
      // Equal ones, since a few columns of long rows are read slowly.
      const int64_t groups = ceil_div(block.width, kColumnsOfParameters);
      for_each_group_of_columns(block, round_up(ceil_div(block.width, groups), 64), run_kernel);
    } else {
      for_each_piece(plan_, block, widest_, run_kernel);
    }
  }
  void end_task() const {
    if (args_.beyond_cache) kernels_.stream_fence();
  }
};

// batch_norm_normalize.cpp
template <class A>
class Normalizer : public ElementwisePass<A, NormalizeArgs<A>> {
 public:
  Normalizer(const BatchNormForwardParams&, const Plan&, bool after_stats);
  // Of at most kChannelBatch channels.
  void set(int64_t first, int64_t end, const A* mean, const A* invstd);

 private:
  const BatchNormForwardParams& params_;
  PerChannel<A> mean_, scale_, bias_;
};

// What both halves of the backward read. batch_norm_backward_reduce.cpp
template <class A>
struct BackwardOperands {
  // `keeps_dz`: the sums leave dy' for the input gradient, which then need not find it a second time.
  BackwardOperands(const BatchNormBackwardParams&, const Plan&, bool keeps_dz = false);
  // Of at most kChannelBatch channels. The sums do it, too.
  void set(int64_t first, int64_t end);
  // Whether the sums find the activation's argument again, which takes scale and bias.
  bool finds_argument() const { return derivative == Derivative::relu || derivative == Derivative::general; }
  // Of these blocks of so many channels.
  void sums(const SubMatrix& block, int64_t channels, int64_t next, Sums* of_channels) const {
    kernels.sums[static_cast<int>(derivative)](args, block, channels, next, of_channels);
  }

  const BatchNormBackwardParams& params;
  const Plan& plan;
  const Kernels<A>& kernels;
  const Derivative derivative;
  PerChannel<A> mean, scale, bias;
  const BackwardArgs<A> args;
};
// As stats_of_group and stats_of_all do.
using SumsSink = std::function<void(int64_t first, int64_t end, const Sums*)>;
template <class A>
void sums_of_group(BackwardOperands<A>&, int64_t first, int64_t end, const SumsSink& sink);
template <class A> void sums_of_all(BackwardOperands<A>&, const ParallelFor&, const SumsSink& sink);
// Rounds the sums of channels [first, end) to A and stores them, and the parameters' gradients where they are wanted.
template <class A> void store_sums(const BatchNormBackwardParams&, int64_t first, int64_t end, const Sums*);

// batch_norm_backward_input.cpp
template <class A>
class InputGradient : public ElementwisePass<A, BackwardArgs<A>> {
 public:
  explicit InputGradient(const BackwardOperands<A>&);
  // Of at most kChannelBatch channels, from the sums that store_sums left. Not needed in eval mode, which has none.
  void set(int64_t first, int64_t end);

 private:
  const BatchNormBackwardParams& params_;
  PerChannel<A> mean_dy_, slope_;
};

// The three dtypes that accumulate in float share all code above the kernels.
template <class F>
void with_acc_type(DType t, F f) {
  if (acc_size_of(t) == sizeof(double)) {
    f(double{});
  } else {
    f(float{});
  }
}

}  // namespace bnext::cpu
