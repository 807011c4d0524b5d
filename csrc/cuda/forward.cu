// Training forward as a whole: statistics, running statistics, normalization.
//
// Plan `resident`: see resident_forward.cu. 2e bytes an element.
// Plan `small`: one launch of blocks that take the shares of stats, meet, and take those of normalize; x
// comes from the caches the second time: 2e.
// Plan `two_pass`: stats, then normalize: 3e.
#include "dispatch.h"
#include "normalize.cuh"
#include "stats.cuh"

namespace bnext::cuda {

cudaError_t launch_normalize_pass(const ForwardParams&, const Partition&, cudaStream_t);
cudaError_t launch_resident_forward(const ForwardParams&, const Plan&, const Scratch&, cudaStream_t);

namespace {

template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1)
    cooperative_forward_kernel(const BNEXT_GRID_CONSTANT ForwardParams p, const BNEXT_GRID_CONSTANT Partition reduce,
                               const BNEXT_GRID_CONSTANT Partition apply, const Scratch scratch, uint32_t* counter,
                               const Epilogue epilogue) {
  constexpr int kPlain = kVec<T, false>, kMasked = kVec<T, true>;
  for_work_tiles(reduce, [&](const WorkTile& work) {
    if (reduce.columns) stats_interleaved<T, kPlain>(p, reduce, scratch, work);
    else if (reduce.aligned) stats_planar<T, kPlain, true>(p, reduce, scratch, work);
    else stats_planar<T, kPlain, false>(p, reduce, scratch, work);
  });
  grid_sync(counter);
  increment_batches_tracked(p);
  for_work_tiles(apply, [&](const WorkTile& work) {
    if (apply.columns && apply.vec == kPlain) normalize_columns<T, kPlain>(p, apply, work, epilogue, false);
    else if (apply.columns) normalize_columns<T, kMasked>(p, apply, work, epilogue, false);
    else if (apply.vec == kPlain) normalize_planar<T, kPlain>(p, apply, work, epilogue, false);
    else normalize_planar<T, kMasked>(p, apply, work, epilogue, false);
  });
}

}  // namespace

cudaError_t launch_forward(const ForwardParams& p, const Plan& plan, const Scratch& scratch, cudaStream_t stream) {
  if (plan.kind == PlanKind::resident) return launch_resident_forward(p, plan, scratch, stream);
  if (plan.kind == PlanKind::cooperative) {
    return with_dtype(p.dtype, [&](auto element) {
      return launch_cooperative_plan(cooperative_forward_kernel<decltype(element)>, plan, scratch, stream, p,
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
