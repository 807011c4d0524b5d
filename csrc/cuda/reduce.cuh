// Reductions, in a fixed order and without float atomics: over the threads of a block, then over the
// blocks that share a tile. A State has merge(const State&) and is empty when zero-initialised.
#pragma once

#include "dialect.h"
#include "launch.h"
#include "plan.h"

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

// Takes the states of a tile's columns, held by its row 0 (`col` is the first, WIDTH of them), and
// calls finish(channel, state) exactly once for each channel, in whichever thread and block has the
// whole of it. Uniform control flow within a block.
template <int WIDTH, class State, class Finish>
__device__ __forceinline__ void merge_blocks(const State (&state)[WIDTH], bool holds, int64_t col, int64_t channels,
                                             const Pass& pass, const Scratch& scratch, int64_t tile, int64_t split,
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

  // partials: [tile][split][column of the tile]
  State* partials = static_cast<State*>(scratch.partials);
  const int64_t width = pass.tile_width();
  if (holds) {
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) {
      partials[(tile * pass.splits + split) * width + (col + e - tile * width)] = state[e];
    }
  }
  const int64_t group = pass.groups() == 1 ? 0 : tile;
  const int64_t group_blocks = pass.groups() == 1 ? pass.blocks() : pass.splits;
  if (!arrive_last(&scratch.counters[group], static_cast<uint32_t>(group_blocks))) return;

  // The last block merges the group's channels, as many at a time as it has threads; each channel's
  // partial results are shared out among the rows of threads.
  const int64_t first = pass.groups() == 1 ? 0 : tile * width;
  const int64_t past = pass.groups() == 1 ? channels : min(channels, first + width);
  const int lanes = static_cast<int>(min(past - first, static_cast<int64_t>(blockDim.x)));
  const int rows = blockDim.x / lanes;
  const int row = threadIdx.x / lanes, lane = threadIdx.x - row * lanes;
  for (int64_t base = first; base < past; base += lanes) {
    const int64_t channel = base + lane;
    State total[1] = {};
    if (row < rows && channel < past) {
      for (int64_t i = row; i < pass.splits * pass.repeat; i += rows) {
        const int64_t from = i / pass.repeat, k = channel + (i - from * pass.repeat) * channels;
        const int64_t from_tile = k / width;
        total[0].merge(partials[(from_tile * pass.splits + from) * width + (k - from_tile * width)]);
      }
    }
    reduce_rows(total, lane, row, lanes, rows);
    if (row == 0 && channel < past) finish(channel, total[0]);
  }
}

}  // namespace bnext::cuda
