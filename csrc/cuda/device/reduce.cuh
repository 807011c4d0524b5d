// Reductions, in a fixed order and without float atomics: over the threads of a block, then over the
// blocks that share a tile. A State has merge(const State&) and is empty when zero-initialised.
#pragma once

#include <cstring>

#include "../launch.h"
#include "barrier.cuh"
#include "tile_iterator.cuh"

namespace bnext::cuda {

// Where a block's threads, of WIDTH columns each, leave states for each other: shared memory that all merges of a
// kernel use in turn.
template <int WIDTH, class State>
__device__ __forceinline__ State* merge_memory() {
  static_assert(sizeof(State) * merge_slots(WIDTH) <= 48 * 1024, "static shared memory");
  __shared__ State slots[merge_slots(WIDTH)];
  return slots;
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

// States that are loaded together for a merge, since a load takes longer than a merge: from global memory as many as go
// into 128 bytes of registers; from shared memory fewer, for less code.
template <class State>
constexpr int kGlobalBatch = 128 / sizeof(State);
constexpr int kSharedBatch = 4;

// The merge of `count` states, `stride` apart.
template <int BATCH, class State>
__device__ __forceinline__ State merge_strided(const State* first, int64_t stride, int count) {
  State total = {};
#pragma unroll 1
  for (int i = 0; i < count; i += BATCH, first += BATCH * stride) {
    State batch[BATCH];
#pragma unroll
    for (int k = 0; k < BATCH; ++k) batch[k] = i + k < count ? first[k * stride] : State{};
    total.merge(merge_halves<BATCH>(batch));
  }
  return total;
}

// Keeps one of two states, `high` in the upper of two lanes that are `apart`, and merges into it what the other lane
// does not keep of its own. The choice is made word by word: one between addresses would put states into local memory.
template <class State>
__device__ __forceinline__ State trade(const State& low, const State& high, bool upper, int apart) {
  constexpr int kWords = sizeof(State) / sizeof(uint32_t);
  uint32_t kept[kWords], given[kWords];
  memcpy(kept, &low, sizeof(State));
  memcpy(given, &high, sizeof(State));
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const uint32_t l = kept[i], h = given[i];
    kept[i] = upper ? h : l;
    given[i] = __shfl_xor_sync(~0u, upper ? l : h, apart);
  }
  State mine, others;
  memcpy(&mine, kept, sizeof(State));
  memcpy(&others, given, sizeof(State));
  mine.merge(others);
  return mine;
}

// The steps in which a thread gives away HALF of its columns, and fewer and fewer: see merge_rows(). It has `kept`
// columns afterwards, from `first` on. (A loop over the steps was left as one for the largest states, and these in
// local memory.)
template <int HALF, int WIDTH, class State>
__device__ __forceinline__ void trade_halves(State (&state)[WIDTH], int& apart, int& kept, int& first) {
  if constexpr (HALF >= 1) {
    if (apart >= kWarp) return;
    const bool upper = threadIdx.x & apart;
#pragma unroll
    for (int e = 0; e < HALF; ++e) state[e] = trade(state[e], state[e + HALF], upper, apart);
    if (upper) first += HALF;
    kept = HALF;
    apart *= 2;
    trade_halves<HALF / 2>(state, apart, kept, first);
  }
}

// Merges the states of a block's threads, which are in rows of `lanes`, a power of two, and hold WIDTH columns each.
// All threads must call, those without anything to merge, or past the last whole row, with empty states. Calls
// each(column, state) in one thread for each of the lanes * WIDTH columns. The order of the merge depends on the number
// of threads alone.
//
// First the rows of a warp: in each step a thread gives half of its columns to the one in the other half of the rows,
// and gets that one's part of the columns that it keeps, so that no thread idles. Then the warps, through `slots`,
// column by column.
template <int WIDTH, class State, class Each>
__device__ __forceinline__ void merge_rows(State (&state)[WIDTH], int lanes, State* slots, Each&& each) {
  int kept = WIDTH, first = 0, apart = lanes;
  bool keeps = true;
  trade_halves<WIDTH / 2>(state, apart, kept, first);
  // Of a single column there is no half to give.
#pragma unroll 1
  for (; apart < kWarp; apart *= 2) {
    state[0] = trade(state[0], state[0], false, apart);
    keeps = keeps && !(threadIdx.x & apart);
  }

  const int columns = lanes * WIDTH, threads = max(lanes, kWarp);  // threads that share one row of slots
  const int rows = static_cast<int>(blockDim.x) / threads, row = static_cast<int>(threadIdx.x) / threads;
  State* mine = slots + row * columns + threadIdx.x % lanes * WIDTH + first;
  __syncthreads();  // nobody reads what the merge before left there
#pragma unroll
  for (int e = 0; e < WIDTH; ++e) {
    if (keeps && e < kept && row < rows) mine[e] = state[e];
  }
  __syncthreads();
#pragma unroll 1
  for (int column = threadIdx.x; column < columns; column += blockDim.x) {
    each(column, merge_strided<kSharedBatch>(slots + column, columns, rows));
  }
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

  // Merges channels [first, past), as many at a time as the block has threads for, each one's partial results shared
  // out among the rows of threads; then calls finish(channel, state) in one thread for each. Channel c has columns c,
  // c + channels, ..., `repeat` of them.
  template <class Finish>
  __device__ __forceinline__ void merge(int64_t first, int64_t past, int64_t channels, int repeat, State* slots,
                                        Finish&& finish) const {
    const int threads = blockDim.x;
    int lanes = 1;  // a power of two; threads past the last whole row have nothing
    while (lanes < past - first && 2 * lanes <= threads) lanes *= 2;
    const int rows = threads / lanes, row = static_cast<int>(threadIdx.x) / lanes, lane = threadIdx.x % lanes;
    const int count = (static_cast<int>(splits) - row + rows - 1) / rows;
#pragma unroll 1
    for (int64_t base = first; base < past; base += lanes) {
      const int64_t channel = base + lane;
      State total[1] = {};
      if (row < rows && channel < past) {
#pragma unroll 1
        for (int r = 0; r < repeat; ++r) {
          // Columns have numbers of more than 32 bits, their vectors of 32.
          const int64_t column = channel + r * channels;
          const uint32_t tile = static_cast<uint32_t>(column / WIDTH) / static_cast<uint32_t>(width / WIDTH);
          const State* first_row = &at(tile, row, column - tile * width);
          total[0].merge(merge_strided<kGlobalBatch<State>>(first_row, rows * width, count));
        }
      }
      merge_rows(total, lanes, slots, [&](int i, const State& whole) {
        if (base + i < past) finish(base + i, whole);
      });
    }
  }
};

// Hands in the states of the block's threads, WIDTH columns of the tile each (see merge_rows). arrive() returns which
// share of the merge of the blocks is this block's, or -1; the blocks that share the channels have one each. There,
// finish(channel, state) is called exactly once for each channel. Control flow is uniform within a block. Returns
// whether this block had a share.
template <int WIDTH, class State, class Arrive, class Finish>
__device__ __forceinline__ bool merge_blocks(State (&state)[WIDTH], int lanes, int64_t channels,
                                             const Partition& partition, const Scratch& scratch, const WorkTile& work,
                                             int shares, Arrive&& arrive, Finish&& finish) {
  State* slots = merge_memory<WIDTH, State>();
  const int width = static_cast<int>(partition.tile_width());
  const int64_t begin = work.tile * width;
  const bool alone = partition.splits == 1 && partition.repeat == 1;
  const Partials<WIDTH, State> partials(partition, scratch);
  merge_rows(state, lanes, slots, [&](int column, const State& merged) {
    if (column >= width) return;
    if (!alone) partials.at(work.tile, work.split, column) = merged;
    else if (begin + column < channels) finish(begin + column, merged);
  });
  if (alone) return true;
  const int share = arrive();
  if (share < 0) return false;
  // The channels of the tile, or all of them where a channel's columns lie in several tiles.
  const bool by_tile = partition.repeat == 1;
  const int64_t first = by_tile ? begin : 0, past = by_tile ? min(channels, begin + width) : channels;
  const int64_t part = (past - first + shares - 1) / shares;
  partials.merge(min(past, first + share * part), min(past, first + (share + 1) * part), channels, partition.repeat,
                 slots, finish);
  return true;
}

// The same for blocks that need not be on the device together.
template <int WIDTH, class State, class Finish>
__device__ __forceinline__ void merge_blocks(State (&state)[WIDTH], int lanes, int64_t channels,
                                             const Partition& partition, const Scratch& scratch, const WorkTile& work,
                                             Finish&& finish) {
  const bool by_tile = partition.repeat == 1;
  const auto blocks = static_cast<uint32_t>(by_tile ? partition.splits : partition.blocks());
  auto arrive = [&] {
    return arrive_for_share(&scratch.counters[by_tile ? work.tile : 0], blocks, partition.merge_shares);
  };
  merge_blocks(state, lanes, channels, partition, scratch, work, partition.merge_shares, arrive, finish);
}

}  // namespace bnext::cuda
