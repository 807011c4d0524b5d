// Training forward, plan `resident`: x is read from memory once.
//
// Planar: a cluster of blocks owns a channel. A block loads its share in chunks, takes the statistics of
// each chunk from registers, and leaves the vectors in shared memory. The blocks of the cluster read each
// other's Welford states through distributed shared memory and merge them in rank order, every block for
// itself; then each normalizes what it kept. Blocks of at most half a multiprocessor's shared memory run
// in pairs, of which one loads while the other stores.
//
// Planes that are not whole vectors (7x7; 14x14 in 16 bits) are taken side by side: a cluster owns as many channels
// as make whole vectors, as columns of a matrix with a row to an image. A thread keeps to a vector of columns.
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
    resident_forward_planar_kernel(const BNEXT_GRID_CONSTANT ForwardParams p,
                                   const BNEXT_GRID_CONSTANT Partition partition, const Scratch scratch) {
  using A = acc_t<T>;
  constexpr int N = kVec<T, masks(EPILOGUE)>;
  const WorkTile work = cluster_work_tile(partition);
  const SharedTile<T, N> shared_tile(partition, 0, 1);

  const Welford<A> mine = block_stats<T, N, true>(partition, p.shape, work, shared_tile.stash(p.x, p.shape));
  const Welford<A> whole = merge_cluster(mine, partition);
  if (work.split == 0 && threadIdx.x == 0) finish_stats(p, work.tile, whole);

  const A mean[1] = {whole.mean()}, invstd[1] = {inverse_std(whole.var, p.eps)};
  Affine<A> affine[1];
  make_affine(affine, p, Channels<1>(work.tile), mean, invstd);
  normalize_strip<T, N>(p, partition, work, shared_tile.replay(), EPILOGUE, affine[0]);
  increment_batches_tracked_after_all(p, scratch, 0);
  leave_cluster(partition);
}

template <class T, Epilogue EPILOGUE>
__global__ void __launch_bounds__(kMaxThreads, kWholeBlocksPerSM<T>)
    resident_forward_packed_kernel(const BNEXT_GRID_CONSTANT ForwardParams p,
                                   const BNEXT_GRID_CONSTANT Partition partition, const Scratch scratch) {
  using A = acc_t<T>;
  constexpr int N = kVec<T, masks(EPILOGUE)>;
  const WorkTile work = cluster_work_tile(partition);
  const int64_t first = work.tile * partition.tile_channels;
  __shared__ A means[kMaxTileChannels], invstds[kMaxTileChannels];
  auto take = [&](int32_t pack, const WorkTile& mine, const ColumnPlace<N>& place, Welford<A>(&state)[N]) {
    const SharedTile<T, N> shared_tile(partition, pack, partition.packs);
    block_column_stats<T, N>(state, partition, p.shape, mine, place, shared_tile.stash(p.x, p.shape));
  };
  merge_packed<Welford<A>, N>(partition, p.shape, work, take, [&](int channel, const Welford<A>& whole) {
    means[channel] = whole.mean();
    invstds[channel] = inverse_std(whole.var, p.eps);
    if (work.split == 0) finish_stats(p, first + channel, whole);
  });

  for_packs<N>(partition, work, [&](int32_t pack, const WorkTile& mine, const ColumnPlace<N>& place) {
    const Channels<N> channels(partition, p.shape, place.col);
    A mean[N], invstd[N];
#pragma unroll
    for (int e = 0; e < N; ++e) {
      mean[e] = means[channels.at[e] - first];
      invstd[e] = invstds[channels.at[e] - first];
    }
    Affine<A> affine[N];
    make_affine(affine, p, channels, mean, invstd);
    const SharedTile<T, N> shared_tile(partition, pack, partition.packs);
    normalize_tile<T, N, false>(p, partition, mine, place, shared_tile.replay(), EPILOGUE, affine);
  });
  increment_batches_tracked_after_all(p, scratch, 0);
  leave_cluster(partition);
}

template <class T, Epilogue EPILOGUE>
__global__ void __launch_bounds__(kMaxThreads, kWholeBlocksPerSM<T>)
    resident_forward_interleaved_kernel(const BNEXT_GRID_CONSTANT ForwardParams p,
                                        const BNEXT_GRID_CONSTANT Partition partition, const Scratch scratch) {
  using A = acc_t<T>;
  constexpr int N = kVec<T, masks(EPILOGUE)>;
  pipeline_tiles(
      partition,
      [&](const WorkTile& work, int32_t buffer) {
        const ColumnPlace<N> place(partition, work);
        Welford<A> state[N];
        const SharedTile<T, N> shared_tile(partition, buffer, partition.buffers);
        block_column_stats<T, N>(state, partition, p.shape, work, place, shared_tile.stash(p.x, p.shape));
        merge_tile(state, place, p.shape.c, partition, scratch, work,
                   [&](int64_t channel, const Welford<A>& whole) { finish_stats(p, channel, whole); });
      },
      [&](const WorkTile& work, int32_t buffer) {
        split_barrier_of(partition, scratch, work).wait();
        const ColumnPlace<N> place(partition, work);
        if (!place.active) return;
        Affine<A> affine[N];
        load_affine(affine, p, Channels<N>(partition, p.shape, place.col), false, false);
        const SharedTile<T, N> shared_tile(partition, buffer, partition.buffers);
        normalize_tile<T, N, false>(p, partition, work, place, shared_tile.replay(), EPILOGUE, affine);
      });
  increment_batches_tracked_after_all(p, scratch, partition.splits > 1 ? partition.tiles : 0);
}

}  // namespace

// For query_device. The kernels of one type speak for all: with that much shared memory to each block, it is a
// multiprocessor that a block takes.
cudaError_t count_large_clusters(int64_t shared_per_block, int32_t* count) {
  constexpr int64_t kStatic = 4 * 1024;
  const auto kernel = resident_forward_planar_kernel<float, Epilogue::none>;
  const auto shared = static_cast<size_t>(shared_per_block - kStatic);
  cudaError_t error = allow_kernel_resources(reinterpret_cast<const void*>(kernel), shared, kLargeCluster);
  if (error != cudaSuccess) return error;
  return count_clusters(kernel, kMaxThreads, kLargeCluster, shared, count);
}

cudaError_t launch_resident_forward(const ForwardParams& p, const Plan& plan, const Scratch& scratch,
                                    cudaStream_t stream) {
  const Partition& partition = plan.resident;
  return with_dtype_and_epilogue(p, [&](auto element, auto epilogue) {
    using T = decltype(element);
    auto kernel = !partition.columns    ? resident_forward_planar_kernel<T, epilogue.value>
                  : partition.clustered ? resident_forward_packed_kernel<T, epilogue.value>
                                        : resident_forward_interleaved_kernel<T, epilogue.value>;
    return launch_pass(kernel, partition, stream, p, partition, scratch);
  });
}

}  // namespace bnext::cuda
