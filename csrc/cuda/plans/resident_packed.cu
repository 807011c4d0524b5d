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

// What N columns of a tile, from `col` on, have of what each of its channels has.
template <int N, class C>
__device__ __forceinline__ void of_columns(C (&out)[N], const C* channels, const Shape& shape, int64_t col) {
  if constexpr (!std::is_empty_v<C>) {
    const int plane = static_cast<int>(shape.s);
    int channel = static_cast<int>(col) / plane, left = plane * (channel + 1) - static_cast<int>(col);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      out[e] = channels[channel];
      if (--left == 0) {
        ++channel;
        left = plane;
      }
    }
  }
}

// The states of the channels of a cluster's tile. reduce(pack, WorkTile, ColumnPlace) reduces a thread's columns of a
// pack; finish(k, state) gets the state of the tile's channel k, in thread k of each block, and what it leaves in
// shared memory is there for all threads. The caller goes on to leave_cluster().
//
// A vector's columns are of two channels at most, since planes are no shorter than that (planner/partitioning.cpp):
// each thread merges those of each, and leaves two states for those threads that share out what belongs to a channel.
template <class Op, class Reduce, class Finish>
__device__ __forceinline__ void merge_packed(const Partition& partition, const Shape& shape, const WorkTile& work,
                                             void* memory, Reduce&& reduce, Finish&& finish) {
  constexpr int N = Op::N;
  using State = typename Op::State;
  const auto& columns = partition.columns;
  const int channels = columns.tile_channels, plane = static_cast<int>(shape.s);
  // Threads that merge for a channel side by side: thread t is for channel t % channels.
  const int threads_per_channel = blockDim.x / channels, rank = threadIdx.x / channels;
  const int channel = threadIdx.x - rank * channels;
  State* const slots = static_cast<State*>(memory);
  State total = {};
#pragma unroll 1
  for (int32_t pack = 0; pack < columns.packs; ++pack) {
    const WorkTile mine = pack_of(partition, work, pack);
    const ColumnPlace<N> place(partition, mine);
    const auto reducer = reduce(pack, mine, place);
    // Columns count from the tile's first. So many of the vector's are of its first channel.
    const int origin = pack * columns.tile_vecs, col = (origin + place.vec_col) * N;
    const int of_first = min(plane - col % plane, N);
    __syncthreads();  // nobody reads what was there before
    if (place.active) {
      slots[threadIdx.x] = reducer.over(0, of_first);
      if (of_first < N) slots[kMaxThreads + threadIdx.x] = reducer.over(of_first, N);
    }
    __syncthreads();
    // The vectors of the pack that have columns of the channel, in all rows.
    const int begin = channel * plane, first = max(begin / N, origin);
    const int vecs = min((begin + plane + N - 1) / N, origin + columns.tile_vecs) - first;
#pragma unroll 1
    for (int i = rank; i < vecs * columns.thread_rows; i += threads_per_channel) {
      const int row = i / vecs, vec = first + i - row * vecs;
      const int second = vec * N < begin ? kMaxThreads : 0;
      total.merge(slots[second + row * columns.row_threads + vec - origin]);
    }
  }

  // Where the other blocks of the cluster read what this one has of each channel.
  __shared__ State block[kMaxTileChannels];
  const unsigned ranks = static_cast<unsigned>(partition.splits);
  merge_states(total, channels, memory, [&](int k, const State& whole) {
    block[k] = whole;
    if (ranks == 1) finish(k, whole);
  });
  if (ranks > 1) {
    // Every block merges all ranks by itself, from rank 0 on: the same bits everywhere, and no second exchange.
    cluster_sync();
    if (threadIdx.x < channels) {
      finish(threadIdx.x, merge_ranks(&block[threadIdx.x], ranks));
    }
  }
  __syncthreads();
}

template <class Op>
__global__ void __launch_bounds__(kMaxThreads, resident_blocks_per_sm(sizeof(typename Op::T), Op::kGeneral, true))
    resident_packed_kernel(const BNEXT_GRID_CONSTANT typename Op::Params p,
                           const BNEXT_GRID_CONSTANT Partition partition, const Scratch scratch) {
  // Of two inputs. Of one, they gained less on an H100 than they lost.
  constexpr bool kCopies = kHasAsyncCopies && Op::kInputs > 1 && !Op::kReducesExtras;
  constexpr int N = Op::N, kChunk = resident_chunk<Op, true, kCopies>();
  using State = typename Op::State;
  const WorkTile work = cluster_work_tile(partition);
  stagger_start(partition, work);
  // The tile's first channel, computed where it is needed: registers are few.
  const auto first = [&] { return work.tile * partition.columns.tile_channels; };

  // One thread for each of the tile's channels.
  __shared__ typename Op::Centre shared_centres[kMaxTileChannels];
  __shared__ typename Op::Coefficients shared_coefficients[kMaxTileChannels];
  typename Op::ChannelParams params = {};
  typename Op::Operands operands = {};
  if (threadIdx.x < partition.columns.tile_channels) {
    params = Op::channel_params(p, first() + threadIdx.x);
    shared_centres[threadIdx.x] = Op::centre(params);
    if (work.split == 0) operands = Op::operands(p, first() + threadIdx.x);
  }
  if constexpr (!std::is_empty_v<typename Op::Centre>) __syncthreads();
  merge_packed<Op>(
      partition, p.shape, work, shared_memory<kPackedBytes<Op>>(),
      [&](int32_t pack, const WorkTile& mine, const ColumnPlace<N>& place) {
        const SharedTile<Op, kChunk> shared_tile(partition, pack, partition.columns.packs);
        const ColumnWalk<N> walk(partition, p.shape.numel(), mine, place);
        typename Op::Centre centres[N] = {};
        if (place.active) of_columns(centres, shared_centres, p.shape, place.col - first() * p.shape.s);
        const auto reducer = reduce_columns<Op, kChunk>(p, walk, shared_tile.template fill<kCopies>(p, walk), centres,
                                                        load_shift_row<Op>(p, partition, mine, place));
        prefetch_next<Op>(p, partition, work, [&](const WorkTile& tile) {
          const WorkTile next = pack_of(partition, tile, pack);
          return ColumnWalk<N>(partition, p.shape.numel(), next, ColumnPlace<N>(partition, next));
        });
        return reducer;
      },
      [&](int channel, const State& whole) {
        shared_coefficients[channel] = Op::coefficients(p, params, Op::summary(p, whole));
        if (work.split == 0) Op::finish(p, first() + channel, whole, operands);
      });

  // The second pass, from shared memory, by the same packs.
#pragma unroll 1
  for (int32_t pack = 0; pack < partition.columns.packs; ++pack) {
    const WorkTile mine = pack_of(partition, work, pack);
    const ColumnPlace<N> place(partition, mine);
    if (!place.active) continue;
    typename Op::Coefficients coefficients[N];
    of_columns(coefficients, shared_coefficients, p.shape, place.col - first() * p.shape.s);
    const SharedTile<Op, kChunk> shared_tile(partition, pack, partition.columns.packs);
    ColumnWalk<N> walk(partition, p.shape.numel(), mine, place);
    for_each_chunk<kChunk>(walk, elementwise_columns<Op>(p, shared_tile.replay(p), coefficients));
  }
  Op::at_kernel_end(p, scratch);
  leave_cluster(partition);
}

}  // namespace

template <class Params>
cudaError_t launch_resident_packed(const Params& p, const Partition& partition, const Scratch& scratch,
                                   cudaStream_t stream) {
  return with_resident_op(p, [&](auto op) {
    return launch_partition(resident_packed_kernel<decltype(op)>, partition, stream, p, partition, scratch);
  });
}

BNEXT_INSTANTIATE(launch_resident_packed, const Partition&, const Scratch&, cudaStream_t)

}  // namespace bnext::cuda
