// Batch normalization with its gradients, as one function: what Python's eager modules call.
#pragma once

#include "checks.h"

namespace bnext {

Tensor batch_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& running_mean, const OptionalTensor& running_var,
                  const OptionalTensor& num_batches_tracked, const OptionalTensor& residual, bool training,
                  std::optional<double> momentum, double eps, std::string_view activation, double activation_param,
                  bool unbiased, std::optional<int64_t> ghost_batch_size);

}  // namespace bnext
