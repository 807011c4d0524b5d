// Every mistake that a caller can make, found before anything is allocated or changed. A message
// names the argument, what was expected and what came; exceptions are of torch.nn's types.
//
// Sizes are symbolic, because tracing runs the same checks.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "../core/activation.h"

namespace bnext {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline bool given(const OptionalTensor& t) { return t.has_value() && t->defined(); }

// The kernels' name of a dtype that they take, or none.
std::optional<DType> find_dtype(at::ScalarType t);
// The same, or an error. `name` is an argument of the operator or one that it stands for.
DType to_dtype(const char* name, at::ScalarType t);

// The dtype that tensors of dtype t are accumulated in; and statistics of x are kept in.
constexpr at::ScalarType acc_type_of(at::ScalarType t) { return t == at::kDouble ? at::kDouble : at::kFloat; }
inline at::ScalarType acc_type_of(const Tensor& x) { return acc_type_of(x.scalar_type()); }
// Whether that is another one: parameters may be of either.
constexpr bool is_widened(at::ScalarType t) { return acc_type_of(t) != t; }
inline bool is_widened(const Tensor& x) { return is_widened(x.scalar_type()); }

// Whether a backward takes bits that the forward kept: without a residual the activation's argument follows from x.
inline bool needs_mask(Activation activation, const OptionalTensor& residual) {
  return given(residual) && saves_of(activation) == Saves::mask;
}

// Only leaky_relu has a parameter.
Activation parse_activation(std::string_view name, double param);

// Outside of inference mode its tensors can neither be written nor saved for a backward.
inline bool is_locked(const Tensor& t) { return t.is_inference() && !c10::InferenceMode::is_enabled(); }

// Whether elements share memory, so that none of them can be written by itself.
inline bool is_expanded(const Tensor& t) {
  if (t.is_contiguous()) return false;
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.sym_stride(d) == 0 && t.sym_size(d) != 1) return true;
  }
  return false;
}

// Not sparse. The dispatcher refuses sparse tensors too, but its message helps nobody.
void check_dense(const char* name, const OptionalTensor& t);

// Rank and dtype.
void check_input(const Tensor& x);

// torch.nn refuses to take a variance over one value. `examples`: of the smallest ghost batch, or of x.
void check_batch(const Tensor& x, const c10::SymInt& examples);

void check_ghost_batch_size(std::optional<int64_t> size);

void check_eps(double eps);
// In training, where it is added to variances of that type.
void check_training_eps(double eps, at::ScalarType type);

// weight, bias: one value a channel, both of one dtype: x's, or float32 beside 16-bit x.
void check_parameters(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias);

// running_mean, running_var: likewise, both or neither.
void check_running(const Tensor& x, const OptionalTensor& running_mean, const OptionalTensor& running_var);
void check_counter(const Tensor& x, const OptionalTensor& num_batches_tracked);

// Raises what an in-place operation on t would, before anything has been changed.
void check_writable(const char* name, const OptionalTensor& t);

// All that a training forward takes, but that x has more than one value a channel: of several processes, one may.
void check_training(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                    const OptionalTensor& running_mean, const OptionalTensor& running_var,
                    const OptionalTensor& num_batches_tracked, const OptionalTensor& residual,
                    std::optional<double> momentum, double eps);

// The gathered statistics of several processes, and what they are merged into.
void check_merge(const Tensor& stats, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                 const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps);

// A tensor that has to be just like x: residual, dy.
void check_like(const char* name, const Tensor& t, const Tensor& x);

// A channel vector of statistics: mean, invstd, sums.
void check_statistic(const char* name, const Tensor& t, const Tensor& x);

// Whether a statistic is (B, C), with a row for each ghost batch, and not a channel vector.
bool has_rows(const Tensor& t, const Tensor& x);

// mean and invstd: both channel vectors, or both with a row for each ghost batch.
void check_statistics(const Tensor& mean, const Tensor& invstd, const Tensor& x);

// What the forward over x kept of the activation's argument: the mask of an activation that keeps a bit an element, or
// the residual, which says the same of any activation.
// `mask_bytes`: how many the mask takes.
void check_kept(const OptionalTensor& mask, const OptionalTensor& residual, Activation activation, const Tensor& x,
                const c10::SymInt& mask_bytes);

}  // namespace bnext
