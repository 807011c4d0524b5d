#include "obstacle.h"

#include <c10/core/impl/LocalDispatchKeySet.h>

namespace bnext {
namespace {

bool any_of(std::initializer_list<const OptionalTensor*> tensors, bool (*has)(const Tensor&)) {
  for (const OptionalTensor* t : tensors) {
    if (given(*t) && has(**t)) return true;
  }
  return false;
}

// vmap, grad, jvp and so on wrap tensors on their way through the dispatcher, where a C++ Function cannot follow.
bool in_transform() {
  return c10::impl::tls_local_dispatch_key_set().included_.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

bool has_tangent(const Tensor& t) { return t._fw_grad(/*level=*/0).defined(); }
bool has_subclass(const Tensor& t) { return t.unsafeGetTensorImpl()->is_python_dispatch(); }
// The other layouts are refused, in words that help.
bool has_layout(const Tensor& t) { return t.layout() == at::kMkldnn; }

bool has_device(const Tensor& t) {
  const at::DeviceType device = t.device().type();
  return device != at::kCPU && device != at::kCUDA && device != at::kMeta;
}

// torch returns these as they are; of other vectors the kernels' checks say what is wrong.
bool is_empty_vector(const Tensor& t) { return t.dim() == 1 && t.sym_numel() == 0; }

}  // namespace

const char* obstacle(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& running_mean, const OptionalTensor& running_var,
                     const OptionalTensor& num_batches_tracked, const OptionalTensor& residual) {
  if (in_transform()) return "transform";
  const OptionalTensor x = input;
  if (any_of({&x, &weight, &bias, &running_mean, &running_var, &num_batches_tracked, &residual}, has_subclass)) {
    return "subclass";
  }
  if (any_of({&x, &weight, &bias, &running_mean, &running_var, &residual}, has_layout)) return "layout";
  if (any_of({&x}, has_device)) return "device";
  if (any_of({&x}, is_empty_vector)) return "empty";
  if (any_of({&x, &weight, &bias, &residual}, has_tangent)) return "forward_ad";
  if (given(num_batches_tracked) && num_batches_tracked->scalar_type() != at::kLong) return "counter";
  if (given(residual) &&
      (residual->scalar_type() != input.scalar_type() || residual->sym_sizes() != input.sym_sizes())) {
    return "residual";
  }
  return nullptr;
}

}  // namespace bnext
