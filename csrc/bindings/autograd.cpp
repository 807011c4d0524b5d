// The autograd of bnext::batch_norm, once: eager modules call `batch_norm` directly, and torch.compile reaches the same
// function as the composite operator of that name (bnext/operators.py).
#include "autograd.h"

#include <ATen/SequenceNumber.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/custom_function.h>

#include "gradient_formulas.h"
#include "obstacle.h"

namespace bnext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// The buffers, and what else forward takes that has no gradient.
struct Settings {
  const OptionalTensor &running_mean, &running_var, &num_batches_tracked;
  bool training;
  std::optional<double> momentum;
  double eps;
  std::string_view activation;
  double activation_param;
  bool unbiased;
  std::optional<int64_t> ghost_batch_size;
};

// y, mean, invstd, mask. `save`: for a backward; `save_mask`: what an activation keeps as bits.
FourTensors run_forward(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& residual, const Settings& settings, bool save, bool save_mask) {
  const at::AutoDispatchBelowAutograd guard;
  if (settings.training) {
    static const auto op =
        find_op<FourTensors(const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                            const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, std::optional<double>,
                            double, std::string_view, double, bool, bool, std::optional<int64_t>)>(
            "bnext::batch_norm_forward");
    return op.call(x, weight, bias, settings.running_mean, settings.running_var, settings.num_batches_tracked, residual,
                   settings.momentum, settings.eps, settings.activation, settings.activation_param, save_mask,
                   settings.unbiased, settings.ghost_batch_size);
  }
  static const auto op =
      find_op<FourTensors(const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                          const OptionalTensor&, double, std::string_view, double, bool, bool)>(
          "bnext::batch_norm_forward_eval");
  return op.call(x, weight, bias, *settings.running_mean, *settings.running_var, residual, settings.eps,
                 settings.activation, settings.activation_param, save, save_mask);
}

// dx, dweight, dbias, dresidual; those not needed are empty.
FourTensors run_backward(const Tensor& dy, const Saved& saved, std::array<bool, 4> needs) {
  const at::AutoDispatchBelowAutograd guard;
  static const auto op =
      find_op<FourTensors(const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                          const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, std::string_view,
                          double, bool, std::array<bool, 4>)>("bnext::batch_norm_backward");
  return op.call(dy, saved.x, saved.weight, saved.bias, saved.mean, saved.invstd, saved.mask, saved.residual,
                 name_of(saved.activation), saved.activation_param, saved.training, needs);
}

// `arguments`: a bit for each of weight, bias and residual that was given.
void save(AutogradContext* ctx, const Saved& saved, int64_t arguments, const Tensor& dy = {}) {
  const auto tensor = [](const OptionalTensor& t) { return t.value_or(Tensor()); };
  variable_list tensors = {tensor(saved.x), tensor(saved.weight), tensor(saved.bias),    saved.mean,
                           saved.invstd,    tensor(saved.mask),   tensor(saved.residual)};
  if (dy.defined()) tensors.push_back(dy);
  ctx->save_for_backward(std::move(tensors));
  // The mask's bits are in the order of the elements of x.
  const at::MemoryFormat format = given(saved.mask) ? format_of(*saved.x) : at::MemoryFormat::Contiguous;
  // One entry, of as many elements as a tuple holds without an allocation of its own.
  const int64_t numbers =
      arguments + 8 * saved.training + 16 * static_cast<int64_t>(format) + 64 * static_cast<int64_t>(saved.activation);
  ctx->saved_data["settings"] = std::make_tuple(numbers, saved.activation_param, saved.eps);
}

struct Restored {
  Saved saved;
  int64_t arguments;
  Tensor dy;  // where it was saved
};

Restored restore(AutogradContext* ctx) {
  variable_list tensors = ctx->get_saved_variables();
  const auto optional = [&](size_t i) {
    return tensors[i].defined() ? OptionalTensor(std::move(tensors[i])) : OptionalTensor();
  };
  const auto& settings = ctx->saved_data["settings"].toTupleRef().elements();
  const int64_t numbers = settings[0].toInt();
  Restored restored = {
      {optional(0), optional(1), optional(2), std::move(tensors[3]), std::move(tensors[4]), optional(5), optional(6),
       static_cast<Activation>(numbers / 64), settings[1].toDouble(), numbers / 8 % 2 != 0, settings[2].toDouble()},
      numbers % 8,
      tensors.size() > 7 ? std::move(tensors[7]) : Tensor()};
  // A hook of saved tensors may return other strides.
  Saved& saved = restored.saved;
  if (given(saved.mask)) saved.x = saved.x->contiguous(static_cast<at::MemoryFormat>(numbers / 16 % 4));
  return restored;
}

bool has_tangent(const Tensor& t) { return t._fw_grad(/*level=*/0).defined(); }

// Of autograd.grad(is_grads_batched=True), whose vmap is older than torch.func's. What a Function returns of such
// tensors has lost its graph.
bool is_batched(const Tensor& t) { return t.key_set().has(c10::DispatchKey::Batched); }

// torch would find out when the statistics have been updated.
void check_can_be_saved(const char* name, const OptionalTensor& t) {
  TORCH_CHECK(!given(t) || !is_locked(*t), name,
              " is an inference tensor, which cannot be saved for backward: clone it outside of InferenceMode");
}

// Reads needs_input_grad in order, past arguments that were not given and so have no edge.
class Needs {
 public:
  explicit Needs(AutogradContext* ctx) : ctx_(ctx) {}
  bool next(bool is_given) { return is_given && ctx_->needs_input_grad(edge_++); }

 private:
  AutogradContext* ctx_;
  size_t edge_ = 0;
};

}  // namespace

// The Functions have the names of their nodes: what a profiler shows, and an error of autograd.
struct BnextBatchNormBackwardBackward : torch::autograd::Function<BnextBatchNormBackwardBackward> {
  static constexpr bool is_traceable = true;  // by compiled autograd

  static variable_list forward(AutogradContext* ctx, const Tensor& dy, const OptionalTensor& /*x*/,
                               const OptionalTensor& /*weight*/, const OptionalTensor& /*bias*/,
                               const OptionalTensor& /*residual*/, const Saved& saved, std::array<bool, 4> needs) {
    ctx->set_materialize_grads(false);
    save(ctx, saved, /*arguments=*/0, dy);
    auto [dx, dweight, dbias, dresidual] = run_backward(dy, saved, needs);
    return {dx, dweight, dbias, dresidual};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto [saved, arguments, dy] = restore(ctx);
    Needs needs(ctx);
    needs.next(true);
    const std::array<bool, 4> wanted = {needs.next(given(saved.x)), needs.next(given(saved.weight)),
                                        needs.next(given(saved.bias)), needs.next(given(saved.residual))};
    auto [ddy, dx, dweight, dbias, dresidual] =
        double_backward(saved, dy, grads[0], grads[1], grads[2], grads[3], wanted);
    variable_list result = {ddy, dx, dweight, dbias, dresidual, Tensor(), Tensor()};
    if (saved.activation != Activation::none) {
      // All that was saved of what the activation's argument depends on has a gradient, be it 0: autograd.grad() raises
      // where there is none. Behind a mask the residual was not saved.
      const OptionalTensor* const arguments[4] = {&saved.x, &saved.weight, &saved.bias, &saved.residual};
      for (size_t i = 0; i < wanted.size(); ++i) {
        if (wanted[i] && !result[1 + i].defined()) result[1 + i] = at::zeros_like(**arguments[i]);
      }
    }
    return result;
  }
};

struct BnextBatchNormBackward : torch::autograd::Function<BnextBatchNormBackward> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& residual, const Settings& settings) {
    ctx->set_materialize_grads(false);
    const Activation activation = parse_activation(settings.activation, settings.activation_param);
    const bool active = activation != Activation::none;
    const bool use_mask = needs_mask(activation, residual);
    const bool use_residual = given(residual) && saves_of(activation) == Saves::residual;
    // With frozen statistics and parameters, dx is dy times a constant.
    const bool need_x = settings.training || active || (given(weight) && weight->requires_grad()) ||
                        (given(bias) && bias->requires_grad());
    if (need_x) check_can_be_saved("input", x);
    check_can_be_saved("weight", weight);
    if (active) check_can_be_saved("bias", bias);
    if (use_residual) check_can_be_saved("residual", residual);
    auto [y, mean, invstd, mask] = run_forward(x, weight, bias, residual, settings, /*save=*/true, use_mask);

    const OptionalTensor none;
    const int64_t arguments = given(weight) + 2 * given(bias) + 4 * given(residual);
    save(ctx,
         {need_x ? OptionalTensor(x) : none, weight, active ? bias : none, mean, invstd,
          use_mask ? OptionalTensor(mask) : none, use_residual ? residual : none, activation, settings.activation_param,
          settings.training, settings.eps},
         arguments);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(5);  // x, weight, bias, residual, settings
    const Tensor& dy = grads[0];
    if (!dy.defined()) return result;
    const auto [saved, arguments, unused] = restore(ctx);
    Needs each(ctx);
    std::array<bool, 4> needs = {each.next(true), each.next(arguments & 1), each.next(arguments & 2),
                                 each.next(arguments & 4)};
    if (needs[3] && saved.activation == Activation::none) {
      result[3] = dy;
      needs[3] = false;
    }
    const auto keep = [&](size_t i, Tensor& gradient) {
      if (needs[i]) result[i] = std::move(gradient);
    };
    const bool differentiable = at::GradMode::is_enabled();  // create_graph
    // The first two are of a graph whose forward saw neither.
    if (in_transform() || has_tangent(dy) || (differentiable && is_batched(dy))) {
      Gradients all = gradients(saved, dy, needs);
      for (size_t i = 0; i < all.size(); ++i) keep(i, all[i]);
    } else if (differentiable) {
      variable_list all =
          BnextBatchNormBackwardBackward::apply(dy, saved.x, saved.weight, saved.bias, saved.residual, saved, needs);
      for (size_t i = 0; i < all.size(); ++i) keep(i, all[i]);
    } else {
      auto [dx, dweight, dbias, dresidual] = run_backward(dy, saved, needs);
      keep(0, dx);
      keep(1, dweight);
      keep(2, dbias);
      keep(3, dresidual);
    }
    return result;
  }
};

namespace {

bool tracked(const Tensor& t) { return (at::GradMode::is_enabled() && t.requires_grad()) || has_tangent(t); }
bool tracked(const OptionalTensor& t) { return given(t) && tracked(*t); }

}  // namespace

Tensor batch_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& running_mean, const OptionalTensor& running_var,
                  const OptionalTensor& num_batches_tracked, const OptionalTensor& residual, bool training,
                  std::optional<double> momentum, double eps, std::string_view activation, double activation_param,
                  bool unbiased, std::optional<int64_t> ghost_batch_size) {
  check_ghost_batch_size(ghost_batch_size);  // in evaluation, too
  check_dense("input", input);
  check_dense("residual", residual);
  TORCH_CHECK(training || given(running_mean), "running_mean must be defined in evaluation mode");
  TORCH_CHECK(training || given(running_var), "running_var must be defined in evaluation mode");
  TORCH_CHECK(!tracked(running_mean) && !tracked(running_var),
              "running_mean and running_var cannot require gradients: batch_norm has none for them");
  const Settings settings = {running_mean, running_var, num_batches_tracked, training, momentum,
                             eps,          activation,  activation_param,    unbiased, ghost_batch_size};
  if (tracked(input) || tracked(weight) || tracked(bias) || tracked(residual)) {
    // The operators run below autograd, where the profiler has no sequence number to link a backward to its forward by.
    at::RecordFunction record(at::RecordScope::FUNCTION);
    if (record.isActive()) record.before("bnext::batch_norm", static_cast<int64_t>(at::sequence_number::peek()));
    return BnextBatchNormBackward::apply(input, weight, bias, residual, settings);
  }
  return std::get<0>(run_forward(input, weight, bias, residual, settings, /*save=*/false, /*save_mask=*/false));
}

}  // namespace bnext
