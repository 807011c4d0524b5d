// Stage `normalize`: y = act((x - mean) * invstd * weight + bias + residual), and the sign mask.
//
// Decomposition: planes of whole units, a block takes a range of one channel's units and folds the
// channel's coefficients once; everything else, a tile of columns by a range of rows, a thread folding
// the coefficients of its columns once. Blocks run in reverse: the statistics were taken from front to
// back, and their end is still in the L2 cache.
// Reads e bytes an element (2e with a residual), writes e (and 1/8 byte of mask).
#include "dispatch.h"

namespace bnext::cuda {
namespace {

template <class T, Epilogue EPILOGUE>
__global__ void __launch_bounds__(kMaxThreads, blocks_per_sm(false, true))
    normalize_planar_kernel(const BNEXT_GRID_CONSTANT ForwardParams p, const BNEXT_GRID_CONSTANT Pass pass) {
  wait_for_previous();
  add_batch(p);
  normalize_planar<T, kUnit<T, masks(EPILOGUE)>>(p, pass, Share::reverse(pass), EPILOGUE, p.running_mean != nullptr);
}

template <class T, Epilogue EPILOGUE>
__global__ void __launch_bounds__(kMaxThreads, blocks_per_sm(true, true))
    normalize_columns_kernel(const BNEXT_GRID_CONSTANT ForwardParams p, const BNEXT_GRID_CONSTANT Pass pass) {
  wait_for_previous();
  add_batch(p);
  normalize_columns<T, kUnit<T, masks(EPILOGUE)>>(p, pass, Share::reverse(pass), EPILOGUE, p.running_mean != nullptr);
}

}  // namespace

// For launch_forward: may overlap the kernel before, and adds one to num_batches_tracked where it is given.
cudaError_t launch_normalize_pass(const ForwardParams& p, const Pass& pass, cudaStream_t stream) {
  return with_dtype_and_epilogue(p, [&](auto element, auto epilogue) {
    using T = decltype(element);
    auto kernel =
        pass.columns ? normalize_columns_kernel<T, epilogue.value> : normalize_planar_kernel<T, epilogue.value>;
    return launch_pass(kernel, pass, stream, p, pass);
  });
}

cudaError_t launch_normalize(const ForwardParams& p, const Plan& plan, cudaStream_t stream) {
  ForwardParams stage = p;
  stage.num_batches_tracked = nullptr;
  Pass pass = plan.apply;
  pass.overlaps = false;  // whatever comes before
  return launch_normalize_pass(stage, pass, stream);
}

}  // namespace bnext::cuda
