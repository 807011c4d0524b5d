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

// Of every N columns those from FIRST on, COUNT of them, make a part. How many of the part lie before column `end`.
template <int N, int FIRST, int COUNT>
__device__ __forceinline__ int columns_of_part(int end) {
  return end / N * COUNT + min(max(end % N - FIRST, 0), COUNT);
}

// Adds what the block's threads hold of columns [begin, past) of a pack to `total`, for one of `sharers` threads that
// belong to the channel of these columns: of the part of all columns that is in `slots`, [row][column of the part].
template <int N, int FIRST, int COUNT, class State>
__device__ __forceinline__ void add_part(State& total, const State* slots, const Partition& partition, int begin,
                                         int past, int sharer, int sharers) {
  const int lowest = columns_of_part<N, FIRST, COUNT>(begin);
  const int columns = columns_of_part<N, FIRST, COUNT>(past) - lowest;
  if (columns <= 0) return;
  const int width = partition.columns.tile_vecs * COUNT, states = columns * partition.columns.thread_rows;
  // In a fixed order: the bits of a channel's state do not depend on who comes first.
#pragma unroll 1
  for (int i = sharer; i < states; i += sharers) {
    const int row = i / columns;
    total.merge(slots[row * width + lowest + (i - row * columns)]);
  }
}

// The states of the channels of a cluster's tile. reduce(pack, WorkTile, ColumnPlace, state) gives those of a thread's
// columns of a pack; finish(k, state) gets that of the tile's channel k, in one thread of each block,
// and what it leaves in shared memory is there for all threads. The caller goes on to leave_cluster().
//
// The states of all threads, in two parts as they do not fit otherwise, are shared out among as many threads to a
// channel as there are. So nobody merges more than a few, and columns need no merge of their own.
template <class State, int N, class Reduce, class Finish>
__device__ __forceinline__ void merge_packed(const Partition& partition, const Shape& shape, const WorkTile& work,
                                             Reduce&& reduce, Finish&& finish) {
  // Channels are a power of two. So are, in a warp, the threads to each of them.
  const int channels = partition.columns.tile_channels, sharers = blockDim.x / channels;
  const int sharer = threadIdx.x / channels, channel = threadIdx.x - sharer * channels;
  State* slots = merge_memory<N, State>();
  State total[1] = {};
#pragma unroll 1
  for (int32_t pack = 0; pack < partition.columns.packs; ++pack) {
    const WorkTile mine = pack_of(partition, work, pack);
    const ColumnPlace<N> place(partition, mine);
    State state[N];
    reduce(pack, mine, place, state);
    const int width = partition.columns.tile_vecs * N, plane = static_cast<int>(shape.s), origin = pack * width;
    const int begin = max(plane * channel, origin) - origin, past = min(plane * (channel + 1), origin + width) - origin;
    const auto share_part = [&](auto part) {
      constexpr int kCount = N / 2, kFirst = decltype(part)::value * kCount;
      __syncthreads();  // nobody reads the part before
      if (place.active) {
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          slots[(place.row * partition.columns.tile_vecs + place.vec_col) * kCount + e] = state[kFirst + e];
        }
      }
      __syncthreads();
      if (begin < past) add_part<N, kFirst, kCount>(total[0], slots, partition, begin, past, sharer, sharers);
    };
    share_part(std::integral_constant<int, 0>());
    share_part(std::integral_constant<int, 1>());
  }

  __shared__ State block[kMaxTileChannels];
  const unsigned ranks = static_cast<unsigned>(partition.splits);
  merge_rows(total, channels, slots, [&](int k, const State& whole) {
    block[k] = whole;
    if (ranks == 1) finish(k, whole);
  });
  if (ranks > 1) {
    // Every block merges all ranks by itself, from rank 0 on: the same bits everywhere, and no second exchange.
    cluster_sync();
    if (threadIdx.x < channels) {
      State whole = {};
#pragma unroll 1
      for (unsigned rank = 0; rank < ranks; ++rank) whole.merge(*map_shared(&block[threadIdx.x], rank));
      finish(threadIdx.x, whole);
    }
  }
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
