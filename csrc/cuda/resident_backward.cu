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

// Where a block keeps one of its `of` shares of dy and of x.
template <class T, int UNIT>
struct KeptGradient {
  Kept<T, UNIT> dy, x;

  __device__ __forceinline__ KeptGradient(const Pass& pass, int32_t share, int32_t of)
      : dy(pass, 2 * share, 2 * of), x(pass, 2 * share + 1, 2 * of) {}
  __device__ __forceinline__ auto keeping(const BackwardParams& p) const {
    using Source = typename Kept<T, UNIT>::Keeping;
    return GradientSource<Source, Source>{dy.keeping(p.dy, p.shape), x.keeping(p.x, p.shape)};
  }
  __device__ __forceinline__ auto giving() const {
    using Source = typename Kept<T, UNIT>::Giving;
    return GradientSource<Source, Source>{dy.giving(), x.giving()};
  }
};

template <class T, Gate GATE>
__global__ void __launch_bounds__(kMaxThreads, kWholeBlocksPerSM<T>)
    resident_backward_planar_kernel(const BNEXT_GRID_CONSTANT BackwardParams p, const BNEXT_GRID_CONSTANT Pass pass,
                                    const Scratch) {
  using A = acc_t<T>;
  constexpr int UNIT = kUnit<T, GATE == Gate::mask>;
  const Share share = cluster_share(pass);
  const KeptGradient<T, UNIT> kept(pass, 0, 1);

  const Sums<A> mine = block_sums<T, UNIT, true>(p, pass, share, kept.keeping(p), GATE);
  const Sums<A> whole = merge_cluster(mine, pass);
  if (share.split == 0 && threadIdx.x == 0) finish_sums(p, share.tile, whole);

  const A sum_dy[1] = {whole.dy}, sum_dy_xmu[1] = {whole.dy_xmu};
  ChannelGradient<A> channel[1];
  make_gradient(channel, p, Channels<1>(share.tile), sum_dy, sum_dy_xmu);
  backward_input_share<T, UNIT>(p, pass, share, kept.giving(), GATE, channel[0]);
  leave_cluster(pass);
}

template <class T, Gate GATE>
__global__ void __launch_bounds__(kMaxThreads, kWholeBlocksPerSM<T>)
    resident_backward_planes_kernel(const BNEXT_GRID_CONSTANT BackwardParams p, const BNEXT_GRID_CONSTANT Pass pass,
                                    const Scratch) {
  using A = acc_t<T>;
  constexpr int UNIT = kUnit<T, GATE == Gate::mask>;
  const Share share = cluster_share(pass);
  const int64_t first = share.tile * pass.tile_channels;

  __shared__ Sums<A> sums[kMaxTileChannels];
  auto take = [&](int32_t part, const Share& mine, const ColumnPlace<UNIT>& place, Sums<A>(&state)[UNIT]) {
    const KeptGradient<T, UNIT> kept(pass, part, pass.parts);
    block_column_sums<T, UNIT>(state, p, pass, mine, place, kept.keeping(p), GATE);
  };
  merge_planes<Sums<A>, UNIT>(pass, p.shape, share, take, [&](int channel, const Sums<A>& whole) {
    sums[channel] = whole;
    if (share.split == 0) finish_sums(p, first + channel, whole);
  });

  for_parts<UNIT>(pass, share, [&](int32_t part, const Share& mine, const ColumnPlace<UNIT>& place) {
    const Channels<UNIT> channels(pass, p.shape, place.col);
    A sum_dy[UNIT], sum_dy_xmu[UNIT];
#pragma unroll
    for (int e = 0; e < UNIT; ++e) {
      sum_dy[e] = sums[channels.at[e] - first].dy;
      sum_dy_xmu[e] = sums[channels.at[e] - first].dy_xmu;
    }
    ChannelGradient<A> channel[UNIT];
    make_gradient(channel, p, channels, sum_dy, sum_dy_xmu);
    const KeptGradient<T, UNIT> kept(pass, part, pass.parts);
    backward_input_tile<T, UNIT, false>(p, pass, mine, place, kept.giving(), GATE, channel);
  });
  leave_cluster(pass);
}

template <class T, Gate GATE>
__global__ void __launch_bounds__(kMaxThreads, kWholeBlocksPerSM<T>)
    resident_backward_interleaved_kernel(const BNEXT_GRID_CONSTANT BackwardParams p,
                                         const BNEXT_GRID_CONSTANT Pass pass, const Scratch scratch) {
  using A = acc_t<T>;
  constexpr int UNIT = kUnit<T, GATE == Gate::mask>;
  for_tiles(
      pass,
      [&](const Share& share, int32_t stage) {
        const ColumnPlace<UNIT> place(pass, share);
        Sums<A> state[UNIT];
        const KeptGradient<T, UNIT> kept(pass, stage, pass.stages);
        block_column_sums<T, UNIT>(state, p, pass, share, place, kept.keeping(p), GATE);
        merge_tile(state, place, p.shape.c, pass, scratch, share,
                   [&](int64_t channel, const Sums<A>& whole) { finish_sums(p, channel, whole); });
      },
      [&](const Share& share, int32_t stage) {
        turnstile_of(pass, scratch, share).pass();
        const KeptGradient<T, UNIT> kept(pass, stage, pass.stages);
        const ColumnPlace<UNIT> place(pass, share);
        if (!place.active) return;
        ChannelGradient<A> channel[UNIT];
        load_gradient(channel, p, Channels<UNIT>(pass, p.shape, place.col));
        backward_input_tile<T, UNIT, false>(p, pass, share, place, kept.giving(), GATE, channel);
      });
}

}  // namespace

cudaError_t launch_resident_backward(const BackwardParams& p, const Plan& plan, const Scratch& scratch,
                                     cudaStream_t stream) {
  const Pass& pass = plan.resident;
  return with_dtype_and_gate(p, [&](auto element, auto gate) {
    using T = decltype(element);
    auto kernel = !pass.columns    ? resident_backward_planar_kernel<T, gate.value>
                  : pass.clustered ? resident_backward_planes_kernel<T, gate.value>
                                   : resident_backward_interleaved_kernel<T, gate.value>;
    return launch_pass(kernel, pass, stream, p, pass, scratch);
  });
}

}  // namespace bnext::cuda
