// Training forward, plan `resident`: x is read from memory once.
//
// Planar: a cluster of blocks owns a channel. A block loads its share in chunks, takes the statistics of
// each chunk from registers, and leaves the units in shared memory. The blocks of the cluster read each
// other's Welford states through distributed shared memory and merge them in rank order, every block for
// itself; then each normalizes what it kept. Blocks of at most half a multiprocessor's shared memory run
// in pairs, of which one loads while the other stores. Planes that are not whole units are read by the
// units that cover them, and written but for their ends in whole units.
//
// Interleaved: a tile of channels, 64 bytes wide, belongs to as many blocks as the device holds of them,
// each with a range of rows. They exchange through memory and meet at a counter, all being on the device
// together.
//
// Reads e bytes an element (2e with a residual), writes e (and 1/8 byte of mask): 2e, the floor.
#include "dispatch.h"
#include "normalize.cuh"
#include "resident.cuh"
#include "stats.cuh"

namespace bnext::cuda {
namespace {

template <class T, int UNIT, bool ALIGNED>
__global__ void __launch_bounds__(kMaxThreads, kWholeBlocksPerSM<T>)
    resident_forward_planar_kernel(const BNEXT_GRID_CONSTANT ForwardParams p, const BNEXT_GRID_CONSTANT Pass pass,
                                   const Scratch scratch, const Epilogue epilogue) {
  using A = acc_t<T>;
  const Share share = cluster_share(pass);
  const Kept<T, UNIT> kept = {reinterpret_cast<Unit<T, UNIT>*>(dynamic_shared())};

  const Welford<A> mine = block_stats<T, UNIT, ALIGNED>(pass, p.shape, share, kept.keeping(p.x, p.shape));
  const Welford<A> whole = merge_cluster(mine, pass);
  if (share.split == 0 && threadIdx.x == 0) finish_stats(p, share.tile, whole);

  const auto affine = with_parameters(p, share.tile, whole.mean(), inverse_std(whole.var, p.eps));
  normalize_share<T, UNIT, ALIGNED>(p, pass, share, kept.giving(), epilogue, affine);
  count_batch(p, scratch, 0);
  leave_cluster(pass);
}

template <class T, int UNIT>
__global__ void __launch_bounds__(kMaxThreads, kWholeBlocksPerSM<T>)
    resident_forward_interleaved_kernel(const BNEXT_GRID_CONSTANT ForwardParams p, const BNEXT_GRID_CONSTANT Pass pass,
                                        const Scratch scratch, const Epilogue epilogue) {
  using A = acc_t<T>;
  const Share share(pass);
  const ColumnPlace<UNIT> place(pass, share);
  const Kept<T, UNIT> kept = {reinterpret_cast<Unit<T, UNIT>*>(dynamic_shared())};

  Welford<A> state[UNIT];
  block_column_stats<T, UNIT>(state, pass, p.shape, share, place, kept.keeping(p.x, p.shape));
  __shared__ Welford<A> whole[kResidentWidth<T, UNIT>];
  merge_tile(state, place, p.shape.c, pass, scratch, share, whole);

  Affine<A> affine[UNIT] = {};
  if (place.active) {
#pragma unroll
    for (int e = 0; e < UNIT; ++e) {
      const Welford<A>& channel = whole[place.lane * UNIT + e];
      if (share.split == 0 && place.row == 0) finish_stats(p, place.col + e, channel);
      affine[e] = with_parameters(p, place.col + e, channel.mean(), inverse_std(channel.var, p.eps));
    }
  }
  normalize_tile<T, UNIT, false>(p, pass, share, place, kept.giving(), epilogue, affine);
  count_batch(p, scratch, pass.splits > 1 ? pass.tiles : 0);
}

}  // namespace

cudaError_t launch_resident_forward(const ForwardParams& p, const Plan& plan, const Scratch& scratch,
                                    cudaStream_t stream) {
  const Pass& pass = plan.whole;
  return with_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kPlain = kUnit<T, false>, kMasked = kUnit<T, true>;
    if (pass.columns) {
      auto kernel = pass.unit == kPlain ? resident_forward_interleaved_kernel<T, kPlain>
                                        : resident_forward_interleaved_kernel<T, kMasked>;
      return launch_pass(kernel, pass, stream, p, pass, scratch, epilogue_of(p));
    }
    auto kernel = !pass.aligned         ? resident_forward_planar_kernel<T, kPlain, false>
                  : pass.unit == kPlain ? resident_forward_planar_kernel<T, kPlain, true>
                                        : resident_forward_planar_kernel<T, kMasked, true>;
    return launch_pass(kernel, pass, stream, p, pass, scratch, epilogue_of(p));
  });
}

}  // namespace bnext::cuda
