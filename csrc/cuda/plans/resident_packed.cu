// Plan `resident` of planar layouts whose planes are not whole vectors (7x7; 14x14 in 16 bits): packed planes.
//
// A cluster owns as many adjacent channels as together make whole vectors, as the columns of a matrix with a row to an
// image. A thread keeps to one vector of columns, in each of the tile's packs, and keeps a state for each column; then
// the states of a channel's columns are merged, in the block and across the cluster. The rest is as in
// resident_planar.cu: the inputs are read from memory once. 2e bytes an element forward, 3e backward.
#include "block.cuh"
#include "cluster.cuh"
#include "launch_plan.cuh"

namespace bnext::cuda {
namespace {

// Packed planes have up to so many channels to a tile: as many as a vector has elements.
constexpr int kMaxTileChannels = 8;

// One pack of the tile.
__device__ __forceinline__ WorkTile pack_of(const Partition& partition, const WorkTile& work, int32_t pack) {
  return WorkTile(work.tile * partition.columns.packs + pack, work.split);
}

// The states of the channels of a cluster's tile. reduce(pack, WorkTile, ColumnPlace, state) gives those of a pack's
// columns, in the threads of row 0; finish(k, state) gets that of the tile's channel k, in one thread of each block,
// and what it leaves in shared memory is there for all threads. The caller goes on to leave_cluster().
template <class State, int N, class Reduce, class Finish>
__device__ __forceinline__ void merge_packed(const Partition& partition, const Shape& shape, const WorkTile& work,
                                             Reduce&& reduce, Finish&& finish) {
  const int channels = partition.columns.tile_channels, rows = blockDim.x / channels;
  const int row = threadIdx.x / channels, channel = threadIdx.x - row * channels;
  State total[1] = {};
#pragma unroll 1
  for (int32_t pack = 0; pack < partition.columns.packs; ++pack) {
    const WorkTile mine = pack_of(partition, work, pack);
    const ColumnPlace<N> place(partition, mine);
    State state[N];
    reduce(pack, mine, place, state);
    State* columns = state_slots<N, State>();
    if (place.active && place.row == 0) {
#pragma unroll
      for (int e = 0; e < N; ++e) columns[place.vec_col * N + e] = state[e];
    }
    __syncthreads();
    // The channel's columns in this pack are shared out among as many threads as there are for a channel.
    // In a fixed order, thread by thread: the bits of a channel's state do not depend on who comes first.
    const int width = partition.columns.tile_vecs * N, plane = static_cast<int>(shape.s), origin = pack * width;
    if (row < rows) {
      const int past = min(plane * (channel + 1), origin + width);
#pragma unroll 1
      for (int i = max(plane * channel, origin) + row; i < past; i += rows) total[0].merge(columns[i - origin]);
    }
    __syncthreads();  // before the next pack's states take the place of these
  }
  reduce_rows(total, channel, row, channels, rows);

  __shared__ State block[kMaxTileChannels];
  if (row == 0) block[channel] = total[0];
  if (partition.splits > 1) {
    // Every block merges all ranks by itself, from rank 0 on: the same bits everywhere, and no second exchange.
    cluster_sync();
    if (row == 0) {
      total[0] = *map_shared(&block[channel], 0);
#pragma unroll 1
      for (unsigned rank = 1; rank < static_cast<unsigned>(partition.splits); ++rank) {
        total[0].merge(*map_shared(&block[channel], rank));
      }
    }
  }
  if (row == 0) finish(channel, total[0]);
  __syncthreads();
}

template <class Op>
__global__ void __launch_bounds__(kMaxThreads, resident_blocks_per_sm(sizeof(typename Op::T), Op::kGeneral, true))
    resident_packed_kernel(const BNEXT_GRID_CONSTANT typename Op::Params p,
                           const BNEXT_GRID_CONSTANT Partition partition, const Scratch scratch) {
  constexpr int N = Op::N;
  using State = typename Op::State;
  const WorkTile work = cluster_work_tile(partition);
  const int64_t first = work.tile * partition.columns.tile_channels;

  __shared__ typename Op::Summary summaries[kMaxTileChannels];
  merge_packed<State, N>(
      partition, p.shape, work,
      [&](int32_t pack, const WorkTile& mine, const ColumnPlace<N>& place, State(&state)[N]) {
        // Reducing fills shared memory on the way; the elementwise pass below finds there what it needs.
        const SharedTile<Op> shared_tile(partition, pack, partition.columns.packs);
        const Channels<N> channels(partition, p.shape, place.col);
        reduce_columns<Op>(state, p, partition, mine, place, channels, shared_tile.fill(p));
      },
      [&](int channel, const State& whole) {
        summaries[channel] = Op::summary(p, whole);
        if (work.split == 0) Op::finish(p, first + channel, whole);
      });

#pragma unroll 1
  for (int32_t pack = 0; pack < partition.columns.packs; ++pack) {
    const WorkTile mine = pack_of(partition, work, pack);
    const ColumnPlace<N> place(partition, mine);
    if (!place.active) continue;
    const Channels<N> channels(partition, p.shape, place.col);
    typename Op::Summary summary[N];
#pragma unroll
    for (int e = 0; e < N; ++e) summary[e] = summaries[channels.at[e] - first];
    typename Op::Coefficients coefficients[N];
    Op::coefficients(coefficients, p, channels, summary);
    const SharedTile<Op> shared_tile(partition, pack, partition.columns.packs);
    apply_columns<Op, false>(p, partition, mine, place, shared_tile.read(), coefficients);
  }
  Op::end(p, scratch, 0);
  leave_cluster(partition);
}

template <class Params>
cudaError_t launch_any(const Params& p, const Partition& partition, const Scratch& scratch, cudaStream_t stream) {
  return with_resident_op(p, [&](auto op) {
    return launch_partition(resident_packed_kernel<decltype(op)>, partition, stream, p, partition, scratch);
  });
}

}  // namespace

cudaError_t launch_resident_packed(const BatchNormForwardParams& p, const Partition& partition, const Scratch& scratch,
                                   cudaStream_t stream) {
  return launch_any(p, partition, scratch, stream);
}
cudaError_t launch_resident_packed(const BatchNormBackwardParams& p, const Partition& partition, const Scratch& scratch,
                                   cudaStream_t stream) {
  return launch_any(p, partition, scratch, stream);
}

}  // namespace bnext::cuda
