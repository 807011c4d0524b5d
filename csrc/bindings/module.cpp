// bnext._C: the direct way from Python, past the dispatcher's boxing.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <vector>

#include "autograd.h"
#include "enable.h"
#include "kernels_run.h"
#include "obstacle.h"
#include "plans.h"

namespace bnext {
namespace {

// None where something keeps the call from the kernels: Python then asks what, and sends it another way.
Tensor batch_norm_if_possible(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                              const OptionalTensor& running_mean, const OptionalTensor& running_var,
                              const OptionalTensor& num_batches_tracked, const OptionalTensor& residual, bool training,
                              std::optional<double> momentum, double eps, std::string_view activation,
                              double activation_param, bool unbiased, std::optional<int64_t> ghost_batch_size) {
  if (obstacle(input, weight, bias, running_mean, running_var, num_batches_tracked, residual)) return {};
  return batch_norm(input, weight, bias, running_mean, running_var, num_batches_tracked, residual, training, momentum,
                    eps, activation, activation_param, unbiased, ghost_batch_size);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  // pybind11 would take None for false.
  const auto training = py::arg("training").noconvert(), unbiased = py::arg("unbiased").noconvert();
  const auto any = [](const char* name) { return py::arg(name); };
  m.def("batch_norm_if_possible", torch::wrap_pybind_function_no_gil(&batch_norm_if_possible), any("input"),
        any("weight"), any("bias"), any("running_mean"), any("running_var"), any("num_batches_tracked"),
        any("residual"), training, any("momentum"), any("eps"), any("activation"), any("activation_param"), unbiased,
        any("ghost_batch_size"));
  m.def("batch_norm", torch::wrap_pybind_function_no_gil(&batch_norm));
  m.def("obstacle", torch::wrap_pybind_function(&obstacle));
  m.def("set_enabled", torch::wrap_pybind_function(&set_enabled));
  m.def("kernels_run", [] { return kernels_run.load(); });
  m.def("check_training", torch::wrap_pybind_function(&check_training));
  m.attr("activations") = std::vector<std::string>(std::begin(kActivationNames), std::end(kActivationNames));
#if defined(BNEXT_WITH_CUDA)
  m.attr("with_cuda") = true;
  m.def("plans", &plans);
  m.def("force_plan", &force_plan);
  m.def("set_sm_margin", &set_sm_margin);
  m.def("refused_launches", torch::wrap_pybind_function(&refused_launches));
  m.def("device_properties", torch::wrap_pybind_function(&device_properties));
  m.def("describe_plan", torch::wrap_pybind_function(&describe_plan));
#else
  m.attr("with_cuda") = false;
#endif
}

}  // namespace bnext
