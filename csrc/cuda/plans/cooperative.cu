// Plan `cooperative`: both passes in one launch of blocks that are on the device together, with a barrier of all of
// them in between. For tensors that do not fit `resident` and are small enough to come from the caches the second time:
// 2e bytes an element forward, 3e backward.
//
// What is fused is read from the parameters, since these launches are bound by latency, not by instructions: relu or
// none. Other activations do without this plan, whose kernels would be a third of the build.
#include "launch_plan.cuh"
#include "passes.cuh"

namespace bnext::cuda {
namespace {

// An operation of either width of vectors: of 16 bytes, or of 8 elements, which have a byte of mask.
template <class T>
struct Forward {
  using Params = BatchNormForwardParams;
  template <int N> using Op = BatchNormForward<T, Epilogue::run_time, N>;
  static constexpr bool kReducesMasked = false;
};
template <class T>
struct Backward {
  using Params = BatchNormBackwardParams;
  template <int N> using Op = BatchNormBackward<T, Derivative::run_time, N>;
  static constexpr bool kReducesMasked = true;
};

template <class Op>
__device__ __forceinline__ void reduce_all(const typename Op::Params& p, const Partition& reduce,
                                           const Scratch& scratch) {
  for_work_tiles(reduce, [&](const WorkTile& work) {
    if (reduce.columns) column_reduce_pass<Op>(p, reduce, scratch, work);
    else if (reduce.aligned) planar_reduce_pass<Op, true>(p, reduce, scratch, work);
    else planar_reduce_pass<Op, false>(p, reduce, scratch, work);
  });
}

template <class Op>
__device__ __forceinline__ void apply_all(const typename Op::Params& p, const Partition& apply) {
  for_work_tiles(apply, [&](const WorkTile& work) {
    if (apply.columns) column_apply_pass<Op, false>(p, apply, work);
    else planar_apply_pass<Op, false>(p, apply, work);
  });
}

template <class T, template <class> class Family>
__global__ void __launch_bounds__(kMaxThreads, 1)
    cooperative_kernel(const BNEXT_GRID_CONSTANT typename Family<T>::Params p,
                       const BNEXT_GRID_CONSTANT Partition reduce, const BNEXT_GRID_CONSTANT Partition apply,
                       const Scratch scratch, uint32_t* counter) {
  constexpr int kPlain = kVec<T, false>, kMasked = kVec<T, true>;
  using Plain = typename Family<T>::template Op<kPlain>;
  using Masked = typename Family<T>::template Op<kMasked>;
  if (!Family<T>::kReducesMasked || kPlain == kMasked || reduce.vec == kPlain) reduce_all<Plain>(p, reduce, scratch);
  else reduce_all<Masked>(p, reduce, scratch);
  grid_sync(counter);
  Plain::after_reduction(p);
  if (kPlain == kMasked || apply.vec == kPlain) apply_all<Plain>(p, apply);
  else apply_all<Masked>(p, apply);
}

template <template <class> class Family, class Params>
cudaError_t launch_any(const Params& p, const Plan& plan, const Scratch& scratch, cudaStream_t stream) {
  if (!plan.reduce.fits() || !plan.apply.fits()) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<uint32_t>(plan.blocks)), block(kMaxThreads);
  return with_dtype(p.dtype, [&](auto element) {
    const auto kernel = cooperative_kernel<decltype(element), Family>;
    const cudaError_t error = allow_kernel_resources(reinterpret_cast<const void*>(kernel), kMaxThreads, 0, 1);
    if (error != cudaSuccess) return error;
    return launch_cooperative(kernel, grid, block, 0, stream, p, plan.reduce, plan.apply, scratch,
                              scratch.counters + (plan.counters - 1));
  });
}

}  // namespace

cudaError_t launch_cooperative_plan(const BatchNormForwardParams& p, const Plan& plan, const Scratch& scratch,
                                    cudaStream_t stream) {
  return launch_any<Forward>(p, plan, scratch, stream);
}
cudaError_t launch_cooperative_plan(const BatchNormBackwardParams& p, const Plan& plan, const Scratch& scratch,
                                    cudaStream_t stream) {
  return launch_any<Backward>(p, plan, scratch, stream);
}

}  // namespace bnext::cuda
