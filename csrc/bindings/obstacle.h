// What keeps a call from the kernels, so that Python sends it to torch's operators or to a Function of its own.
#pragma once

#include "checks.h"

namespace bnext {

// Whether vmap, grad, jvp and so on of torch.func are at work: they wrap tensors on their way through the dispatcher,
// where a C++ Function cannot follow.
bool in_transform();

// Null where there is nothing; else one of the keys of bnext/routes.py. Cheap: every eager call asks.
const char* obstacle(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& running_mean, const OptionalTensor& running_var,
                     const OptionalTensor& num_batches_tracked, const OptionalTensor& residual);

}  // namespace bnext
