// The stages and their two fusions as torch operators, for any backend. A backend is a struct of
//
//   executes     false: shapes only (Meta); nothing is filled in, nothing runs
//   Int          its type for a number that may be symbolic
//   stats, normalize, forward (const BatchNormForwardParams&, const Tensor& x)
//   check_forward, which raises what `forward` would, of a shape, before it runs (likewise)
//   backward_reduce, backward_input, backward (const BatchNormBackwardParams&, const Tensor& x)
//   merge (const BatchNormMergeParams&, const Tensor& stats)
//
// Tracing and execution share this code, so that they cannot disagree on a size or a stride.
// Outputs that are not asked for are empty: an operator of torch returns tensors.
#pragma once

#include <ATen/Functions.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "../core/merge.h"
#include "allocate.h"
#include "checks.h"
#include "kernels_run.h"
#include "parts.h"

namespace bnext {

inline void* data(const Tensor& t) { return t.numel() == 0 ? nullptr : t.data_ptr(); }
inline void* data(const OptionalTensor& t) { return given(t) ? data(*t) : nullptr; }
inline const void* const_data(const OptionalTensor& t) { return given(t) ? t->const_data_ptr() : nullptr; }

inline OptionalTensor contiguous(const OptionalTensor& t) {
  return given(t) ? OptionalTensor(t->contiguous()) : OptionalTensor();
}

template <class... Tensors>
void zero(const Tensors&... tensors) {
  (tensors.zero_(), ...);
}

// A buffer that an operator changes in place, under the rules of in-place changes: its version
// moves (before anything runs, as that may raise), and any strides will do.
class Buffer {
 public:
  explicit Buffer(const OptionalTensor& t) : original_(t), dense_(contiguous(t)) {
    if (given(original_) && !original_->is_inference()) original_->unsafeGetTensorImpl()->bump_version();
  }

  void* data() const { return bnext::data(dense_); }
  const OptionalTensor& tensor() const { return dense_; }
  void write_back() const {
    if (given(original_) && !dense_->is_same(*original_)) original_->copy_(*dense_);
  }

 private:
  const OptionalTensor& original_;
  OptionalTensor dense_;
};

template <class Backend>
struct BatchNormOps {
  static constexpr bool executes = Backend::executes;
  using New = Allocate<executes>;

  static std::tuple<Tensor, Tensor> stats(const Tensor& x) {
    // Validate.
    check_input(x);

    // Choose the layout.
    const c10::DeviceGuard guard(x.device());
    const auto format = format_of(x);
    const Tensor xd = dense(x, format, executes);

    // Allocate.
    Tensor mean = New::statistic(x), var = New::statistic(x);

    // Fill in and launch.
    if constexpr (executes) {
      BatchNormForwardParams p = forward_params(xd, format, {}, {});
      p.mean = data(mean);
      p.var = data(var);
      if (p.shape.numel() == 0) {
        zero(mean, var);
      } else {
        run(Backend::stats, p, xd);
      }
    }
    return {mean, var};
  }

  // What a process tells the others of its part x of a batch: mean, in two parts, biased variance, and how many values
  // a channel.
  static Tensor local_stats(const Tensor& x) {
    // Validate.
    check_input(x);

    // Choose the layout.
    const c10::DeviceGuard guard(x.device());
    const auto format = format_of(x);
    const Tensor xd = dense(x, format, executes);

    // Allocate.
    Tensor row = New::empty(x, {3 * x.sym_size(1) + 2}, acc_type_of(x));

    // Fill in and launch.
    if constexpr (executes) {
      BatchNormForwardParams p = forward_params(xd, format, {}, {});
      p.mean = data(row);
      p.mean_rest = static_cast<char*>(p.mean) + p.shape.c * acc_size_of(p.dtype);
      p.var = static_cast<char*>(p.mean_rest) + p.shape.c * acc_size_of(p.dtype);
      if (p.shape.numel() == 0) {
        row.zero_();
      } else {
        run(Backend::stats, p, xd);
        row.select(0, 3 * p.shape.c).fill_(p.shape.per_channel() / kCountBase);
        row.select(0, 3 * p.shape.c + 1).fill_(p.shape.per_channel() % kCountBase);
      }
    }
    return row;
  }

  // What all of them told, a row each: the statistics of the whole batch, and their step into the running ones.
  static std::tuple<Tensor, Tensor, Tensor> merge(const Tensor& stats, const OptionalTensor& running_mean,
                                                  const OptionalTensor& running_var,
                                                  const OptionalTensor& num_batches_tracked,
                                                  std::optional<double> momentum, double eps, bool unbiased) {
    // Validate.
    check_merge(stats, running_mean, running_var, num_batches_tracked, momentum, eps);

    // Allocate.
    const c10::DeviceGuard guard(stats.device());
    const Tensor stats_d = stats.contiguous();
    const c10::SymInt channels = (stats.sym_size(1) - 2) / 3;
    Tensor mean = New::empty(stats, {channels}, stats.scalar_type()), invstd = New::like(mean);
    Tensor count = New::empty(stats, {}, at::kLong);

    // Fill in and launch.
    if constexpr (executes) {
      const Buffer running_mean_d(running_mean), running_var_d(running_var);
      BatchNormMergeParams p = {};
      p.ranks = stats.size(0);
      p.c = mean.numel();
      p.dtype = to_dtype("stats", stats.scalar_type());
      p.running_dtype = to_dtype("running_mean", given(running_mean) ? running_mean->scalar_type() : at::kFloat);
      p.stats = stats_d.const_data_ptr();
      p.mean = data(mean);
      p.invstd = data(invstd);
      p.count = static_cast<int64_t*>(data(count));
      p.running_mean = running_mean_d.data();
      p.running_var = running_var_d.data();
      p.num_batches_tracked = static_cast<const int64_t*>(const_data(num_batches_tracked));
      p.momentum = momentum.value_or(0);
      p.cumulative = !momentum.has_value();
      p.biased = !unbiased;
      p.eps = eps;
      if (p.c == 0) {
        count.zero_();
      } else {
        run(Backend::merge, p, stats_d);
        running_mean_d.write_back();
        running_var_d.write_back();
      }
      // Behind the kernel, every channel of which may read it.
      if (given(num_batches_tracked)) num_batches_tracked->add_(1);
    }
    return {mean, invstd, count};
  }

  static std::tuple<Tensor, Tensor> normalize(const Tensor& x, const Tensor& mean, const Tensor& invstd,
                                              const OptionalTensor& weight, const OptionalTensor& bias,
                                              const OptionalTensor& residual, std::string_view activation, double param,
                                              bool save_mask) {
    // Validate.
    const Activation act = parse_activation(activation, param);
    check_input(x);
    check_statistics(mean, invstd, x);
    check_parameters(x, weight, bias);
    if (given(residual)) check_like("residual", *residual, x);

    // Choose the layout.
    const c10::DeviceGuard guard(x.device());
    const Parts parts = Parts::of_rows(x, mean);
    const Apply apply(x, weight, bias, residual);
    const Tensor mean_d = mean.contiguous(), invstd_d = invstd.contiguous();

    // Allocate.
    Tensor y = New::like(apply.x, apply.format);
    Tensor mask = New::mask(x, parts, save_mask && needs_mask(act, residual));

    // Fill in and launch.
    if constexpr (executes) {
      BatchNormForwardParams p = apply.params(act, param, y, mask);
      p.mean = mean_d.data_ptr();
      p.invstd = invstd_d.data_ptr();
      if (p.shape.numel() != 0) run(Backend::normalize, parts, p, apply, y);
    }
    return {y, mask};
  }

  // Training: the batch's own statistics, and their step into the running ones. With a `ghost_batch_size`, those of
  // each ghost batch.
  static std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
      const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& running_mean,
      const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked, const OptionalTensor& residual,
      std::optional<double> momentum, double eps, std::string_view activation, double param, bool save_mask,
      bool unbiased, std::optional<int64_t> ghost_batch_size) {
    // Validate.
    const Activation act = parse_activation(activation, param);
    check_training(x, weight, bias, running_mean, running_var, num_batches_tracked, residual, momentum, eps);
    const Parts parts = Parts::of_size(x, ghost_batch_size);
    check_batch(x, parts.min_examples());

    // Choose the layout.
    const c10::DeviceGuard guard(x.device());
    const Apply apply(x, weight, bias, residual);

    // Allocate.
    Tensor y = New::like(apply.x, apply.format);
    Tensor mean = New::statistic(x, parts), invstd = New::statistic(x, parts);
    Tensor mask = New::mask(x, parts, save_mask && needs_mask(act, residual));

    // Fill in and launch.
    if constexpr (executes) {
      const Buffer running_mean_d(running_mean), running_var_d(running_var), counter_d(num_batches_tracked);
      BatchNormForwardParams p = apply.params(act, param, y, mask);
      p.mean = data(mean);
      p.invstd = data(invstd);
      p.running_dtype = to_dtype("running_mean", given(running_mean) ? running_mean->scalar_type() : acc_type_of(x));
      p.running_mean = running_mean_d.data();
      p.running_var = running_var_d.data();
      p.num_batches_tracked = static_cast<int64_t*>(counter_d.data());
      p.momentum = momentum.value_or(0);
      p.cumulative = !momentum.has_value();
      p.biased = !unbiased;
      p.eps = eps;
      if (p.shape.numel() == 0) {
        zero(mean, invstd);
        if (given(num_batches_tracked)) num_batches_tracked->add_(parts.count().expect_int());
      } else {
        if (parts.count() > 1) {  // nothing changes where the plan that is forced cannot be that of a later part
          BatchNormForwardParams last = p;
          last.shape = shape_of(apply.x, parts.min_examples().expect_int(), apply.format);
          Backend::check_forward(last, apply.x);
        }
        run(Backend::forward, parts, p, apply, y);
        running_mean_d.write_back();
        running_var_d.write_back();
      }
    }
    return {y, mean, invstd, mask};
  }

  // Evaluation: the running statistics. `save` returns what they were, for the backward.
  static std::tuple<Tensor, Tensor, Tensor, Tensor> forward_eval(const Tensor& x, const OptionalTensor& weight,
                                                                 const OptionalTensor& bias, const Tensor& running_mean,
                                                                 const Tensor& running_var,
                                                                 const OptionalTensor& residual, double eps,
                                                                 std::string_view activation, double param, bool save,
                                                                 bool save_mask) {
    // Validate.
    const Activation act = parse_activation(activation, param);
    check_input(x);
    check_eps(eps);
    check_parameters(x, weight, bias);
    check_running(x, running_mean, running_var);
    if (given(residual)) check_like("residual", *residual, x);

    // Choose the layout.
    const c10::DeviceGuard guard(x.device());
    const Apply apply(x, weight, bias, residual);
    const Tensor running_mean_d = running_mean.contiguous(), running_var_d = running_var.contiguous();

    // Allocate.
    Tensor y = New::like(apply.x, apply.format);
    Tensor mean = save ? New::statistic(x) : New::nothing(x), invstd = save ? New::statistic(x) : New::nothing(x);
    Tensor mask = New::mask(x, Parts::whole(x), save_mask && needs_mask(act, residual));

    // Fill in and launch.
    if constexpr (executes) {
      BatchNormForwardParams p = apply.params(act, param, y, mask);
      p.mean = data(mean);
      p.invstd = data(invstd);
      p.running_dtype = to_dtype("running_mean", running_mean.scalar_type());
      p.running_mean = running_mean_d.data_ptr();
      p.running_var = running_var_d.data_ptr();
      p.eps = eps;
      if (p.shape.numel() == 0) {
        zero(mean, invstd);
      } else {
        run(Backend::normalize, p, apply.x);
      }
    }
    return {y, mean, invstd, mask};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> backward_reduce(
      const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& invstd, const OptionalTensor& weight,
      const OptionalTensor& bias, const OptionalTensor& mask, const OptionalTensor& residual,
      std::string_view activation, double param) {
    // Validate.
    const Activation act = parse_activation(activation, param);
    check_backward(dy, x, mean, invstd, weight, bias, mask, residual, act);
    check_statistic("mean", mean, x);  // not a row for each ghost batch

    // Choose the layout.
    const c10::DeviceGuard guard(x.device());
    const Gradient gradient(dy, x, mean, invstd, weight, bias, mask, residual);

    // Allocate.
    Tensor sum_dy = New::statistic(x), sum_dy_xmu = New::statistic(x);
    Tensor dweight = New::parameter_gradient(x, weight, bias), dbias = New::parameter_gradient(x, bias, weight);

    // Fill in and launch.
    if constexpr (executes) {
      BatchNormBackwardParams p = gradient.params(act, param);
      p.sum_dy = data(sum_dy);
      p.sum_dy_xmu = data(sum_dy_xmu);
      p.dweight = data(dweight);
      p.dbias = data(dbias);
      if (p.shape.numel() == 0) {
        zero(sum_dy, sum_dy_xmu, dweight, dbias);
      } else {
        run(Backend::backward_reduce, p, gradient.dy);
      }
    }
    return {sum_dy, sum_dy_xmu, dweight, dbias};
  }

  // The sums may come from further than x, as they do in SyncBatchNorm; `count` is then how many
  // values a channel they were taken over. Where only the device knows that number, divide the
  // sums by it there and pass 1.
  static std::tuple<Tensor, Tensor> backward_input(const Tensor& dy, const Tensor& x, const Tensor& mean,
                                                   const Tensor& invstd, const OptionalTensor& weight,
                                                   const OptionalTensor& bias, const OptionalTensor& mask,
                                                   const OptionalTensor& residual, const Tensor& sum_dy,
                                                   const Tensor& sum_dy_xmu, typename Backend::Int count,
                                                   std::string_view activation, double param) {
    // Validate.
    const Activation act = parse_activation(activation, param);
    check_backward(dy, x, mean, invstd, weight, bias, mask, residual, act);
    check_statistic("mean", mean, x);  // not a row for each ghost batch
    check_statistic("sum_dy", sum_dy, x);
    check_statistic("sum_dy_xmu", sum_dy_xmu, x);

    // Choose the layout.
    const c10::DeviceGuard guard(x.device());
    const Gradient gradient(dy, x, mean, invstd, weight, bias, mask, residual);
    const Tensor sum_dy_d = sum_dy.contiguous(), sum_dy_xmu_d = sum_dy_xmu.contiguous();

    // Allocate.
    Tensor dx = New::like(gradient.x);
    Tensor dresidual = given(mask) || given(residual) ? New::like(gradient.x) : New::nothing(x);

    // Fill in and launch.
    if constexpr (executes) {
      BatchNormBackwardParams p = gradient.params(act, param);
      p.training = true;
      p.count = count;
      p.sum_dy = sum_dy_d.data_ptr();
      p.sum_dy_xmu = sum_dy_xmu_d.data_ptr();
      p.dx = data(dx);
      p.dresidual = data(dresidual);
      if (p.shape.numel() != 0) run(Backend::backward_input, p, gradient.dy);
    }
    return {dx, dresidual};
  }

  // Where mean and invstd have a row for each ghost batch, dx goes by each, and dweight and dbias are sums over them.
  // `needs` asks for (dx, dweight, dbias, dresidual). dresidual takes a mask or the residual; without an activation it
  // would be dy. x may be missing where only dx is asked for, training is false, and there is no activation.
  static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy, const OptionalTensor& x,
                                                             const OptionalTensor& weight, const OptionalTensor& bias,
                                                             const Tensor& mean, const Tensor& invstd,
                                                             const OptionalTensor& mask, const OptionalTensor& residual,
                                                             std::string_view activation, double param, bool training,
                                                             std::array<bool, 4> needs) {
    // Validate.
    const Activation act = parse_activation(activation, param);
    const auto [need_dx, need_dweight, need_dbias, need_dresidual] = needs;
    const bool reduces = BatchNormBackwardParams::needs_sums(training, need_dx, need_dweight, need_dbias);
    const Tensor& like = given(x) ? *x : dy;
    check_backward(dy, like, mean, invstd, weight, bias, mask, residual, act);
    TORCH_CHECK(given(x) || !(reduces || act != Activation::none), "x is needed for this gradient");
    TORCH_CHECK(given(mask) || given(residual) || !need_dresidual,
                "mask or residual is needed for the gradient of residual");

    // Choose the layout.
    const c10::DeviceGuard guard(like.device());
    const Parts parts = Parts::of_rows(like, mean);
    const Gradient gradient(dy, like, mean, invstd, weight, bias, mask, residual);

    // Allocate.
    Tensor dx = need_dx ? New::like(gradient.x) : New::nothing(like);
    Tensor dresidual = need_dresidual ? New::like(gradient.x) : New::nothing(like);
    Tensor dweight = need_dweight ? New::parameter_gradient(like, weight, bias) : New::nothing(like);
    Tensor dbias = need_dbias ? New::parameter_gradient(like, bias, weight) : New::nothing(like);

    // Fill in and launch.
    if constexpr (executes) {
      BatchNormBackwardParams p = gradient.params(act, param);
      if (!given(x)) p.x = nullptr;
      p.training = training;
      p.dweight = data(dweight);
      p.dbias = data(dbias);
      p.dx = data(dx);
      p.dresidual = data(dresidual);
      const int64_t batches = parts.count().expect_int();
      const Tensor sums =
          reduces ? New::empty(like, {c10::SymInt(2), parts.count(), like.sym_size(1)}, acc_type_of(like)) : Tensor();
      if (reduces) {
        p.sum_dy = data(sums);
        p.sum_dy_xmu = static_cast<char*>(p.sum_dy) + sums.nbytes() / 2;
      }
      if (p.shape.numel() == 0) {
        zero(dweight, dbias);
      } else if (reduces || need_dx || need_dresidual) {
        run(Backend::backward, parts, p, gradient, dx, dresidual);
        if (batches > 1 && (need_dweight || need_dbias)) {  // so far they are those of the last ghost batch
          sums.select(0, 1).mul_(gradient.invstd);
          const Tensor total = pairwise_sum(sums, /*dim=*/1);
          if (need_dbias) dbias.view(-1).copy_(total.select(0, 0));
          if (need_dweight) dweight.view(-1).copy_(total.select(0, 1));
        }
      }
    }
    return {dx, dweight, dbias, dresidual};
  }

 private:
  template <class Stage, class Params>
  static void run(const Stage& stage, const Params& p, const Tensor& x) {
    stage(p, x);
    kernels_run.fetch_add(1, std::memory_order_relaxed);
  }

  // Runs a stage on each part, with p of the whole batch, and counts it once.
  template <class Stage, class Params, class Operands, class... Outputs>
  static void run(const Stage& stage, const Parts& parts, const Params& p, const Operands& operands,
                  const Outputs&... outputs) {
    if (parts.count() == 1) return run(stage, p, operands.x);
    parts.for_each([&](const Part& part) {
      Window window(part, operands.x.itemsize());
      stage(operands.of_part(p, part, window, outputs...), operands.x);
      window.write_back();
    });
    kernels_run.fetch_add(1, std::memory_order_relaxed);
  }

  // How many bytes of statistics are before the part's row.
  template <class Params>
  static int64_t before_row(const Params& p, const Part& part) {
    return part.index * p.shape.c * acc_size_of(p.dtype);
  }

  static BatchNormForwardParams forward_params(const Tensor& x, at::MemoryFormat format, const OptionalTensor& weight,
                                               const OptionalTensor& bias) {
    BatchNormForwardParams p = {};
    p.shape = shape_of(x, format);
    p.dtype = to_dtype("input", x.scalar_type());
    p.weight_dtype = to_dtype("weight", parameter_type(x, weight, bias));
    p.running_dtype = to_dtype("running_mean", acc_type_of(x));
    p.x = x.const_data_ptr();
    return p;
  }

  // The operands of an elementwise forward, all in the layout of x.
  struct Apply {
    at::MemoryFormat format;
    Tensor x;
    OptionalTensor weight, bias, residual;

    Apply(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual)
        : format(format_of(x)),
          x(dense(x, format, executes)),
          weight(contiguous(weight)),
          bias(contiguous(bias)),
          residual(given(residual) ? OptionalTensor(dense(*residual, format, executes)) : OptionalTensor()) {}

    BatchNormForwardParams params(Activation activation, double param, const Tensor& y, const Tensor& mask) const {
      BatchNormForwardParams p = forward_params(x, format, weight, bias);
      p.activation = activation;
      p.activation_param = param;
      p.residual = const_data(residual);
      p.weight = const_data(weight);
      p.bias = const_data(bias);
      p.y = data(y);
      p.mask = static_cast<uint8_t*>(data(mask));
      return p;
    }

    BatchNormForwardParams of_part(BatchNormForwardParams p, const Part& part, Window& window, const Tensor& y) const {
      const int64_t row = before_row(p, part);
      p.shape = shape_of(x, part.examples, format);
      p.x = window.read(p.x, x);
      p.residual = window.read(p.residual, residual);
      p.y = window.write(p.y, y);
      p.mean = advanced(p.mean, row);
      p.invstd = advanced(p.invstd, row);
      if (p.mask != nullptr) p.mask += part.mask_offset;
      return p;
    }
  };

  static void check_backward(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& invstd,
                             const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& mask,
                             const OptionalTensor& residual, Activation activation) {
    check_input(x);
    check_like("dy", dy, x);
    check_statistics(mean, invstd, x);
    check_parameters(x, weight, bias);
    check_kept(mask, residual, activation, x, Parts::of_rows(x, mean).mask_bytes());
  }

  // The operands of a backward, all in the layout of x.
  struct Gradient {
    at::MemoryFormat format;
    Tensor x, dy, mean, invstd;
    OptionalTensor weight, bias, mask, residual;

    Gradient(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& invstd, const OptionalTensor& weight,
             const OptionalTensor& bias, const OptionalTensor& mask, const OptionalTensor& residual)
        : format(format_of(x)),
          x(dense(x, format, executes)),
          dy(dense(dy, format, executes)),
          mean(mean.contiguous()),
          invstd(invstd.contiguous()),
          weight(contiguous(weight)),
          bias(contiguous(bias)),
          mask(contiguous(mask)),
          residual(given(residual) ? OptionalTensor(dense(*residual, format, executes)) : OptionalTensor()) {}

    BatchNormBackwardParams params(Activation activation, double param) const {
      BatchNormBackwardParams p = {};
      p.shape = shape_of(x, format);
      p.dtype = to_dtype("input", x.scalar_type());
      p.weight_dtype = to_dtype("weight", parameter_type(x, weight, bias));
      p.activation = activation;
      p.activation_param = param;
      p.dy = dy.const_data_ptr();
      p.x = x.const_data_ptr();
      p.mask = static_cast<const uint8_t*>(const_data(mask));
      p.residual = const_data(residual);
      p.weight = const_data(weight);
      p.bias = const_data(bias);
      p.mean = mean.const_data_ptr();
      p.invstd = invstd.const_data_ptr();
      p.count = p.shape.per_channel();
      return p;
    }

    BatchNormBackwardParams of_part(BatchNormBackwardParams p, const Part& part, Window& window, const Tensor& dx,
                                    const Tensor& dresidual) const {
      const int64_t row = before_row(p, part);
      p.shape = shape_of(x, part.examples, format);
      p.count = p.shape.per_channel();
      p.dy = window.read(p.dy, dy);
      p.x = window.read(p.x, x);
      p.residual = window.read(p.residual, residual);
      if (p.mask != nullptr) p.mask += part.mask_offset;
      p.mean = advanced(p.mean, row);
      p.invstd = advanced(p.invstd, row);
      p.sum_dy = advanced(p.sum_dy, row);
      p.sum_dy_xmu = advanced(p.sum_dy_xmu, row);
      p.dx = window.write(p.dx, dx);
      p.dresidual = window.write(p.dresidual, dresidual);
      return p;
    }
  };
};

// Their names, for what is done to all of them alike.
constexpr const char* kBatchNormOps[] = {
    "batch_norm_stats",           "batch_norm_local_stats",    "batch_norm_merge",
    "batch_norm_normalize",       "batch_norm_forward",        "batch_norm_forward_eval",
    "batch_norm_backward_reduce", "batch_norm_backward_input", "batch_norm_backward"};

template <class Backend>
void register_batch_norm(torch::Library& m) {
  m.impl("batch_norm_stats", &BatchNormOps<Backend>::stats);
  m.impl("batch_norm_local_stats", &BatchNormOps<Backend>::local_stats);
  m.impl("batch_norm_merge", &BatchNormOps<Backend>::merge);
  m.impl("batch_norm_normalize", &BatchNormOps<Backend>::normalize);
  m.impl("batch_norm_forward", &BatchNormOps<Backend>::forward);
  m.impl("batch_norm_forward_eval", &BatchNormOps<Backend>::forward_eval);
  m.impl("batch_norm_backward_reduce", &BatchNormOps<Backend>::backward_reduce);
  m.impl("batch_norm_backward_input", &BatchNormOps<Backend>::backward_input);
  m.impl("batch_norm_backward", &BatchNormOps<Backend>::backward);
}

}  // namespace bnext
