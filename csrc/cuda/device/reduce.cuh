// Reductions, in a fixed order and without float atomics: over the threads of a block, then over the
// blocks that share a tile. A State has merge(const State&) and is empty when zero-initialised.
#pragma once

#include "../launch.h"
#include "barrier.cuh"
#include "tile_iterator.cuh"

namespace bnext::cuda {

// Where the threads of a block put states for each other: shared memory that all reductions of a kernel use in turn.
template <int WIDTH, class State>
__device__ __forceinline__ State* state_slots() {
  static_assert(sizeof(State) * WIDTH * kStateSlots <= 48 * 1024, "static shared memory");
  __shared__ State slots[WIDTH * kStateSlots];
  return slots;
}

// Threads are arranged as `rows` x `cols` (thread = row * cols + col; threads past that contribute nothing but must
// call, for the barriers). Leaves the merge of each column's states in row 0. A tree: at each level the upper half of
// the rows hands its states to the lower half, so that the order depends on the number of rows alone.
template <int WIDTH, class State>
__device__ __forceinline__ void reduce_rows(State (&state)[WIDTH], int col, int row, int cols, int rows) {
  State* slots = state_slots<WIDTH, State>();
  int half = 1;
#pragma unroll 1
  while (2 * half < rows) half *= 2;
#pragma unroll 1
  for (; half >= 1 && rows > 1; half /= 2) {
    const int slot = (row - half) * cols + col;
    if (row >= half && row < 2 * half && row < rows) {
#pragma unroll
      for (int e = 0; e < WIDTH; ++e) slots[e * kStateSlots + slot] = state[e];
    }
    __syncthreads();
    if (row < half && row + half < rows) {
#pragma unroll
      for (int e = 0; e < WIDTH; ++e) state[e].merge(slots[e * kStateSlots + row * cols + col]);
    }
    __syncthreads();
  }
}

// The merge of states [BEGIN, BEGIN + N) of an array, in halves.
template <int N, int BEGIN = 0, class State, int COUNT>
__device__ __forceinline__ State merge_halves(const State (&states)[COUNT]) {
  if constexpr (N == 1) {
    return states[BEGIN];
  } else {
    State low = merge_halves<N / 2, BEGIN>(states);
    low.merge(merge_halves<N / 2, BEGIN + N / 2>(states));
    return low;
  }
}

// The merge of `count` states, `stride` apart: many loads in flight at a time, since a load takes longer than a merge.
template <class State>
__device__ __forceinline__ State merge_strided(const State* first, int64_t stride, int count) {
  constexpr int kBatch = 128 / sizeof(State);  // bytes of registers
  State total = {};
#pragma unroll 1
  for (int i = 0; i < count; i += kBatch, first += kBatch * stride) {
    State batch[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) batch[k] = i + k < count ? first[k * stride] : State{};
    total.merge(merge_halves<kBatch>(batch));
  }
  return total;
}

// Partial results of a pass in memory: [tile][split][column of the tile]. WIDTH divides the columns of a tile.
template <int WIDTH, class State>
struct Partials {
  State* data;
  int64_t width;
  int64_t splits;

  __device__ __forceinline__ Partials(const Partition& partition, const Scratch& scratch)
      : data(static_cast<State*>(scratch.partials)), width(partition.tile_width()), splits(partition.splits) {}

  __device__ __forceinline__ State& at(int64_t tile, int64_t split, int64_t column) const {
    return data[(tile * splits + split) * width + column];
  }

  // WIDTH columns from `col` on, which lie in the tile.
  __device__ __forceinline__ void put(const State (&state)[WIDTH], int64_t col, const WorkTile& work) const {
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) at(work.tile, work.split, col + e - work.tile * width) = state[e];
  }

  // Merges channels [first, past), as many at a time as the block has threads, each one's partial
  // results shared out among the rows of threads; then calls finish(channel, state) in one thread for
  // each. Channel c has columns c, c + channels, ..., `repeat` of them.
  template <class Finish>
  __device__ __forceinline__ void merge(int64_t first, int64_t past, int64_t channels, int repeat,
                                        Finish&& finish) const {
    const int cols = static_cast<int>(min(past - first, static_cast<int64_t>(blockDim.x)));
    const int rows = blockDim.x / cols;
    const int row = threadIdx.x / cols, col = threadIdx.x - row * cols;
    const int count = (static_cast<int>(splits) - row + rows - 1) / rows;
#pragma unroll 1
    for (int64_t base = first; base < past; base += cols) {
      const int64_t channel = base + col;
      State total[1] = {};
      if (row < rows && channel < past) {
#pragma unroll 1
        for (int r = 0; r < repeat; ++r) {
          // Columns have numbers of more than 32 bits, their vectors of 32.
          const int64_t column = channel + r * channels;
          const uint32_t tile = static_cast<uint32_t>(column / WIDTH) / static_cast<uint32_t>(width / WIDTH);
          total[0].merge(merge_strided(&at(tile, row, column - tile * width), rows * width, count));
        }
      }
      reduce_rows(total, col, row, cols, rows);
      if (row == 0 && channel < past) finish(channel, total[0]);
    }
  }
};

// Hands in the states of WIDTH columns of a tile, from `col` on, in the threads for which `holds`. The last of the
// blocks that share the channels, in which arrive() returns true, calls finish(channel, state) exactly once for each
// channel. Control flow is uniform within a block. Returns whether this block finished any.
template <int WIDTH, class State, class Arrive, class Finish>
__device__ __forceinline__ bool merge_blocks(const State (&state)[WIDTH], bool holds, int64_t col, int64_t channels,
                                             const Partition& partition, const Scratch& scratch, const WorkTile& work,
                                             Arrive&& arrive, Finish&& finish) {
  if (partition.splits == 1 && partition.repeat == 1) {
    // The tile's states are whole already; as many threads as it has channels finish them.
    State* whole = state_slots<WIDTH, State>();
    const int64_t width = partition.tile_width(), first = work.tile * width;
    if (holds) {
#pragma unroll
      for (int e = 0; e < WIDTH; ++e) whole[col - first + e] = state[e];
    }
    __syncthreads();
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < min(width, channels - first); i += blockDim.x) finish(first + i, whole[i]);
    __syncthreads();
    return true;
  }
  const Partials<WIDTH, State> partials(partition, scratch);
  if (holds) partials.put(state, col, work);
  if (!arrive()) return false;
  // The channels of the tile, or all of them where a channel's columns lie in several tiles.
  const bool by_tile = partition.repeat == 1;
  const int64_t first = by_tile ? work.tile * partials.width : 0;
  partials.merge(first, by_tile ? min(channels, first + partials.width) : channels, channels, partition.repeat, finish);
  return true;
}

// The same for blocks that need not be on the device together.
template <int WIDTH, class State, class Finish>
__device__ __forceinline__ void merge_blocks(const State (&state)[WIDTH], bool holds, int64_t col, int64_t channels,
                                             const Partition& partition, const Scratch& scratch, const WorkTile& work,
                                             Finish&& finish) {
  const bool by_tile = partition.repeat == 1;
  const auto blocks = static_cast<uint32_t>(by_tile ? partition.splits : partition.blocks());
  auto arrive = [&] { return arrive_last(&scratch.counters[by_tile ? work.tile : 0], blocks); };
  merge_blocks(state, holds, col, channels, partition, scratch, work, arrive, finish);
}

}  // namespace bnext::cuda
