// bnext._C: the direct way from Python, past the dispatcher's boxing.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <vector>

#include "autograd.h"
#include "plans.h"

namespace bnext {

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("batch_norm", torch::wrap_pybind_function_no_gil(&batch_norm));
  m.def("check_training", torch::wrap_pybind_function(&check_training));
#define BNEXT_NAME(activation, type) #activation,
  m.attr("activations") = std::vector<std::string>{BNEXT_ACTIVATIONS(BNEXT_NAME)};
#undef BNEXT_NAME
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
