// Backward, plan `resident`: x and dy are read from memory once.
//
// Decomposition: that of resident_forward.cu, with units of dy and of x in shared memory, and two sums
// in place of the Welford state. The mask, 1/8 byte an element, is read a second time from the L2 cache.
// Reads 2e bytes an element (and 1/8 byte of mask), writes e, and e for dresidual: 3e, the floor.
#include "backward_input.cuh"
#include "backward_reduce.cuh"
#include "dispatch.h"
#include "resident.cuh"

namespace bnext::cuda {
namespace {

template <class T, int UNIT>
__device__ __forceinline__ auto keeping(const BackwardParams& p, const Kept<T, UNIT>& dy, const Kept<T, UNIT>& x) {
  using Source = typename Kept<T, UNIT>::Keeping;
  return GradientSource<Source, Source>{dy.keeping(p.dy, p.shape), x.keeping(p.x, p.shape)};
}

template <class T, int UNIT>
__device__ __forceinline__ auto giving(const Kept<T, UNIT>& dy, const Kept<T, UNIT>& x) {
  using Source = typename Kept<T, UNIT>::Giving;
  return GradientSource<Source, Source>{dy.giving(), x.giving()};
}

template <class A>
__device__ __forceinline__ ChannelGradient<A> channel_gradient(const BackwardParams& p, int64_t channel,
                                                               const Sums<A>& sums) {
  return ChannelGradient<A>(p, channel, p.training ? sums.dy : A(0), p.training ? sums.dy_xmu : A(0));
}

template <class T, int UNIT, bool ALIGNED>
__global__ void __launch_bounds__(kMaxThreads, kWholeBlocksPerSM<T>)
    resident_backward_planar_kernel(const BNEXT_GRID_CONSTANT BackwardParams p, const BNEXT_GRID_CONSTANT Pass pass,
                                    const Gate gate) {
  using A = acc_t<T>;
  const Share share = cluster_share(pass);
  const Kept<T, UNIT> dy = {reinterpret_cast<Unit<T, UNIT>*>(dynamic_shared())};
  const Kept<T, UNIT> x = {dy.slots + pass.steps_per_split};

  const Sums<A> mine = block_sums<T, UNIT, ALIGNED>(p, pass, share, keeping(p, dy, x), gate);
  const Sums<A> whole = merge_cluster(mine, pass);
  if (share.split == 0 && threadIdx.x == 0) finish_sums(p, share.tile, whole);

  backward_input_share<T, UNIT, ALIGNED>(p, pass, share, giving(dy, x), gate, channel_gradient(p, share.tile, whole));
  leave_cluster(pass);
}

template <class T, int UNIT>
__global__ void __launch_bounds__(kMaxThreads, kWholeBlocksPerSM<T>)
    resident_backward_interleaved_kernel(const BNEXT_GRID_CONSTANT BackwardParams p,
                                         const BNEXT_GRID_CONSTANT Pass pass, const Scratch scratch, const Gate gate) {
  using A = acc_t<T>;
  const Share share(pass);
  const ColumnPlace<UNIT> place(pass, share);
  const Kept<T, UNIT> dy = {reinterpret_cast<Unit<T, UNIT>*>(dynamic_shared())};
  const Kept<T, UNIT> x = {dy.slots + pass.kept_bytes / (2 * sizeof(Unit<T, UNIT>))};

  Sums<A> state[UNIT];
  block_column_sums<T, UNIT>(state, p, pass, share, place, keeping(p, dy, x), gate);
  __shared__ Sums<A> whole[kResidentWidth<T, UNIT>];
  merge_tile(state, place, p.shape.c, pass, scratch, share, whole);

  ChannelGradient<A> channel[UNIT] = {};
  if (place.active) {
#pragma unroll
    for (int e = 0; e < UNIT; ++e) {
      const Sums<A>& sums = whole[place.lane * UNIT + e];
      if (share.split == 0 && place.row == 0) finish_sums(p, place.col + e, sums);
      channel[e] = channel_gradient(p, place.col + e, sums);
    }
  }
  backward_input_tile<T, UNIT, false>(p, pass, share, place, giving(dy, x), gate, channel);
}

}  // namespace

cudaError_t launch_resident_backward(const BackwardParams& p, const Plan& plan, const Scratch& scratch,
                                     cudaStream_t stream) {
  const Pass& pass = plan.whole;
  return with_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kPlain = kUnit<T, false>, kMasked = kUnit<T, true>;
    if (pass.columns) {
      auto kernel = pass.unit == kPlain ? resident_backward_interleaved_kernel<T, kPlain>
                                        : resident_backward_interleaved_kernel<T, kMasked>;
      return launch_pass(kernel, pass, stream, p, pass, scratch, gate_of(p));
    }
    auto kernel = !pass.aligned         ? resident_backward_planar_kernel<T, kPlain, false>
                  : pass.unit == kPlain ? resident_backward_planar_kernel<T, kPlain, true>
                                        : resident_backward_planar_kernel<T, kMasked, true>;
    return launch_pass(kernel, pass, stream, p, pass, gate_of(p));
  });
}

}  // namespace bnext::cuda
