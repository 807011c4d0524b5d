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

template <class T, int UNIT, bool ALIGNED>
__global__ void __launch_bounds__(kMaxThreads, kWholeBlocksPerSM<T>)
    resident_backward_planar_kernel(const BNEXT_GRID_CONSTANT BackwardParams p, const BNEXT_GRID_CONSTANT Pass pass,
                                    const Gate gate) {
  using A = acc_t<T>;
  const Share share = cluster_share(pass);
  const Kept<T, UNIT> dy = {reinterpret_cast<Unit<T, UNIT>*>(dynamic_shared())};
  const Kept<T, UNIT> x = {dy.slots + pass.steps_per_split};

  using Keeping = typename Kept<T, UNIT>::Keeping;
  const Sums<A> mine = block_sums<T, UNIT, ALIGNED>(
      p, pass, share, GradientSource<Keeping, Keeping>{dy.keeping(p.dy, p.shape), x.keeping(p.x, p.shape)}, gate);
  const Sums<A> whole = merge_cluster(mine, pass);
  if (share.split == 0 && threadIdx.x == 0) finish_sums(p, share.tile, whole);

  using Giving = typename Kept<T, UNIT>::Giving;
  const ChannelGradient<A> channel(p, share.tile, p.training ? whole.dy : A(0),
                                   p.training ? whole.dy_xmu : A(0));
  backward_input_share<T, UNIT, ALIGNED>(p, pass, share, GradientSource<Giving, Giving>{dy.giving(), x.giving()}, gate, channel);
  leave_cluster(pass);
}

}  // namespace

cudaError_t launch_resident_backward(const BackwardParams& p, const Plan& plan, cudaStream_t stream) {
  const Pass& pass = plan.whole;
  return with_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kPlain = kUnit<T, false>, kMasked = kUnit<T, true>;
    auto kernel = !pass.aligned        ? resident_backward_planar_kernel<T, kPlain, false>
                  : pass.unit == kPlain ? resident_backward_planar_kernel<T, kPlain, true>
                                        : resident_backward_planar_kernel<T, kMasked, true>;
    return launch_pass(kernel, pass, stream, p, pass, gate_of(p));
  });
}

}  // namespace bnext::cuda
