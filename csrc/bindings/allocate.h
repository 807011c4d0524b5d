// What an operator returns, before it is filled in. A kernel on a small tensor takes less time than torch's dispatcher
// does for each of these: where something runs they come from the functions below it.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>

#if defined(BNEXT_WITH_CUDA)
#include <ATen/cuda/EmptyTensor.h>
#endif

#include "checks.h"
#include "parts.h"

namespace bnext {

// The dtype that both parameters have; where there are none, that of their gradients' sums.
inline at::ScalarType parameter_type(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias) {
  return given(weight) ? weight->scalar_type() : given(bias) ? bias->scalar_type() : acc_type_of(x);
}

// All on the device of x. `executes`: false where sizes may be symbolic (Meta).
template <bool executes>
struct Allocate {
  static Tensor empty(const Tensor& x, c10::SymIntArrayRef sizes, at::ScalarType dtype,
                      at::MemoryFormat format = at::MemoryFormat::Contiguous) {
    if constexpr (executes) {
      const at::IntArrayRef integers = C10_AS_INTARRAYREF_SLOW(sizes);
#if defined(BNEXT_WITH_CUDA)
      if (x.is_cuda()) return at::detail::empty_cuda(integers, dtype, x.device(), format);
#endif
      if (x.is_cpu()) return at::detail::empty_cpu(integers, dtype, /*pin_memory=*/false, format);
    }
    return at::empty_symint(sizes, x.options().dtype(dtype), format);
  }

  // With the strides of x, which is dense.
  static Tensor like(const Tensor& x) {
    if constexpr (executes) {
#if defined(BNEXT_WITH_CUDA)
      if (x.is_cuda()) return at::detail::empty_strided_cuda(x.sizes(), x.strides(), x.scalar_type(), x.device());
#endif
      if (x.is_cpu()) return at::detail::empty_strided_cpu(x.sizes(), x.strides(), x.scalar_type());
    }
    return at::empty_like(x);
  }
  static Tensor like(const Tensor& x, at::MemoryFormat format) {
    return empty(x, x.sym_sizes(), x.scalar_type(), format);
  }

  static Tensor nothing(const Tensor& x) { return empty(x, {c10::SymInt(0)}, x.scalar_type()); }

  static Tensor channel_vector(const Tensor& x, at::ScalarType dtype) { return empty(x, {x.sym_size(1)}, dtype); }

  static Tensor statistic(const Tensor& x) { return channel_vector(x, acc_type_of(x)); }

  // One for each part.
  static Tensor statistic(const Tensor& x, const Parts& parts) {
    return parts.in_rows() ? empty(x, {parts.count(), x.sym_size(1)}, acc_type_of(x)) : statistic(x);
  }

  static Tensor mask(const Tensor& x, const Parts& parts, bool wanted) {
    return empty(x, {wanted ? parts.mask_bytes() : c10::SymInt(0)}, at::kByte);
  }

  // In the shape of the parameter, which torch lets be any that has a value for each channel.
  static Tensor parameter_gradient(const Tensor& x, const OptionalTensor& parameter, const OptionalTensor& other) {
    return given(parameter) ? like(*parameter, at::MemoryFormat::Contiguous)
                            : channel_vector(x, parameter_type(x, parameter, other));
  }
};

}  // namespace bnext
