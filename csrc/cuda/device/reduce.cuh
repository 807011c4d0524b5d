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

// Merges what the lanes of a warp hold whose numbers are the same modulo `row_threads`, a power of two: `state` is then
// as it should be in the lower row_threads. All lanes must call.
template <class State>
__device__ __forceinline__ void merge_lanes(State& state, int row_threads) {
#pragma unroll 1
  for (int lane_mask = kWarp / 2; lane_mask >= row_threads; lane_mask /= 2) {
    const State both[2] = {state, shuffle_xor(state, lane_mask)};
    state = merge_all(both);
  }
}

// Merges what a block's threads hold, which are in rows of `row_threads`, a power of two up to a warp, with N columns
// each. store() leaves it in shared memory. merge(e, lane) reads column e of all threads whose number is `lane` modulo
// kWarp, and merges it, in that order; they are of the same column of the tile. Then each(column, state) is called, in
// one thread for each of the row_threads * N columns. All threads must call. The order of the merge depends on
// `row_threads` and the number of threads.
template <int N, class Store, class Merge, class Each>
__device__ __forceinline__ void merge_rows(int row_threads, const Store& store, const Merge& merge, const Each& each) {
  __syncthreads();  // nobody reads what was there before
  store();
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int e = threadIdx.x / kWarp; e < N; e += blockDim.x / kWarp) {
    auto state = merge(e, lane);
    merge_lanes(state, row_threads);
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

// The same for rows that may be longer than a warp, of which the block has a whole number.
template <class State, class Each>
__device__ __forceinline__ void merge_long_rows(const State& mine, int row_threads, void* memory, const Each& each) {
  State* slots = static_cast<State*>(memory);
  __syncthreads();  // nobody reads what was there before
  slots[threadIdx.x] = mine;
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x), threads = max(row_threads, kWarp);
  if (thread >= threads) return;
  State state = merge_strided<merge_batch(sizeof(State), false)>(slots + thread, 0,
                                                                 static_cast<int>(blockDim.x) / threads, 1, threads);
  merge_lanes(state, row_threads);
  if (thread < row_threads) each(thread, state);
}

// Merges channels [first, past), as many at a time as a warp has lanes or, if LONG, the block has threads; each one's
// states are shared out among the rows of threads: gather(channel, row, rows) merges those of one row of so many. Then
// finish(channel, state, operands) is called in one thread for each, for which finish.operands(channel) is loaded
// meanwhile.
template <bool LONG, class Gather, class Finish>
__device__ __forceinline__ void merge_channels(int64_t first, int64_t past, void* memory, const Gather& gather,
                                               const Finish& finish) {
  int shift = 0;  // of threads to a row, of which the block has a whole number
  while ((1 << shift) < past - first && (LONG ? blockDim.x % (2u << shift) == 0 : (1 << shift) < kWarp)) ++shift;
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
    const auto each = [&](int i, const auto& whole) {
      if (base + i < past) finish(base + i, whole, operands);  // i is the thread's lane
    };
    if constexpr (LONG) merge_long_rows(total, row_threads, memory, each);
    else merge_states(total, row_threads, memory, each);
  }
}

// Splits `begin`, begin + step, ... below `end` of a tile.
struct Splits { int begin, end, step; };

// Partial results of a pass in memory: [tile][split][column of the tile]. WIDTH divides the columns of a tile.
template <int WIDTH, class State>
struct Partials {
  State* data;
  int width, splits;

  __device__ __forceinline__ Partials(const Partition& partition, const Scratch& scratch)
      : data(static_cast<State*>(scratch.partials)),
        width(static_cast<int>(partition.tile_width())),
        splits(static_cast<int>(partition.splits)) {}

  // Those of a split, of the columns of a tile.
  __device__ __forceinline__ State* of(int64_t tile, int64_t split) const {
    return data + (tile * splits + split) * width;
  }

  // Merges channels [first, past) of some splits: see merge_channels(). Channel c has columns c, c + channels, ...,
  // `repeat` of them.
  template <class Finish>
  __device__ __forceinline__ void merge(const Splits& some, int64_t first, int64_t past, int64_t channels, int repeat,
                                        void* memory, const Finish& finish) const {
    const auto gather = [&](int64_t channel, int row, int rows) {
      State total = {};
#pragma unroll 1
      for (int r = 0; r < repeat; ++r) {
        // Columns have numbers of more than 32 bits, their vectors of 32.
        const int64_t column = channel + r * channels;
        const uint32_t tile = static_cast<uint32_t>(column / WIDTH) / static_cast<uint32_t>(width / WIDTH);
        const State merged = merge_strided<merge_batch(sizeof(State), WIDTH > 1)>(
            of(tile, 0) + (column - int64_t{tile} * width), some.begin + row * some.step, some.end, rows * some.step,
            width);
        if (r == 0) total = merged;
        else total.merge(merged);
      }
      return total;
    };
    merge_channels</*LONG=*/(WIDTH > 1)>(first, past, memory, gather, finish);
  }
};

// What is done with a merge of the splits of a section, which is left in place of the first split, where it was read by
// then; or of all of them, which finishes a channel.
template <class State, class Finish>
struct FinishMerge {
  const Finish& finish;
  State* section;  // of the first split; null for all of them
  int64_t begin;   // the first column there

  using Operands = decltype(finish.operands(0));
  __device__ __forceinline__ Operands operands(int64_t channel) const {
    return section ? Operands{} : finish.operands(channel);
  }
  __device__ __forceinline__ void operator()(int64_t channel, const State& merged, const Operands& operands) const {
    if (section) section[channel - begin] = merged;
    else finish(channel, merged, operands);
  }
};

// Merges the partial results of columns: in the last block to arrive of each section, where there are any, and then in
// the last of all. The same code does both: to a section, columns are what channels are to the tile.
template <int WIDTH, class State, class Finish>
__device__ __forceinline__ void merge_sections(int64_t channels, const Partition& partition, const Scratch& scratch,
                                               const WorkTile& work, const Partials<WIDTH, State>& partials,
                                               void* memory, const Finish& finish) {
  const bool by_tile = partition.repeat == 1;
  const int width = partials.width, splits = partials.splits;
  const int size = partition.merge_section, sections = partition.merge_sections();
  const int64_t begin = work.tile * width;
  for (bool whole = size == 1;; whole = true) {
    const int section = static_cast<int>(work.split) / size;
    const Splits some = whole ? Splits{0, splits, size} : Splits{section * size, min(splits, (section + 1) * size), 1};
    const int64_t counter = !whole ? partition.tiles + work.tile * sections + section : by_tile ? work.tile : 0;
    const int64_t blocks = !whole ? some.end - some.begin : by_tile ? sections : partition.tiles * sections;
    if (!arrive_last(&scratch.counters[counter], static_cast<uint32_t>(blocks))) return;
    // The columns of the tile, its channels, or all channels where the columns of one lie in several tiles.
    const int64_t first = whole && !by_tile ? 0 : begin;
    const int64_t past = !whole ? begin + width : by_tile ? min(channels, begin + width) : channels;
    partials.merge(some, first, past, channels, whole ? partition.repeat : 1, memory,
                   FinishMerge<State, Finish>{finish, whole ? nullptr : partials.of(work.tile, some.begin), begin});
    if (whole) return;
  }
}

// Merges what the blocks of a tile hold. merge_block(each) merges what the block's threads do, WIDTH columns of the
// tile each, and calls each(column, state) in one thread for each column. The last block to arrive merges those of all,
// and there finish(channel, state, finish.operands(channel)) is called exactly once for each channel. Where they are
// too many for one block to read at once, the last of each section of neighbouring splits merges its section before, so
// that sections are merged side by side, most of them while other blocks still reduce. What merges with what depends on
// the partition alone. Control flow is uniform within a block.
template <int WIDTH, class State, class MergeBlock, class Finish>
__device__ __forceinline__ void merge_blocks(int64_t channels, const Partition& partition, const Scratch& scratch,
                                             const WorkTile& work, void* memory, MergeBlock&& merge_block,
                                             const Finish& finish) {
  const bool by_tile = partition.repeat == 1;
  const Partials<WIDTH, State> partials(partition, scratch);
  const int width = partials.width, splits = partials.splits;
  const int64_t begin = work.tile * width;
  State* const mine = partials.of(work.tile, work.split);
  const bool alone = splits == 1 && by_tile;
  merge_block([&](int column, const State& merged) {
    if (column >= width) return;
    if (!alone) mine[column] = merged;
    else if (begin + column < channels) finish(begin + column, merged, finish.operands(begin + column));
  });
  if (alone) return;
  if constexpr (WIDTH == 1) {  // a state a block, for all of which a block's threads are enough
    if (arrive_last(&scratch.counters[work.tile], static_cast<uint32_t>(splits)))
      partials.merge(Splits{0, splits, 1}, begin, begin + 1, channels, /*repeat=*/1, memory, finish);
  } else {
    merge_sections(channels, partition, scratch, work, partials, memory, finish);
  }
}

}  // namespace bnext::cuda
