#include "checks.h"

#include <c10/core/InferenceMode.h>
#include <c10/core/ScalarType.h>

#include <string>

namespace bnext {

namespace {

std::string name_of(at::ScalarType t) { return std::string(c10::getDtypeNames(t).first); }

Activation parsed(Activation activation, double param) {
  TORCH_CHECK_VALUE(param == 0 || activation == Activation::leaky_relu, "activation_param should be 0 for '",
                    name_of(activation), "', which has no parameter, not ", param);
  return activation;
}

void check_device(const char* name, const Tensor& t, const Tensor& x, const char* x_name = "input") {
  TORCH_CHECK(t.device() == x.device(), name, " is on ", t.device(), ", but ", x_name, " is on ", x.device());
}

void check_length(const char* name, const Tensor& t, const Tensor& x) {
  TORCH_CHECK(t.sym_numel() == x.sym_size(1), name, " should contain ", x.sym_size(1), " elements not ", t.sym_numel());
}

// One of the module's own channel vectors.
void check_vector(const char* name, const Tensor& t, const Tensor& x) {
  check_length(name, t, x);
  check_device(name, t, x);
  const auto dtype = x.scalar_type();
  const auto other = acc_type_of(dtype);
  TORCH_CHECK(t.scalar_type() == dtype || t.scalar_type() == other, name, " should be ", name_of(dtype),
              is_widened(dtype) ? " or " + name_of(other) : "", " for an input of ", name_of(dtype), ", not ",
              name_of(t.scalar_type()));
}

void check_statistic_type(const char* name, const Tensor& t, const Tensor& x) {
  check_device(name, t, x);
  TORCH_CHECK(t.scalar_type() == acc_type_of(x), name, " should be ", name_of(acc_type_of(x)), " for an input of ",
              name_of(x.scalar_type()), ", not ", name_of(t.scalar_type()));
}

void check_same_dtype(const char* name, const Tensor& t, const char* other_name, const Tensor& other) {
  TORCH_CHECK(t.scalar_type() == other.scalar_type(), name, " should have the dtype of ", other_name, ", ",
              name_of(other.scalar_type()), ", not ", name_of(t.scalar_type()));
}

}  // namespace

std::optional<DType> find_dtype(at::ScalarType t) {
  switch (t) {
    case at::kFloat: return DType::f32;
    case at::kDouble: return DType::f64;
    case at::kHalf: return DType::f16;
    case at::kBFloat16: return DType::bf16;
    default: return {};
  }
}

DType to_dtype(const char* name, at::ScalarType t) {
  if (const auto found = find_dtype(t)) return *found;
#define BNEXT_PYTHON_NAME(dtype, type, python) python,
  const std::string names[] = {BNEXT_DTYPES(BNEXT_PYTHON_NAME)};
#undef BNEXT_PYTHON_NAME
  const auto as_it_is = [](const std::string& text) { return text; };
  TORCH_CHECK_NOT_IMPLEMENTED(false, name, " should be ", alternatives(names, as_it_is), ", not ", name_of(t));
}

Activation parse_activation(std::string_view name, double param) {
  Activation activation;
  if (find_name(kActivationNames, name, &activation)) return parsed(activation, param);
  TORCH_CHECK_VALUE(false, "activation should be ", alternatives(kActivationNames, in_quotes), ", not ",
                    in_quotes(name));
}

void check_dense(const char* name, const OptionalTensor& t) {
  TORCH_CHECK_NOT_IMPLEMENTED(!given(t) || t->layout() == at::kStrided, name, " should be a dense tensor, not ",
                              t->layout());
}

void check_input(const Tensor& x) {
  TORCH_CHECK_INDEX(x.dim() >= 2, "expected an input of at least 2 dimensions, (N, C) or (N, C, *) (got ", x.dim(),
                    "D input)");
  to_dtype("input", x.scalar_type());
}

void check_batch(const Tensor& x, const c10::SymInt& examples) {
  c10::SymInt per_channel = examples;
  for (int64_t d = 2; d < x.dim(); ++d) per_channel *= x.sym_size(d);
  TORCH_CHECK_VALUE(per_channel != 1,
                    "Expected more than 1 value per channel when training, got input size torch.Size(", x.sym_sizes(),
                    ")", examples == x.sym_size(0) ? "" : ", whose smallest ghost batch is of 1 example");
}

void check_ghost_batch_size(std::optional<int64_t> size) {
  TORCH_CHECK_VALUE(!size || *size >= 1, "ghost_batch_size should be None or a positive integer, not ", *size);
}

void check_eps(double eps) { TORCH_CHECK_VALUE(eps >= 0, "batch_norm eps must be non-negative, but got ", eps); }

void check_training_eps(double eps, at::ScalarType type) {
  TORCH_CHECK_VALUE(eps > 0, "batch_norm eps must be positive during training, but got ", eps);
  TORCH_CHECK_VALUE(type == at::kDouble || static_cast<float>(eps) > 0,
                    "batch_norm eps must be positive in float32 during training, but got ", eps);
}

void check_parameters(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias) {
  if (given(weight)) check_vector("weight", *weight, x);
  if (given(bias)) check_vector("bias", *bias, x);
  if (given(weight) && given(bias)) check_same_dtype("bias", *bias, "weight", *weight);
}

void check_running(const Tensor& x, const OptionalTensor& running_mean, const OptionalTensor& running_var) {
  TORCH_CHECK_VALUE(given(running_mean) == given(running_var),
                    "running_mean and running_var must either both be None or neither be None");
  if (!given(running_mean)) return;
  check_vector("running_mean", *running_mean, x);
  check_vector("running_var", *running_var, x);
  check_same_dtype("running_var", *running_var, "running_mean", *running_mean);
}

void check_counter(const Tensor& x, const OptionalTensor& num_batches_tracked) {
  if (!given(num_batches_tracked)) return;
  const Tensor& t = *num_batches_tracked;
  TORCH_CHECK(t.sym_numel() == 1, "num_batches_tracked should contain 1 element not ", t.sym_numel());
  TORCH_CHECK(t.scalar_type() == at::kLong, "num_batches_tracked should be int64, not ", name_of(t.scalar_type()));
  check_device("num_batches_tracked", t, x);
}

void check_writable(const char* name, const OptionalTensor& t) {
  if (!given(t)) return;
  TORCH_CHECK(!is_locked(*t), name, " is an inference tensor, which training cannot update outside InferenceMode");
  TORCH_CHECK(!is_expanded(*t), name,
              " should have memory for each of its elements, to be updated in, and is expanded");
}

void check_average(const OptionalTensor& running_mean, const OptionalTensor& num_batches_tracked,
                   std::optional<double> momentum) {
  TORCH_CHECK_VALUE(momentum || !given(running_mean) || given(num_batches_tracked),
                    "momentum=None averages over all batches, and needs num_batches_tracked to count them");
}

void check_training(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                    const OptionalTensor& running_mean, const OptionalTensor& running_var,
                    const OptionalTensor& num_batches_tracked, const OptionalTensor& residual,
                    std::optional<double> momentum, double eps) {
  check_input(x);
  check_training_eps(eps, acc_type_of(x));
  check_parameters(x, weight, bias);
  check_running(x, running_mean, running_var);
  check_counter(x, num_batches_tracked);
  check_writable("running_mean", running_mean);
  check_writable("running_var", running_var);
  check_writable("num_batches_tracked", num_batches_tracked);
  check_average(running_mean, num_batches_tracked, momentum);
  if (given(residual)) check_like("residual", *residual, x);
}

void check_merge(const Tensor& stats, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                 const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps) {
  const auto dtype = stats.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kDouble, "stats should be float32 or float64, not ", name_of(dtype));
  TORCH_CHECK(stats.dim() == 2 && stats.sym_size(1) % 3 == 2,
              "stats should be of shape (ranks, 3 * channels + 2), not ", stats.sym_sizes());
  check_training_eps(eps, dtype);
  TORCH_CHECK_VALUE(given(running_mean) == given(running_var),
                    "running_mean and running_var must either both be None or neither be None");
  const c10::SymInt channels = (stats.sym_size(1) - 2) / 3;
  const auto check = [&](const char* name, const OptionalTensor& t) {
    if (!given(t)) return;
    TORCH_CHECK(t->sym_numel() == channels, name, " should contain ", channels, " elements not ", t->sym_numel());
    check_device(name, *t, stats, "stats");
    const auto running = t->scalar_type();
    TORCH_CHECK(find_dtype(running) && acc_type_of(running) == dtype, name, " should be ", name_of(dtype),
                dtype == at::kFloat ? ", float16 or bfloat16" : "", " beside stats of ", name_of(dtype), ", not ",
                name_of(running));
    check_writable(name, t);
  };
  check("running_mean", running_mean);
  check("running_var", running_var);
  if (given(running_mean)) check_same_dtype("running_var", *running_var, "running_mean", *running_mean);
  check_counter(stats, num_batches_tracked);
  check_writable("num_batches_tracked", num_batches_tracked);
  check_average(running_mean, num_batches_tracked, momentum);
}

void check_like(const char* name, const Tensor& t, const Tensor& x) {
  TORCH_CHECK(t.sym_sizes() == x.sym_sizes(), name, " should have the shape of input, ", x.sym_sizes(), ", not ",
              t.sym_sizes());
  TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, " should have the dtype of input, ", name_of(x.scalar_type()),
              ", not ", name_of(t.scalar_type()));
  check_device(name, t, x);
}

void check_statistic(const char* name, const Tensor& t, const Tensor& x) {
  check_length(name, t, x);
  check_statistic_type(name, t, x);
}

bool has_rows(const Tensor& t, const Tensor& x) { return t.dim() == 2 && t.sym_size(1) == x.sym_size(1); }

void check_statistics(const Tensor& mean, const Tensor& invstd, const Tensor& x) {
  if (!has_rows(mean, x)) {
    check_statistic("mean", mean, x);
    return check_statistic("invstd", invstd, x);
  }
  const c10::SymInt rows = mean.sym_size(0);
  TORCH_CHECK((rows >= 1 && rows <= x.sym_size(0)) || rows == 1,
              "mean should have a row for each ghost batch, of which an input of ", x.sym_size(0),
              " examples has 1 or more and at most as many, not ", rows);
  TORCH_CHECK(invstd.sym_sizes() == mean.sym_sizes(), "invstd should have the shape of mean, ", mean.sym_sizes(),
              ", not ", invstd.sym_sizes());
  check_statistic_type("mean", mean, x);
  check_statistic_type("invstd", invstd, x);
}

void check_kept(const OptionalTensor& given_mask, const OptionalTensor& residual, Activation activation,
                const Tensor& x, const c10::SymInt& bytes) {
  if (given(residual)) {
    TORCH_CHECK(activation != Activation::none,
                "residual is not needed here without an activation: its gradient is dy");
    TORCH_CHECK(!given(given_mask), "mask and residual say the same of an activation: give one of them");
    check_like("residual", *residual, x);
  }
  if (!given(given_mask)) return;
  TORCH_CHECK(saves_of(activation) == Saves::mask, "mask is for an activation that keeps a bit an element, not '",
              name_of(activation), "'");
  const Tensor& mask = *given_mask;
  TORCH_CHECK(mask.scalar_type() == at::kByte && mask.sym_numel() == bytes, "mask should be uint8 with ", bytes,
              " elements, not ", name_of(mask.scalar_type()), " with ", mask.sym_numel());
  check_device("mask", mask, x);
}

}  // namespace bnext
