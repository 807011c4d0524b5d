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

// How many clusters of kLargeCluster blocks run on the current device together, each block with all the shared memory
// that it may have.
cudaError_t count_large_clusters(int64_t shared_per_block, int32_t* count);

}  // namespace bnext::cuda
