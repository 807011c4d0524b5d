// The CUDA half of csrc/bindings/enable.cpp without a GPU: its operators, registered for CPU tensors, on which the
// kernels that they call are those of the CPU. In place of torch's CUDA kernels are torch's for the CPU, and in place
// of cuDNN's, errors.
#define BNEXT_WITH_CUDA
#include "../csrc/bindings/checks.cpp"
#include "../csrc/bindings/enable.cpp"

namespace at::cuda {

using bnext::OptionalTensor;
using bnext::Tensor;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Three native_batch_norm(const Tensor& x, const OptionalTensor& w, const OptionalTensor& b, const OptionalTensor& mean,
                        const OptionalTensor& var, bool training, double momentum, double eps) {
  return at::cpu::native_batch_norm(x, w, b, mean, var, training, momentum, eps);
}
Three _native_batch_norm_legit(const Tensor& x, const OptionalTensor& w, const OptionalTensor& b, Tensor& mean,
                               Tensor& var, bool training, double momentum, double eps) {
  return at::cpu::_native_batch_norm_legit(x, w, b, mean, var, training, momentum, eps);
}
Three _native_batch_norm_legit(const Tensor& x, const OptionalTensor& w, const OptionalTensor& b, bool training,
                               double momentum, double eps) {
  return at::cpu::_native_batch_norm_legit(x, w, b, training, momentum, eps);
}
Four _batch_norm_with_update(const Tensor& x, const OptionalTensor& w, const OptionalTensor& b, Tensor& mean,
                             Tensor& var, double momentum, double eps) {
  return at::cpu::_batch_norm_with_update(x, w, b, mean, var, momentum, eps);
}
Three native_batch_norm_backward(const Tensor& dy, const Tensor& x, const OptionalTensor& w, const OptionalTensor& mean,
                                 const OptionalTensor& var, const OptionalTensor& save_mean,
                                 const OptionalTensor& save_invstd, bool training, double eps,
                                 std::array<bool, 3> needs) {
  return at::cpu::native_batch_norm_backward(dy, x, w, mean, var, save_mean, save_invstd, training, eps, needs);
}
Three batch_norm_backward(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                          const OptionalTensor&, const OptionalTensor&, bool, double, std::array<bool, 3>,
                          const Tensor&) {
  TORCH_CHECK(false, "torch's backward, which may be cuDNN's");
}
Four cudnn_batch_norm(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                      bool, double, double) {
  TORCH_CHECK(false, "cuDNN's forward");
}
Three cudnn_batch_norm_backward(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, double,
                                const Tensor&) {
  TORCH_CHECK(false, "cuDNN's backward");
}

}  // namespace at::cuda

namespace bnext {

void set_enabled_on_cpu(bool on) {
  static const bool once = [] {
    Silence silence;
    const c10::WarningUtils::WarningHandlerGuard guard(&silence);
    torch::Library& m = library(c10::DispatchKey::CPU);
    Operators<Cuda>::add_to(m);
    m.impl("cudnn_batch_norm", &cudnn_batch_norm);
    m.impl("cudnn_batch_norm_backward", &cudnn_batch_norm_backward);
    return true;
  }();
  static_cast<void>(once);
  enabled.store(on);
}

}  // namespace bnext

extern "C" void set_enabled_on_cpu(bool on) { bnext::set_enabled_on_cpu(on); }
