// The stage `stats` for one block: its share of x -> Welford states, and what becomes of a channel's
// whole. Used by stats.cu and by the kernels that do all of a forward.
#pragma once

#include "../core/welford.h"
#include "loaders.cuh"
#include "reduce.cuh"

namespace bnext::cuda {

// Units of a planar chunk: 32 elements, all of whose loads are in flight together, or what the
// registers of a full multiprocessor hold of wider elements and of vectors with masked ends.
template <class T, int N, bool ALIGNED>
constexpr int kStatsChunk = (sizeof(T) == 8 ? 8
                             : ALIGNED      ? 32
                                            : 16) /
                            N;

// Rows of an interleaved chunk, next to the state of UNIT columns.
template <class T, int N>
constexpr int kStatsRows = N * sizeof(acc_t<T>) > 32 ? 2
                           : N * sizeof(T) > 16      ? 4
                                                     : 8;

// f(begin) + ... + f(begin + N - 1) in halves: rounding errors and dependent additions grow with
// log2(N), and so do the registers that it takes.
template <int N, class F>
__device__ __forceinline__ auto pairwise_sum(const F& f, int begin = 0) {
  if constexpr (N == 1) {
    return f(begin);
  } else {
    auto low = pairwise_sum<N / 2>(f, begin);
    return low + pairwise_sum<N / 2>(f, begin + N / 2);
  }
}

// Adds a chunk of one channel: its mean, then its squared deviations, from registers.
template <class T, int N, int COUNT, bool WHOLE>
__device__ __forceinline__ void add_chunk(Welford<acc_t<T>>& state, const Vec<T, N> (&vecs)[COUNT],
                                          const Chunk<COUNT, WHOLE>& chunk) {
  using A = acc_t<T>;
  A value[COUNT][N];
  int n = 0;
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    widen_vec<T, N>(vecs[k], value[k]);
    n += WHOLE ? N : max(chunk.hi[k] - chunk.lo[k], 0);
  }
  if (n == 0) return;

  if (state.count == A(0)) {
    // The first of the thread's elements, found from behind with constant register indices.
#pragma unroll
    for (int i = COUNT * N - 1; i >= 0; --i) {
      if (chunk.has(i / N, i % N)) state.shift = value[i / N][i % N];
    }
  }

  const A inverse = WHOLE ? A(1) / A(COUNT * N) : reciprocal(static_cast<A>(n));
  const A mean = inverse * pairwise_sum<COUNT * N>([&](int i) {
                   A& v = value[i / N][i % N];
                   v = chunk.has(i / N, i % N) ? v - state.shift : A(0);
                   return v;
                 });
  const A var = inverse * pairwise_sum<COUNT * N>([&](int i) {
                  const A d = chunk.has(i / N, i % N) ? value[i / N][i % N] - mean : A(0);
                  return d * d;
                });
  state.add(static_cast<A>(n), mean, var);
}

// One thread's UNIT columns, all with the same count.
template <class A, int N>
struct ColumnStates {
  A count = A(0);
  A shift[N] = {}, offset[N] = {}, var[N] = {};

  template <class T, int COUNT>
  __device__ __forceinline__ void add(const Vec<T, N> (&vecs)[COUNT]) {
    if (count == A(0)) widen_vec<T, N>(vecs[0], shift);
    const A total = count + A(COUNT);
    const A f = A(COUNT) * reciprocal(total);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      constexpr A inverse = A(1) / A(COUNT);
      const A mean = inverse * pairwise_sum<COUNT>([&](int k) { return vecs[k][e] - shift[e]; });
      const A chunk_var = inverse * pairwise_sum<COUNT>([&](int k) {
                            const A d = (vecs[k][e] - shift[e]) - mean;
                            return d * d;
                          });
      const A delta = mean - offset[e];  // Welford::add, with the division shared by all columns
      offset[e] += delta * f;
      var[e] += f * ((chunk_var - var[e]) + delta * delta * (A(1) - f));
    }
    count = total;
  }
};

// What the statistics of a whole channel turn into.
template <class A>
__device__ __forceinline__ void finish_stats(const ForwardParams& p, int64_t channel, const Welford<A>& state) {
  const A mean = state.mean();
  if (p.mean) static_cast<A*>(p.mean)[channel] = mean;
  if (p.var) static_cast<A*>(p.var)[channel] = state.var;
  if (p.invstd) static_cast<A*>(p.invstd)[channel] = inverse_std(state.var, p.eps);
  if (p.running_mean) {
    // num_batches_tracked goes up only when every channel has read it: see count_batch and normalize.cu.
    const double factor = p.cumulative ? 1.0 / static_cast<double>(*p.num_batches_tracked + 1) : p.momentum;
    const double m = static_cast<double>(p.shape.per_channel());
    const RunningUpdate<A> update = {static_cast<A>(factor), static_cast<A>(m / (m - 1.0))};
    const A running_mean = load_scalar<A>(p.running_mean, p.running_dtype, channel, A(0));
    const A running_var = load_scalar<A>(p.running_var, p.running_dtype, channel, A(0));
    store_scalar<A>(p.running_mean, p.running_dtype, channel, update.mean(running_mean, mean));
    store_scalar<A>(p.running_var, p.running_dtype, channel, update.var(running_var, state.var));
  }
}

// For kernels that do all of a forward: once every channel has read num_batches_tracked, somebody adds
// one. In a cumulative average that takes a counter, the one behind those of the tiles.
__device__ __forceinline__ void increment_batches_tracked_after_all(const ForwardParams& p, const Scratch& scratch,
                                                                    int64_t counter) {
  if (!p.num_batches_tracked) return;
  const bool last = p.cumulative ? arrive_last(&scratch.counters[counter], gridDim.x) : blockIdx.x == 0;
  if (last && threadIdx.x == 0) ++*p.num_batches_tracked;
}

// The block's share of one channel; in thread 0.
template <class T, int N, bool ALIGNED, class Source>
__device__ __forceinline__ Welford<acc_t<T>> block_stats(const Partition& partition, const Shape& shape,
                                                         const WorkTile& work, Source&& x) {
  Welford<acc_t<T>> state[1] = {};
  iterate_planar<N, ALIGNED, kStatsChunk<T, N, ALIGNED>>(partition, shape, work, [&](const auto& chunk) {
    Vec<T, N> vecs[chunk.count];
    x.load(chunk, vecs);
    add_chunk<T, N>(state[0], vecs, chunk);
  });
  reduce_rows(state, 0, threadIdx.x, 1, blockDim.x);
  return state[0];
}

template <class T, int N, bool ALIGNED>
__device__ __forceinline__ void stats_planar(const ForwardParams& p, const Partition& partition, const Scratch& scratch,
                                             const WorkTile& work) {
  using A = acc_t<T>;
  const Welford<A> state[1] = {
      block_stats<T, N, ALIGNED>(partition, p.shape, work, FromGlobal<T, N, Reuse::again>(p.x, p.shape))};
  merge_blocks(state, threadIdx.x == 0, work.tile, p.shape.c, partition, scratch, work,
               [&](int64_t channel, const Welford<A>& whole) { finish_stats(p, channel, whole); });
}

// The block's share of a tile of columns; in the threads of row 0.
template <class T, int N, class Source>
__device__ __forceinline__ void block_column_stats(Welford<acc_t<T>> (&state)[N], const Partition& partition,
                                                   const Shape& shape, const WorkTile& work,
                                                   const ColumnPlace<N>& place, Source&& x) {
  ColumnStates<acc_t<T>, N> columns;
  iterate_columns<N, kStatsRows<T, N>, false>(partition, shape.numel(), work, place, [&](const auto& chunk) {
    Vec<T, N> vecs[chunk.count];
    x.load(chunk, vecs);
    columns.add(vecs);
  });
#pragma unroll
  for (int e = 0; e < N; ++e) state[e] = {columns.count, columns.shift[e], columns.offset[e], columns.var[e]};
  reduce_rows(state, place.vec_col, place.row, partition.tile_vecs, partition.thread_rows);
}

template <class T, int N>
__device__ __forceinline__ void stats_interleaved(const ForwardParams& p, const Partition& partition,
                                                  const Scratch& scratch, const WorkTile& work) {
  using A = acc_t<T>;
  const ColumnPlace<N> place(partition, work);
  Welford<A> state[N];
  block_column_stats<T, N>(state, partition, p.shape, work, place, FromGlobal<T, N, Reuse::again>(p.x, p.shape));
  merge_blocks(state, place.active && place.row == 0, place.col, p.shape.c, partition, scratch, work,
               [&](int64_t channel, Welford<A> whole) {
                 // What the end of the tensor cut from the last vector: fewer than UNIT elements.
                 const int64_t numel = p.shape.numel();
                 for (int64_t i = numel & -int64_t{N}; i < numel; ++i) {
                   if (i % p.shape.c == channel) whole.merge({A(1), widen(static_cast<const T*>(p.x)[i]), A(0), A(0)});
                 }
                 finish_stats(p, channel, whole);
               });
}

}  // namespace bnext::cuda
