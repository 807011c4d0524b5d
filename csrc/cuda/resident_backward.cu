// Backward, plan `resident`: x and dy are read from memory once.
//
// Decomposition: that of resident_forward.cu, with vectors of dy and of x in shared memory, and two sums
// in place of the Welford state. The mask, 1/8 byte an element, is read a second time from the L2 cache.
// Reads 2e bytes an element (and 1/8 byte of mask), writes e, and e for dresidual: 3e, the floor.
#include "backward_input.cuh"
#include "backward_reduce.cuh"
#include "dispatch.h"
#include "resident.cuh"

namespace bnext::cuda {
namespace {

// Where a block keeps one of its `of` shares of dy and of x.
template <class T, int N>
struct SharedGradientTile {
  SharedTile<T, N> dy, x;

  __device__ __forceinline__ SharedGradientTile(const Partition& partition, int32_t work, int32_t of)
      : dy(partition, 2 * work, 2 * of), x(partition, 2 * work + 1, 2 * of) {}
  __device__ __forceinline__ auto stash(const BackwardParams& p) const {
    using Source = typename SharedTile<T, N>::GlobalToShared;
    return GradientSource<Source, Source>{dy.stash(p.dy, p.shape), x.stash(p.x, p.shape)};
  }
  __device__ __forceinline__ auto replay() const {
    using Source = typename SharedTile<T, N>::FromShared;
    return GradientSource<Source, Source>{dy.replay(), x.replay()};
  }
};

template <class T, Gate GATE>
__global__ void __launch_bounds__(kMaxThreads, kWholeBlocksPerSM<T>)
    resident_backward_planar_kernel(const BNEXT_GRID_CONSTANT BackwardParams p,
                                    const BNEXT_GRID_CONSTANT Partition partition, const Scratch) {
  using A = acc_t<T>;
  constexpr int N = kVec<T, GATE == Gate::mask>;
  const WorkTile work = cluster_work_tile(partition);
  const SharedGradientTile<T, N> shared_tile(partition, 0, 1);

  const Sums<A> mine = block_sums<T, N, true>(p, partition, work, shared_tile.stash(p), GATE);
  const Sums<A> whole = merge_cluster(mine, partition);
  if (work.split == 0 && threadIdx.x == 0) finish_sums(p, work.tile, whole);

  const A sum_dy[1] = {whole.dy}, sum_dy_xmu[1] = {whole.dy_xmu};
  ChannelGradient<A> channel[1];
  make_gradient(channel, p, Channels<1>(work.tile), sum_dy, sum_dy_xmu);
  backward_input_strip<T, N>(p, partition, work, shared_tile.replay(), GATE, channel[0]);
  leave_cluster(partition);
}

template <class T, Gate GATE>
__global__ void __launch_bounds__(kMaxThreads, kWholeBlocksPerSM<T>)
    resident_backward_packed_kernel(const BNEXT_GRID_CONSTANT BackwardParams p,
                                    const BNEXT_GRID_CONSTANT Partition partition, const Scratch) {
  using A = acc_t<T>;
  constexpr int N = kVec<T, GATE == Gate::mask>;
  const WorkTile work = cluster_work_tile(partition);
  const int64_t first = work.tile * partition.tile_channels;

  __shared__ Sums<A> sums[kMaxTileChannels];
  auto take = [&](int32_t pack, const WorkTile& mine, const ColumnPlace<N>& place, Sums<A>(&state)[N]) {
    const SharedGradientTile<T, N> shared_tile(partition, pack, partition.packs);
    block_column_sums<T, N>(state, p, partition, mine, place, shared_tile.stash(p), GATE);
  };
  merge_packed<Sums<A>, N>(partition, p.shape, work, take, [&](int channel, const Sums<A>& whole) {
    sums[channel] = whole;
    if (work.split == 0) finish_sums(p, first + channel, whole);
  });

  for_packs<N>(partition, work, [&](int32_t pack, const WorkTile& mine, const ColumnPlace<N>& place) {
    const Channels<N> channels(partition, p.shape, place.col);
    A sum_dy[N], sum_dy_xmu[N];
#pragma unroll
    for (int e = 0; e < N; ++e) {
      sum_dy[e] = sums[channels.at[e] - first].dy;
      sum_dy_xmu[e] = sums[channels.at[e] - first].dy_xmu;
    }
    ChannelGradient<A> channel[N];
    make_gradient(channel, p, channels, sum_dy, sum_dy_xmu);
    const SharedGradientTile<T, N> shared_tile(partition, pack, partition.packs);
    backward_input_tile<T, N, false>(p, partition, mine, place, shared_tile.replay(), GATE, channel);
  });
  leave_cluster(partition);
}

template <class T, Gate GATE>
__global__ void __launch_bounds__(kMaxThreads, kWholeBlocksPerSM<T>)
    resident_backward_interleaved_kernel(const BNEXT_GRID_CONSTANT BackwardParams p,
                                         const BNEXT_GRID_CONSTANT Partition partition, const Scratch scratch) {
  using A = acc_t<T>;
  constexpr int N = kVec<T, GATE == Gate::mask>;
  pipeline_tiles(
      partition,
      [&](const WorkTile& work, int32_t buffer) {
        const ColumnPlace<N> place(partition, work);
        Sums<A> state[N];
        const SharedGradientTile<T, N> shared_tile(partition, buffer, partition.buffers);
        block_column_sums<T, N>(state, p, partition, work, place, shared_tile.stash(p), GATE);
        merge_tile(state, place, p.shape.c, partition, scratch, work,
                   [&](int64_t channel, const Sums<A>& whole) { finish_sums(p, channel, whole); });
      },
      [&](const WorkTile& work, int32_t buffer) {
        split_barrier_of(partition, scratch, work).wait();
        const SharedGradientTile<T, N> shared_tile(partition, buffer, partition.buffers);
        const ColumnPlace<N> place(partition, work);
        if (!place.active) return;
        ChannelGradient<A> channel[N];
        load_gradient(channel, p, Channels<N>(partition, p.shape, place.col));
        backward_input_tile<T, N, false>(p, partition, work, place, shared_tile.replay(), GATE, channel);
      });
}

}  // namespace

cudaError_t launch_resident_backward(const BackwardParams& p, const Plan& plan, const Scratch& scratch,
                                     cudaStream_t stream) {
  const Partition& partition = plan.resident;
  return with_dtype_and_gate(p, [&](auto element, auto gate) {
    using T = decltype(element);
    auto kernel = !partition.columns    ? resident_backward_planar_kernel<T, gate.value>
                  : partition.clustered ? resident_backward_packed_kernel<T, gate.value>
                                        : resident_backward_interleaved_kernel<T, gate.value>;
    return launch_pass(kernel, partition, stream, p, partition, scratch);
  });
}

}  // namespace bnext::cuda
