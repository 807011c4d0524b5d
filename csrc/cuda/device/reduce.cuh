// Reductions, in a fixed order and without float atomics: over the threads of a block, then over the
// blocks that share a tile. A State is empty when zero-initialised, and has merge(const State&) and, for several at
// once, merge_all(const State (&)[COUNT]).
//
// All of it comes after the last load and before the first store of a kernel, when memory has nothing to do: what
// counts is how many instructions it takes, and how many of them wait for each other.
#pragma once

#include <cstring>

#include "barrier.cuh"
#include "tile_iterator.cuh"

namespace bnext::cuda {

// The merge of states `begin`, begin + step, ... below `end` of an array with `stride` between neighbours.
template <int BATCH, class State>
__device__ __forceinline__ State merge_strided(const State* states, int begin, int end, int step, int stride) {
  State total = {};
#pragma unroll 1
  for (int i = begin; i < end; i += BATCH * step) {
    State batch[BATCH];
#pragma unroll
    for (int k = 0; k < BATCH; ++k) {
      batch[k] = i + k * step < end ? states[static_cast<int64_t>(i + k * step) * stride] : State{};
    }
    const State merged = merge_all(batch);
    if (i == begin) total = merged;
    else total.merge(merged);
  }
  return total;
}

// Of another lane of the warp.
template <class State>
__device__ __forceinline__ State shuffle_xor(const State& mine, int lane_mask) {
  constexpr int kWords = sizeof(State) / sizeof(uint32_t);
  uint32_t words[kWords];
  memcpy(words, &mine, sizeof(State));
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = __shfl_xor_sync(~0u, words[i], lane_mask);
  State other;
  memcpy(&other, words, sizeof(State));
  return other;
}

// Merges what a block's threads hold, which are in rows of `row_threads`, a power of two, with N columns each. store()
// leaves it in shared memory. merge(e, lane) reads column e of all threads whose number is `lane` modulo kWarp, and
// merges it, in that order; they are of the same column of the tile. Then each(column, state) is called, in one thread
// for each of the row_threads * N columns. All threads must call. The order of the merge depends on `row_threads` and
// the number of threads.
template <int N, class Store, class Merge, class Each>
__device__ __forceinline__ void merge_rows(int row_threads, const Store& store, const Merge& merge, const Each& each) {
  __syncthreads();  // nobody reads what was there before
  store();
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int e = threadIdx.x / kWarp; e < N; e += blockDim.x / kWarp) {
    auto state = merge(e, lane);
#pragma unroll 1
    for (int lane_mask = kWarp / 2; lane_mask >= row_threads; lane_mask /= 2) {
      const decltype(state) both[2] = {state,
                                       shuffle_xor(state, lane_mask)};  // as it should be in the lower row_threads
      state = merge_all(both);
    }
    if (lane < row_threads) each(lane * N + e, state);
  }
}

// The same for threads with one state each, in `memory` of kMaxThreads of them.
template <class State, class Each>
__device__ __forceinline__ void merge_states(const State& mine, int row_threads, void* memory, const Each& each) {
  State* slots = static_cast<State*>(memory);
  merge_rows<1>(
      row_threads, [&] { slots[threadIdx.x] = mine; },
      [&](int, int lane) {
        return merge_strided<merge_batch(sizeof(State), false)>(slots + lane, 0, static_cast<int>(blockDim.x) / kWarp,
                                                                1, kWarp);
      },
      each);
}

// Merges channels [first, past), as many at a time as a warp has lanes, each one's states shared out among the rows of
// threads: gather(channel, row, rows) merges those of one row of so many. Then finish(channel, state, operands) is
// called in one thread for each, for which finish.operands(channel) is loaded meanwhile.
template <class Gather, class Finish>
__device__ __forceinline__ void merge_channels(int64_t first, int64_t past, void* memory, const Gather& gather,
                                               const Finish& finish) {
  int shift = 0;  // of threads to a row
  while ((1 << shift) < past - first && (1 << shift) < kWarp) ++shift;
  const int row_threads = 1 << shift, lane = static_cast<int>(threadIdx.x) & (row_threads - 1);
  const int rows = static_cast<int>(blockDim.x) >> shift, row = static_cast<int>(threadIdx.x) >> shift;
#pragma unroll 1
  for (int64_t base = first; base < past; base += row_threads) {
    const int64_t channel = base + lane;
    decltype(gather(channel, row, rows)) total = {};
    decltype(finish.operands(channel)) operands = {};
    if (channel < past) {
      if (row == 0) operands = finish.operands(channel);
      total = gather(channel, row, rows);
    }
    merge_states(total, row_threads, memory, [&](int i, const auto& whole) {
      if (base + i < past) finish(base + i, whole, operands);  // i is the thread's lane
    });
  }
}

// Partial results of a pass in memory: [tile][split][column of the tile]. WIDTH divides the columns of a tile.
template <int WIDTH, class State>
struct Partials {
  State* data;
  int width, splits;

  __device__ __forceinline__ Partials(const Partition& partition, const Scratch& scratch)
      : data(static_cast<State*>(scratch.partials)),
        width(static_cast<int>(partition.tile_width())),
        splits(static_cast<int>(partition.splits)) {}

  // Those of a tile's first split; the next has its own `width` behind.
  __device__ __forceinline__ State* of_tile(int64_t tile) const { return data + tile * splits * width; }

  // Merges channels [first, past): see merge_channels(). Channel c has columns c, c + channels, ..., `repeat` of them.
  template <class Finish>
  __device__ __forceinline__ void merge(int64_t first, int64_t past, int64_t channels, int repeat, void* memory,
                                        const Finish& finish) const {
    const auto gather = [&](int64_t channel, int row, int rows) {
      State total = {};
#pragma unroll 1
      for (int r = 0; r < repeat; ++r) {
        // Columns have numbers of more than 32 bits, their vectors of 32.
        const int64_t column = channel + r * channels;
        const uint32_t tile = static_cast<uint32_t>(column / WIDTH) / static_cast<uint32_t>(width / WIDTH);
        const State merged = merge_strided<merge_batch(sizeof(State), WIDTH > 1)>(
            of_tile(tile) + (column - int64_t{tile} * width), row, splits, rows, width);
        if (r == 0) total = merged;
        else total.merge(merged);
      }
      return total;
    };
    merge_channels(first, past, memory, gather, finish);
  }
};

// Merges what the blocks of a tile hold. merge_block(each) merges what the block's threads do, WIDTH columns of the
// tile each, and calls each(column, state) in one thread for each column. The last blocks to arrive share the merge of
// all of them, and there finish(channel, state, finish.operands(channel)) is called exactly once for each channel.
// Control flow is uniform within a block.
template <int WIDTH, class State, class MergeBlock, class Finish>
__device__ __forceinline__ void merge_blocks(int64_t channels, const Partition& partition, const Scratch& scratch,
                                             const WorkTile& work, void* memory, MergeBlock&& merge_block,
                                             const Finish& finish) {
  const bool by_tile = partition.repeat == 1;
  const auto blocks = static_cast<uint32_t>(by_tile ? partition.splits : partition.blocks());
  const Partials<WIDTH, State> partials(partition, scratch);
  const int width = partials.width, workers = partition.merge_workers;
  const int64_t begin = work.tile * width;
  State* const mine = partials.of_tile(work.tile) + work.split * width;
  const bool alone = partition.splits == 1 && by_tile;
  merge_block([&](int column, const State& merged) {
    if (column >= width) return;
    if (!alone) mine[column] = merged;
    else if (begin + column < channels) finish(begin + column, merged, finish.operands(begin + column));
  });
  if (alone) return;
  const int worker = arrive_among_last(&scratch.counters[by_tile ? work.tile : 0], blocks, workers);
  if (worker < 0) return;
  // The channels of the tile, or all of them where a channel's columns lie in several tiles.
  const int64_t first = by_tile ? begin : 0, past = by_tile ? min(channels, begin + width) : channels;
  const int64_t part = static_cast<uint32_t>(past - first + workers - 1) / static_cast<uint32_t>(workers);
  partials.merge(min(past, first + worker * part), min(past, first + (worker + 1) * part), channels, partition.repeat,
                 memory, finish);
}

}  // namespace bnext::cuda
