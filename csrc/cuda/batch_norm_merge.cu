// The statistics of several processes, merged: a thread takes a channel, and reads its two numbers of each rank next to
// its neighbours'. In double, also on GPUs that are slow at it: some 50 operations a rank and channel.
#include "../core/merge.h"
#include "launch.h"

namespace bnext::cuda {
namespace {

// Few to a block, so that the channels of a layer spread over the device.
constexpr int kMergeThreads = 64;

template <class A>
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(const BNEXT_GRID_CONSTANT BatchNormMergeParams p) {
  const int64_t channel = int64_t{blockIdx.x} * kMergeThreads + threadIdx.x;
  if (channel < p.c) merge_channel<A>(p, channel);
}

}  // namespace

cudaError_t launch_batch_norm_merge(const BatchNormMergeParams& p, cudaStream_t stream) {
  if (p.c == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.c, kMergeThreads)));
  return launch(p.dtype == DType::f64 ? merge_kernel<double> : merge_kernel<float>, grid, dim3(kMergeThreads), 0,
                stream, p);
}

}  // namespace bnext::cuda
