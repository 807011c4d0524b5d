// The plans' launchers, for launch.cpp: one for each direction, by overloading.
#pragma once

#include "../launch.h"

namespace bnext::cuda {

// The two passes of `two_pass`, which are also the stages on their own.
cudaError_t launch_reduce(const BatchNormForwardParams&, const Partition&, const Scratch&, cudaStream_t);
cudaError_t launch_reduce(const BatchNormBackwardParams&, const Partition&, const Scratch&, cudaStream_t);
cudaError_t launch_apply(const BatchNormForwardParams&, const Partition&, cudaStream_t);
cudaError_t launch_apply(const BatchNormBackwardParams&, const Partition&, cudaStream_t);

cudaError_t launch_cooperative_plan(const BatchNormForwardParams&, const Plan&, const Scratch&, cudaStream_t);
cudaError_t launch_cooperative_plan(const BatchNormBackwardParams&, const Plan&, const Scratch&, cudaStream_t);

cudaError_t launch_resident_planar(const BatchNormForwardParams&, const Partition&, const Scratch&, cudaStream_t);
cudaError_t launch_resident_planar(const BatchNormBackwardParams&, const Partition&, const Scratch&, cudaStream_t);
cudaError_t launch_resident_packed(const BatchNormForwardParams&, const Partition&, const Scratch&, cudaStream_t);
cudaError_t launch_resident_packed(const BatchNormBackwardParams&, const Partition&, const Scratch&, cudaStream_t);
cudaError_t launch_resident_interleaved(const BatchNormForwardParams&, const Partition&, const Scratch&, cudaStream_t);
cudaError_t launch_resident_interleaved(const BatchNormBackwardParams&, const Partition&, const Scratch&, cudaStream_t);

// One kernel, which speaks for all in questions of what they were compiled for, and of how many clusters run together:
// with all the shared memory that a block may have, it is a multiprocessor that a block takes.
const void* sample_kernel();

}  // namespace bnext::cuda
