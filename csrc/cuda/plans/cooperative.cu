// Plan `cooperative`: both passes in one launch of blocks that are on the device together, with a barrier of all of
// them in between. For tensors that do not fit `resident` and are small enough to come from the caches the second time:
// 2e bytes an element forward, 3e backward.
//
// What is fused is read from the parameters, since these launches are bound by latency, not by instructions: relu or
// none. Other activations do without this plan.
#include <type_traits>

#include "launch_plan.cuh"
#include "passes.cuh"

namespace bnext::cuda {
namespace {

// How a reduction shares out the tensor: see Partition.
enum class Reads { columns, planes, covered_planes };

// A kernel for each way that two partitions come together, of code as long as its two passes. One that chose among them
// would take the compiler more than twice the time, and hold the registers of the worst.
template <class Reduce, Reads READS, class Apply, bool APPLIES_COLUMNS>
__global__ void __launch_bounds__(kMaxThreads, 1)
    cooperative_kernel(const BNEXT_GRID_CONSTANT typename Reduce::Params p, const BNEXT_GRID_CONSTANT Partition reduce,
                       const BNEXT_GRID_CONSTANT Partition apply, const Scratch scratch, uint32_t* counter) {
  for_work_tiles(reduce, [&](const WorkTile& work) {
    if constexpr (READS == Reads::columns) column_reduce_pass<Reduce>(p, reduce, scratch, work);
    else planar_reduce_pass<Reduce, READS == Reads::planes>(p, reduce, scratch, work);
  });
  grid_sync(counter);
  Reduce::between_passes(p);
  for_work_tiles(apply, [&](const WorkTile& work) {
    if constexpr (APPLIES_COLUMNS) column_apply_pass<Apply, false>(p, apply, work);
    else planar_apply_pass<Apply, false>(p, apply, work);
  });
}

// Planes that are not whole vectors of the reduction are not of the elementwise pass, whose vectors may be wider.
template <class Reduce, class Apply>
auto kernel_of(const Plan& plan) {
  if (plan.reduce.by_columns) return cooperative_kernel<Reduce, Reads::columns, Apply, true>;
  if (!plan.reduce.planar.aligned) return cooperative_kernel<Reduce, Reads::covered_planes, Apply, true>;
  if constexpr (Reduce::N != Apply::N) {
    if (plan.apply.by_columns) return cooperative_kernel<Reduce, Reads::planes, Apply, true>;
  }
  return cooperative_kernel<Reduce, Reads::planes, Apply, false>;
}

}  // namespace

template <class Params>
cudaError_t launch_cooperative_plan(const Params& p, const Plan& plan, const Scratch& scratch, cudaStream_t stream) {
  if (!plan.reduce.fits() || !plan.apply.fits()) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<uint32_t>(plan.blocks)), block(kMaxThreads);
  return with_element(p.dtype, [&](auto element) {
    // Of either width of vectors: of 16 bytes, or of 8 elements, which have a byte of mask.
    using T = decltype(element);
    using Plain = RunTimeOp<Params, T, kVec<T, false>>;
    using Masked = RunTimeOp<Params, T, kVec<T, true>>;
    using Reduce = std::conditional_t<Masked::kReducesMasked, Masked, Plain>;
    // Plans give masked problems vectors of 8 elements, in the passes that have to do with the mask.
    const auto kernel = plan.apply.vec == Plain::N ? kernel_of<Plain, Plain>(plan) : kernel_of<Reduce, Masked>(plan);
    const cudaError_t error = allow_kernel_resources(reinterpret_cast<const void*>(kernel), kMaxThreads, 0, 1);
    if (error != cudaSuccess) return error;
    return launch_cooperative(kernel, grid, block, 0, stream, p, plan.reduce, plan.apply, scratch,
                              scratch.counters + (plan.counters - 1));
  });
}

BNEXT_INSTANTIATE(launch_cooperative_plan, const Plan&, const Scratch&, cudaStream_t)

}  // namespace bnext::cuda
