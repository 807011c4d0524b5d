// Reductions, in a fixed order and without float atomics: over the threads of a block, then over the
// blocks that share a tile. A State has merge(const State&) and is empty when zero-initialised.
#pragma once

#include "dialect.h"
#include "launch.h"
#include "plan.h"
#include "walk.cuh"

namespace bnext::cuda {

// Threads are arranged as `rows` x `lanes` (thread = row * lanes + lane; threads past that have no
// part in it but must call, for the barriers). Leaves in row 0 the merge of each lane's states.
template <int WIDTH, class State>
__device__ __forceinline__ void reduce_rows(State (&state)[WIDTH], int lane, int row, int lanes, int rows) {
  constexpr int kSlots = kMaxThreads / 2;
  static_assert(sizeof(State) * WIDTH * kSlots <= 48 * 1024, "static shared memory");
  __shared__ State slots[WIDTH * kSlots];
  int half = 1;
  while (2 * half < rows) half *= 2;
  for (; half >= 1 && rows > 1; half /= 2) {
    const int slot = (row - half) * lanes + lane;
    if (row >= half && row < 2 * half && row < rows) {
#pragma unroll
      for (int e = 0; e < WIDTH; ++e) slots[e * kSlots + slot] = state[e];
    }
    __syncthreads();
    if (row < half && row + half < rows) {
#pragma unroll
      for (int e = 0; e < WIDTH; ++e) state[e].merge(slots[e * kSlots + row * lanes + lane]);
    }
    __syncthreads();
  }
}

// True in the last of `blocks` blocks to call it; what the others wrote before is then visible. The
// counter wraps around to 0 by itself.
__device__ __forceinline__ bool arrive_last(uint32_t* counter, uint32_t blocks) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(counter, blocks - 1) == blocks - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// The same for blocks that are all on the device together: every block returns, once all have come.
// Only one use of a counter in a launch: it is back at 0 by then, and that is what the blocks wait for.
__device__ __forceinline__ void meet(uint32_t* counter, uint32_t blocks) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    if (atomicInc(counter, blocks - 1) != blocks - 1) {
      while (*static_cast<volatile uint32_t*>(counter) != 0) __nanosleep(32);
    }
    __threadfence();
  }
  __syncthreads();
}

// The merge of `count` states, `stride` apart: several loads at a time, since each takes longer than a merge.
template <class State>
__device__ __forceinline__ State merge_strided(const State* first, int64_t stride, int count) {
  constexpr int kBatch = sizeof(State) > 16 ? 2 : 8;
  State total = {};
  for (int i = 0; i < count; i += kBatch, first += kBatch * stride) {
    State batch[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) batch[k] = i + k < count ? first[k * stride] : State{};
#pragma unroll
    for (int half = kBatch / 2; half >= 1; half /= 2) {
#pragma unroll
      for (int k = 0; k < half; ++k) batch[k].merge(batch[k + half]);
    }
    total.merge(batch[0]);
  }
  return total;
}

// Partial results of a pass in memory: [tile][split][column of the tile].
template <class State>
struct Partials {
  State* data;
  int64_t width;
  int64_t splits;

  __device__ __forceinline__ Partials(const Pass& pass, const Scratch& scratch)
      : data(static_cast<State*>(scratch.partials)), width(pass.tile_width()), splits(pass.splits) {}

  __device__ __forceinline__ State& at(int64_t tile, int64_t split, int64_t column) const {
    return data[(tile * splits + split) * width + column];
  }

  // WIDTH columns from `col` on, which lie in the tile.
  template <int WIDTH>
  __device__ __forceinline__ void put(const State (&state)[WIDTH], int64_t col, const Share& share) const {
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) at(share.tile, share.split, col + e - share.tile * width) = state[e];
  }

  // Merges channels [first, past), as many at a time as the block has threads, each one's partial
  // results shared out among the rows of threads; then calls finish(channel, state) in one thread for
  // each. Channel c has columns c, c + channels, ..., `repeat` of them.
  template <class Finish>
  __device__ __forceinline__ void merge(int64_t first, int64_t past, int64_t channels, int repeat,
                                        Finish&& finish) const {
    const int lanes = static_cast<int>(min(past - first, static_cast<int64_t>(blockDim.x)));
    const int rows = blockDim.x / lanes;
    const int row = threadIdx.x / lanes, lane = threadIdx.x - row * lanes;
    const int count = (static_cast<int>(splits) - row + rows - 1) / rows;
    for (int64_t base = first; base < past; base += lanes) {
      const int64_t channel = base + lane;
      State total[1] = {};
      if (row < rows && channel < past) {
        for (int r = 0; r < repeat; ++r) {
          const int64_t column = channel + r * channels, tile = column / width;
          total[0].merge(merge_strided(&at(tile, row, column - tile * width), rows * width, count));
        }
      }
      reduce_rows(total, lane, row, lanes, rows);
      if (row == 0 && channel < past) finish(channel, total[0]);
    }
  }
};

// Takes the states of WIDTH columns of a tile, from `col` on, of the threads that hold them, and calls
// finish(channel, state) exactly once for each channel, in whichever thread and block has the whole of
// it. Uniform control flow within a block.
template <int WIDTH, class State, class Finish>
__device__ __forceinline__ void merge_blocks(const State (&state)[WIDTH], bool holds, int64_t col, int64_t channels,
                                             const Pass& pass, const Scratch& scratch, const Share& share,
                                             Finish&& finish) {
  if (pass.splits == 1 && pass.repeat == 1) {
    if (holds) {
#pragma unroll
      for (int e = 0; e < WIDTH; ++e) {
        if (col + e < channels) finish(col + e, state[e]);
      }
    }
    return;
  }
  const Partials<State> partials(pass, scratch);
  if (holds) partials.put(state, col, share);

  // The last block merges: the channels of its tile, or all of them where a channel's columns lie in
  // several tiles.
  const bool by_tile = pass.repeat == 1;
  const int64_t blocks = by_tile ? pass.splits : pass.blocks();
  if (!arrive_last(&scratch.counters[by_tile ? share.tile : 0], static_cast<uint32_t>(blocks))) return;
  const int64_t first = by_tile ? share.tile * partials.width : 0;
  partials.merge(first, by_tile ? min(channels, first + partials.width) : channels, channels, pass.repeat, finish);
}

}  // namespace bnext::cuda
