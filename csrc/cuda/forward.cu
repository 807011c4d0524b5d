// Training forward as a whole: statistics, running statistics, normalization.
//
// Plan `resident`: see resident_forward.cu. 2e bytes an element.
// Plan `small`: one launch for few rows of an odd number of channels, in which a block takes the
// statistics of some channels, an element to a thread, and normalizes them, reading x from memory once and
// from the L1 or L2 cache the second time: 2e.
// Plan `two_pass`: stats, then normalize: 3e.
#include "dispatch.h"
#include "normalize.cuh"
#include "stats.cuh"

namespace bnext::cuda {

cudaError_t launch_normalize_pass(const ForwardParams&, const Pass&, cudaStream_t);
cudaError_t launch_resident_forward(const ForwardParams&, const Plan&, const Scratch&, cudaStream_t);

namespace {

template <class T>
__global__ void __launch_bounds__(kMaxThreads, kWholeBlocksPerSM<T>)
    small_forward_kernel(const BNEXT_GRID_CONSTANT ForwardParams p, const BNEXT_GRID_CONSTANT Pass pass,
                         const Scratch scratch, const Epilogue epilogue) {
  stats_interleaved<T, 1>(p, pass, scratch, Share(pass));
  __syncthreads();  // mean and invstd, written by other threads of this block
  normalize_columns<T, 1>(p, pass, Share(pass), epilogue, false);
  count_batch(p, scratch, 0);
}

}  // namespace

cudaError_t launch_forward(const ForwardParams& p, const Plan& plan, const Scratch& scratch, cudaStream_t stream) {
  if (plan.kind == PlanKind::resident) return launch_resident_forward(p, plan, scratch, stream);
  if (plan.kind == PlanKind::small) {
    return with_dtype(p.dtype, [&](auto element) {
      return launch_pass(small_forward_kernel<decltype(element)>, plan.whole, stream, p, plan.whole, scratch,
                         epilogue_of(p));
    });
  }
  cudaError_t error = launch_stats(p, plan, scratch, stream);
  if (error != cudaSuccess) return error;
  ForwardParams second = p;  // the running statistics are done; only the counter is left
  second.running_mean = second.running_var = nullptr;
  return launch_normalize_pass(second, plan.apply, stream);
}

}  // namespace bnext::cuda
