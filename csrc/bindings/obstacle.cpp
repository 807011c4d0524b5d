#include "obstacle.h"

#include <c10/core/impl/LocalDispatchKeySet.h>

namespace bnext {
bool in_transform() {
  return c10::impl::tls_local_dispatch_key_set().included_.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

namespace {

bool has_kernels(at::DeviceType device) { return device == at::kCPU || device == at::kCUDA || device == at::kMeta; }

}  // namespace

const char* obstacle(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& running_mean, const OptionalTensor& running_var,
                     const OptionalTensor& num_batches_tracked, const OptionalTensor& residual) {
  const bool sums = given(residual) && residual->layout() == at::kStrided &&
                    (residual->scalar_type() != input.scalar_type() || residual->sym_sizes() != input.sym_sizes());
  if (in_transform()) return sums ? "residual" : "transform";
  bool mkldnn = false, tangent = false, subclass = false;
  const auto look_at = [&](const Tensor& t) {
    mkldnn |= t.layout() == at::kMkldnn;  // other layouts are refused, with a message that helps
    tangent |= t._fw_grad(/*level=*/0).defined();
    subclass |= t.unsafeGetTensorImpl()->is_python_dispatch();
  };
  look_at(input);
  for (const OptionalTensor* t : {&weight, &bias, &running_mean, &running_var, &num_batches_tracked, &residual}) {
    if (given(*t)) look_at(**t);
  }
  if (mkldnn) return "layout";
  if (!has_kernels(input.device().type())) return "device";
  // torch returns these as they are; of other vectors the kernels' checks say what is wrong.
  if (input.dim() == 1 && input.sym_numel() == 0) return "empty";
  if (tangent && !sums) return "forward_ad";
  if (given(num_batches_tracked) && num_batches_tracked->scalar_type() != at::kLong) return "counter";
  if (sums) return "residual";
  // Last: fake tensors and their like are subclasses, to which all of the above applies.
  return subclass ? "subclass" : nullptr;
}

}  // namespace bnext
