// The plans' launchers, for launch.cpp: of every operation, which is known by its parameters.
#pragma once

#include "../launch.h"

// Compiles a plan's launcher, of these parameters behind an operation's, for each operation.
#define BNEXT_INSTANTIATE(launcher, ...)                                     \
  template cudaError_t launcher(const BatchNormForwardParams&, __VA_ARGS__); \
  template cudaError_t launcher(const BatchNormBackwardParams&, __VA_ARGS__);

namespace bnext::cuda {

// launch_KIND_plan, of each kind of plan.
#define BNEXT_DECLARE(kind) \
  template <class Params>   \
  cudaError_t launch_##kind##_plan(const Params&, const Plan&, const Scratch&, cudaStream_t);
BNEXT_PLANS(BNEXT_DECLARE)
#undef BNEXT_DECLARE

// The two passes of `two_pass`, which are also the stages on their own.
template <class Params>
cudaError_t launch_reduce(const Params&, const Partition&, const Scratch&, cudaStream_t);
template <class Params>
cudaError_t launch_apply(const Params&, const Partition&, cudaStream_t);

// The kernels of `resident`.
template <class Params>
cudaError_t launch_resident_planar(const Params&, const Partition&, const Scratch&, cudaStream_t);
template <class Params>
cudaError_t launch_resident_packed(const Params&, const Partition&, const Scratch&, cudaStream_t);
template <class Params>
cudaError_t launch_resident_interleaved(const Params&, const Partition&, const Scratch&, cudaStream_t);

// One kernel, which speaks for all in questions of what they were compiled for, and of how many clusters run together:
// with all the shared memory that a block may have, it is a multiprocessor that a block takes.
const void* sample_kernel();

}  // namespace bnext::cuda
