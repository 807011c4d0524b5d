// Training forward, plan `resident`: x is read from memory once.
//
// Planar: a cluster of blocks owns a channel. A block loads its share in chunks, takes the statistics of
// each chunk from registers, and leaves the units in shared memory. The blocks of the cluster read each
// other's Welford states through distributed shared memory and merge them in rank order, every block for
// itself; then each normalizes what it kept. Blocks of at most half a multiprocessor's shared memory run
// in pairs, of which one loads while the other stores.
//
// Planes that are not whole units (7x7; 14x14 in 16 bits) are taken side by side: a cluster owns as many channels
// as make whole units, as columns of a matrix with a row to an image. A thread keeps to a unit of columns.
//
// Interleaved: a tile of channels, 64 bytes wide, belongs to a group of blocks, each with a range of rows, all on the
// device together. The last of them to have read its share merges the partial results, through memory, and
// writes mean and invstd; the others wait for that when they come to normalize the tile, and load the next one before.
//
// Reads e bytes an element (2e with a residual), writes e (and 1/8 byte of mask): 2e, the floor.
#include "dispatch.h"
#include "resident.cuh"
#include "stats.cuh"

namespace bnext::cuda {
namespace {

template <class T, Epilogue EPILOGUE>
__global__ void __launch_bounds__(kMaxThreads, kWholeBlocksPerSM<T>)
    resident_forward_planar_kernel(const BNEXT_GRID_CONSTANT ForwardParams p, const BNEXT_GRID_CONSTANT Pass pass,
                                   const Scratch scratch) {
  using A = acc_t<T>;
  constexpr int UNIT = kUnit<T, masks(EPILOGUE)>;
  const Share share = cluster_share(pass);
  const Kept<T, UNIT> kept(pass, 0, 1);

  const Welford<A> mine = block_stats<T, UNIT, true>(pass, p.shape, share, kept.keeping(p.x, p.shape));
  const Welford<A> whole = merge_cluster(mine, pass);
  if (share.split == 0 && threadIdx.x == 0) finish_stats(p, share.tile, whole);

  const A mean[1] = {whole.mean()}, invstd[1] = {inverse_std(whole.var, p.eps)};
  Affine<A> affine[1];
  make_affine(affine, p, Channels<1>(share.tile), mean, invstd);
  normalize_share<T, UNIT>(p, pass, share, kept.giving(), EPILOGUE, affine[0]);
  count_batch(p, scratch, 0);
  leave_cluster(pass);
}

template <class T, Epilogue EPILOGUE>
__global__ void __launch_bounds__(kMaxThreads, kWholeBlocksPerSM<T>)
    resident_forward_planes_kernel(const BNEXT_GRID_CONSTANT ForwardParams p, const BNEXT_GRID_CONSTANT Pass pass,
                                   const Scratch scratch) {
  using A = acc_t<T>;
  constexpr int UNIT = kUnit<T, masks(EPILOGUE)>;
  const Share share = cluster_share(pass);
  const int64_t first = share.tile * pass.tile_channels;
  __shared__ A means[kMaxTileChannels], invstds[kMaxTileChannels];
  auto take = [&](int32_t part, const Share& mine, const ColumnPlace<UNIT>& place, Welford<A>(&state)[UNIT]) {
    const Kept<T, UNIT> kept(pass, part, pass.parts);
    block_column_stats<T, UNIT>(state, pass, p.shape, mine, place, kept.keeping(p.x, p.shape));
  };
  merge_planes<Welford<A>, UNIT>(pass, p.shape, share, take, [&](int channel, const Welford<A>& whole) {
    means[channel] = whole.mean();
    invstds[channel] = inverse_std(whole.var, p.eps);
    if (share.split == 0) finish_stats(p, first + channel, whole);
  });

  for_parts<UNIT>(pass, share, [&](int32_t part, const Share& mine, const ColumnPlace<UNIT>& place) {
    const Channels<UNIT> channels(pass, p.shape, place.col);
    A mean[UNIT], invstd[UNIT];
#pragma unroll
    for (int e = 0; e < UNIT; ++e) {
      mean[e] = means[channels.at[e] - first];
      invstd[e] = invstds[channels.at[e] - first];
    }
    Affine<A> affine[UNIT];
    make_affine(affine, p, channels, mean, invstd);
    const Kept<T, UNIT> kept(pass, part, pass.parts);
    normalize_tile<T, UNIT, false>(p, pass, mine, place, kept.giving(), EPILOGUE, affine);
  });
  count_batch(p, scratch, 0);
  leave_cluster(pass);
}

template <class T, Epilogue EPILOGUE>
__global__ void __launch_bounds__(kMaxThreads, kWholeBlocksPerSM<T>)
    resident_forward_interleaved_kernel(const BNEXT_GRID_CONSTANT ForwardParams p, const BNEXT_GRID_CONSTANT Pass pass,
                                        const Scratch scratch) {
  using A = acc_t<T>;
  constexpr int UNIT = kUnit<T, masks(EPILOGUE)>;
  for_tiles(
      pass,
      [&](const Share& share, int32_t stage) {
        const ColumnPlace<UNIT> place(pass, share);
        Welford<A> state[UNIT];
        const Kept<T, UNIT> kept(pass, stage, pass.stages);
        block_column_stats<T, UNIT>(state, pass, p.shape, share, place, kept.keeping(p.x, p.shape));
        merge_tile(state, place, p.shape.c, pass, scratch, share,
                   [&](int64_t channel, const Welford<A>& whole) { finish_stats(p, channel, whole); });
      },
      [&](const Share& share, int32_t stage) {
        turnstile_of(pass, scratch, share).pass();
        const ColumnPlace<UNIT> place(pass, share);
        if (!place.active) return;
        Affine<A> affine[UNIT];
        load_affine(affine, p, Channels<UNIT>(pass, p.shape, place.col), false, false);
        const Kept<T, UNIT> kept(pass, stage, pass.stages);
        normalize_tile<T, UNIT, false>(p, pass, share, place, kept.giving(), EPILOGUE, affine);
      });
  count_batch(p, scratch, pass.splits > 1 ? pass.tiles : 0);
}

}  // namespace

// For query_device. The kernels of one type speak for all: with that much shared memory to each block, it is a
// multiprocessor that a block takes.
cudaError_t count_large_clusters(int64_t shared_per_block, int32_t* count) {
  constexpr int64_t kStatic = 4 * 1024;
  const auto kernel = resident_forward_planar_kernel<float, Epilogue::none>;
  const auto shared = static_cast<size_t>(shared_per_block - kStatic);
  cudaError_t error = prepare(reinterpret_cast<const void*>(kernel), shared, kLargeCluster);
  if (error != cudaSuccess) return error;
  return count_clusters(kernel, kMaxThreads, kLargeCluster, shared, count);
}

cudaError_t launch_resident_forward(const ForwardParams& p, const Plan& plan, const Scratch& scratch,
                                    cudaStream_t stream) {
  const Pass& pass = plan.resident;
  return with_dtype_and_epilogue(p, [&](auto element, auto epilogue) {
    using T = decltype(element);
    auto kernel = !pass.columns    ? resident_forward_planar_kernel<T, epilogue.value>
                  : pass.clustered ? resident_forward_planes_kernel<T, epilogue.value>
                                   : resident_forward_interleaved_kernel<T, epilogue.value>;
    return launch_pass(kernel, pass, stream, p, pass, scratch);
  });
}

}  // namespace bnext::cuda
