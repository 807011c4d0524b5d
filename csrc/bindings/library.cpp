// The operators' schemas, and their Meta kernels: what tracing needs.
#include "batch_norm_ops.h"

namespace bnext {

TORCH_LIBRARY(bnext, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, Tensor? residual, bool training, float? momentum, float eps, "
      "str activation='none', float activation_param=0.0) -> Tensor",
      tags);
  m.def("batch_norm_stats(Tensor x) -> (Tensor mean, Tensor var)", tags);
  m.def("batch_norm_local_stats(Tensor x) -> Tensor", tags);
  m.def(
      "batch_norm_merge(Tensor stats, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, float? momentum, float eps) -> (Tensor mean, Tensor invstd, Tensor count)",
      tags);
  m.def(
      "batch_norm_normalize(Tensor x, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, Tensor? residual=None, "
      "str activation='none', float activation_param=0.0, bool save_mask=False) -> (Tensor y, Tensor mask)",
      tags);
  m.def(
      "batch_norm_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, Tensor? residual, float? momentum, float eps, "
      "str activation='none', float activation_param=0.0, bool save_mask=False) "
      "-> (Tensor y, Tensor mean, Tensor invstd, Tensor mask)",
      tags);
  m.def(
      "batch_norm_forward_eval(Tensor x, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
      "Tensor? residual, float eps, "
      "str activation='none', float activation_param=0.0, bool save=False, bool save_mask=False) "
      "-> (Tensor y, Tensor mean, Tensor invstd, Tensor mask)",
      tags);
  m.def(
      "batch_norm_backward_reduce(Tensor dy, Tensor x, Tensor mean, Tensor invstd, "
      "Tensor? weight=None, Tensor? bias=None, Tensor? mask=None, Tensor? residual=None, "
      "str activation='none', float activation_param=0.0) "
      "-> (Tensor sum_dy, Tensor sum_dy_xmu, Tensor dweight, Tensor dbias)",
      tags);
  m.def(
      "batch_norm_backward_input(Tensor dy, Tensor x, Tensor mean, Tensor invstd, "
      "Tensor? weight, Tensor? bias, Tensor? mask, Tensor? residual, "
      "Tensor sum_dy, Tensor sum_dy_xmu, SymInt count, "
      "str activation='none', float activation_param=0.0) -> (Tensor dx, Tensor dresidual)",
      tags);
  m.def(
      "batch_norm_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor? bias, Tensor mean, Tensor invstd, "
      "Tensor? mask, Tensor? residual, str activation, float activation_param, bool training, bool[4] needs) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
      tags);
}

struct Meta {
  static constexpr bool executes = false;
  using Int = c10::SymInt;
};

TORCH_LIBRARY_IMPL(bnext, Meta, m) { register_batch_norm<Meta>(m); }

}  // namespace bnext
