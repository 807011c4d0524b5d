// Stage `normalize`: y = act((x - mean) * invstd * weight + bias + residual), and the sign mask.
//
// Decomposition: planes of whole units, a block takes a range of one channel's units and folds the
// channel's coefficients once; everything else, a tile of columns by a range of rows, a thread folding
// the coefficients of its columns once. Blocks run in reverse: the statistics were taken from front to
// back, and their end is still in the L2 cache.
// Reads e bytes an element (2e with a residual), writes e (and 1/8 byte of mask).
#include "dispatch.h"
#include "normalize.cuh"

namespace bnext::cuda {
namespace {

template <class T, Epilogue EPILOGUE>
__global__ void __launch_bounds__(kMaxThreads, blocks_per_sm(false, true))
    normalize_planar_kernel(const BNEXT_GRID_CONSTANT ForwardParams p, const BNEXT_GRID_CONSTANT Pass pass) {
  // Every block of the reduction before this kernel has read the counter.
  if (p.num_batches_tracked && blockIdx.x == 0 && threadIdx.x == 0) ++*p.num_batches_tracked;
  normalize_planar<T, kUnit<T, masks(EPILOGUE)>>(p, pass, Share(pass, true), EPILOGUE, p.running_mean != nullptr);
}

template <class T, Epilogue EPILOGUE>
__global__ void __launch_bounds__(kMaxThreads, blocks_per_sm(true, true))
    normalize_columns_kernel(const BNEXT_GRID_CONSTANT ForwardParams p, const BNEXT_GRID_CONSTANT Pass pass) {
  if (p.num_batches_tracked && blockIdx.x == 0 && threadIdx.x == 0) ++*p.num_batches_tracked;
  normalize_columns<T, kUnit<T, masks(EPILOGUE)>>(p, pass, Share(pass, true), EPILOGUE, p.running_mean != nullptr);
}

template <class T, Epilogue EPILOGUE>
cudaError_t launch_epilogue(const ForwardParams& p, const Pass& pass, cudaStream_t stream) {
  auto kernel = pass.columns ? normalize_columns_kernel<T, EPILOGUE> : normalize_planar_kernel<T, EPILOGUE>;
  return launch_pass(kernel, pass, stream, p, pass);
}

}  // namespace

// Adds one to num_batches_tracked where it is given, for launch_forward.
cudaError_t launch_normalize_pass(const ForwardParams& p, const Pass& pass, cudaStream_t stream) {
  return with_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    switch (epilogue_of(p)) {
      case Epilogue::none: return launch_epilogue<T, Epilogue::none>(p, pass, stream);
      case Epilogue::relu: return launch_epilogue<T, Epilogue::relu>(p, pass, stream);
      case Epilogue::add: return launch_epilogue<T, Epilogue::add>(p, pass, stream);
      case Epilogue::add_relu: return launch_epilogue<T, Epilogue::add_relu>(p, pass, stream);
    }
    return cudaErrorInvalidValue;
  });
}

cudaError_t launch_normalize(const ForwardParams& p, const Plan& plan, cudaStream_t stream) {
  ForwardParams stage = p;
  stage.num_batches_tracked = nullptr;
  return launch_normalize_pass(stage, plan.apply, stream);
}

}  // namespace bnext::cuda
