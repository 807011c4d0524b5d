// Stage `normalize`: y = act((x - mean) * invstd * weight + bias + residual), and the sign mask.
//
// Decomposition: planes of whole vectors, a block takes a range of one channel's vectors and folds the
// channel's coefficients once; everything else, a tile of columns by a range of rows, a thread folding
// the coefficients of its columns once. Blocks run in reverse: the statistics were taken from front to
// back, and their end is still in the L2 cache.
// Reads e bytes an element (2e with a residual), writes e (and 1/8 byte of mask).
#include "dispatch.h"

namespace bnext::cuda {
namespace {

template <class T, Epilogue EPILOGUE>
__global__ void __launch_bounds__(kMaxThreads, blocks_per_sm(false, true))
    normalize_planar_kernel(const BNEXT_GRID_CONSTANT ForwardParams p, const BNEXT_GRID_CONSTANT Partition partition) {
  wait_on_dependent_grids();
  increment_batches_tracked(p);
  normalize_planar<T, kVec<T, masks(EPILOGUE)>>(p, partition, WorkTile::reverse(partition), EPILOGUE,
                                                p.running_mean != nullptr);
}

template <class T, Epilogue EPILOGUE>
__global__ void __launch_bounds__(kMaxThreads, blocks_per_sm(true, true))
    normalize_columns_kernel(const BNEXT_GRID_CONSTANT ForwardParams p, const BNEXT_GRID_CONSTANT Partition partition) {
  wait_on_dependent_grids();
  increment_batches_tracked(p);
  normalize_columns<T, kVec<T, masks(EPILOGUE)>>(p, partition, WorkTile::reverse(partition), EPILOGUE,
                                                 p.running_mean != nullptr);
}

}  // namespace

// For launch_forward: may overlap the kernel before, and adds one to num_batches_tracked where it is given.
cudaError_t launch_normalize_pass(const ForwardParams& p, const Partition& partition, cudaStream_t stream) {
  return with_dtype_and_epilogue(p, [&](auto element, auto epilogue) {
    using T = decltype(element);
    auto kernel =
        partition.columns ? normalize_columns_kernel<T, epilogue.value> : normalize_planar_kernel<T, epilogue.value>;
    return launch_pass(kernel, partition, stream, p, partition);
  });
}

cudaError_t launch_normalize(const ForwardParams& p, const Plan& plan, cudaStream_t stream) {
  ForwardParams stage = p;
  stage.num_batches_tracked = nullptr;
  Partition partition = plan.apply;
  partition.pdl = false;  // whatever comes before
  return launch_normalize_pass(stage, partition, stream);
}

}  // namespace bnext::cuda
