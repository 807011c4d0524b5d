// The launchers: all that the bindings see of the CUDA backend. Each takes (params, plan,
// scratch, stream), enqueues on the stream, and returns the launch's error; none allocates,
// synchronises or reads device memory back. `plan` says how much scratch each call needs.
#pragma once

#include "../core/merge.h"
#include "../core/params.h"
#include "device/cuda_compat.h"
#include "planner/plan.h"

namespace bnext::cuda {

// Properties of a device that plans depend on; slow. Whoever launches goes by Device, which remembers them.
cudaError_t query_device(int device, DeviceProperties* properties);

// Lets a kernel have that much dynamic shared memory to a block of so many threads, and clusters of that size, on the
// current device. Slow only where a kernel wants more than ever before on it.
cudaError_t allow_kernel_resources(const void* kernel, int threads, size_t dynamic_shared, unsigned cluster);

// x -> mean, var.
cudaError_t launch_batch_norm_stats(const BatchNormForwardParams&, const Plan&, const Scratch&, cudaStream_t);
// x, residual? and mean, invstd -> y, mask?; or, in eval mode, the running statistics -> y, mean?, invstd?.
cudaError_t launch_batch_norm_normalize(const BatchNormForwardParams&, const Plan&, cudaStream_t);
// Training forward: x -> y, mean, invstd, mask?; updates the running statistics and the counter.
cudaError_t launch_batch_norm_forward(const BatchNormForwardParams&, const Plan&, const Scratch&, cudaStream_t);

// The statistics of several processes -> mean, invstd, count; updates the running statistics, not the counter. Needs
// neither plan nor scratch.
cudaError_t launch_batch_norm_merge(const BatchNormMergeParams&, cudaStream_t);

// dy, x -> sum_dy, sum_dy_xmu, dweight?, dbias?.
cudaError_t launch_batch_norm_backward_reduce(const BatchNormBackwardParams&, const Plan&, const Scratch&,
                                              cudaStream_t);
// dy, x, sums -> dx, dresidual?.
cudaError_t launch_batch_norm_backward_input(const BatchNormBackwardParams&, const Plan&, cudaStream_t);
// Both: dy, x -> dx, dresidual?, dweight?, dbias?, sums.
cudaError_t launch_batch_norm_backward(const BatchNormBackwardParams&, const Plan&, const Scratch&, cudaStream_t);

}  // namespace bnext::cuda
