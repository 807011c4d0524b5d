// The plans' launchers, for launch.cpp: one for each direction, by overloading.
#pragma once

#include "../launch.h"

namespace bnext::cuda {

// The two passes of `two_pass`, which are also the stages on their own.
cudaError_t launch_reduce(const ForwardParams&, const Partition&, const Scratch&, cudaStream_t);
cudaError_t launch_reduce(const BackwardParams&, const Partition&, const Scratch&, cudaStream_t);
cudaError_t launch_apply(const ForwardParams&, const Partition&, cudaStream_t);
cudaError_t launch_apply(const BackwardParams&, const Partition&, cudaStream_t);

cudaError_t launch_cooperative_plan(const ForwardParams&, const Plan&, const Scratch&, cudaStream_t);
cudaError_t launch_cooperative_plan(const BackwardParams&, const Plan&, const Scratch&, cudaStream_t);

cudaError_t launch_resident_planar(const ForwardParams&, const Partition&, const Scratch&, cudaStream_t);
cudaError_t launch_resident_planar(const BackwardParams&, const Partition&, const Scratch&, cudaStream_t);
cudaError_t launch_resident_packed(const ForwardParams&, const Partition&, const Scratch&, cudaStream_t);
cudaError_t launch_resident_packed(const BackwardParams&, const Partition&, const Scratch&, cudaStream_t);
cudaError_t launch_resident_interleaved(const ForwardParams&, const Partition&, const Scratch&, cudaStream_t);
cudaError_t launch_resident_interleaved(const BackwardParams&, const Partition&, const Scratch&, cudaStream_t);

// One kernel, which speaks for all in questions of what they were compiled for, and of how many clusters run together:
// with all the shared memory that a block may have, it is a multiprocessor that a block takes.
const void* sample_kernel();

}  // namespace bnext::cuda
