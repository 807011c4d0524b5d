// The stage `backward_reduce` for one block: its share of dy and x -> sums, and what becomes of a
// channel's whole. Used by backward_reduce.cu and by the kernels that do all of a backward.
#pragma once

#include "backward.cuh"
#include "reduce.cuh"

namespace bnext::cuda {

template <class A>
struct alignas(2 * sizeof(A)) Sums {
  A dy, dy_xmu;

  __device__ __forceinline__ void add(A g, A xmu) {
    dy += g;
    dy_xmu = std::fma(g, xmu, dy_xmu);
  }
  __device__ __forceinline__ void merge(const Sums& other) {
    dy += other.dy;
    dy_xmu += other.dy_xmu;
  }
};

// Units of each of dy and x in flight; LEAN is next to masked ends or to the state of UNIT columns.
template <class T, int N, bool LEAN> constexpr int kReduceChunk = vecs_in<T, N>(LEAN ? 32 : 64);

template <class A>
__device__ __forceinline__ void finish_sums(const BackwardParams& p, int64_t channel, const Sums<A>& sums) {
  static_cast<A*>(p.sum_dy)[channel] = sums.dy;
  static_cast<A*>(p.sum_dy_xmu)[channel] = sums.dy_xmu;
  store_scalar<A>(p.dweight, p.weight_dtype, channel, sums.dy_xmu * static_cast<const A*>(p.invstd)[channel]);
  store_scalar<A>(p.dbias, p.weight_dtype, channel, sums.dy);
}

// The block's share of one channel; in thread 0.
template <class T, int N, bool ALIGNED, class Source>
__device__ __forceinline__ Sums<acc_t<T>> block_sums(const BackwardParams& p, const Partition& partition,
                                                     const WorkTile& work, Source&& source, Gate gate) {
  using A = acc_t<T>;
  const auto affine = load_affine<A>(p, work.tile);
  constexpr int kParts = N < 4 ? N : 4;  // independent sums: short chains of dependent additions
  Sums<A> part[kParts] = {};
  iterate_planar<N, ALIGNED, kReduceChunk<T, N, !ALIGNED>>(partition, p.shape, work, [&](const auto& chunk) {
    for_gradient_vecs<T, N>(
        p, chunk, source, gate, [&](int) { return affine; },
        [&](int k, const GradientVec<T, N>& vec) {
#pragma unroll
          for (int e = 0; e < N; ++e) {
            if (chunk.has(k, e)) part[e % kParts].add(vec.dy[e], vec.x[e] - affine.mean);
          }
        });
  });
#pragma unroll
  for (int half = kParts / 2; half >= 1; half /= 2) {
#pragma unroll
    for (int e = 0; e < half; ++e) part[e].merge(part[e + half]);
  }
  Sums<A> state[1] = {part[0]};
  reduce_rows(state, 0, threadIdx.x, 1, blockDim.x);
  return state[0];
}

template <class T, int N, bool ALIGNED>
__device__ __forceinline__ void backward_reduce_planar(const BackwardParams& p, const Partition& partition,
                                                       const Scratch& scratch, const WorkTile& work, Gate gate) {
  using A = acc_t<T>;
  const Sums<A> state[1] = {
      block_sums<T, N, ALIGNED>(p, partition, work, gradient_from_global<T, N, Reuse::again>(p), gate)};
  merge_blocks(state, threadIdx.x == 0, work.tile, p.shape.c, partition, scratch, work,
               [&](int64_t channel, const Sums<A>& whole) { finish_sums(p, channel, whole); });
}

// The block's share of a tile of columns; in the threads of row 0.
template <class T, int N, class Source>
__device__ __forceinline__ void block_column_sums(Sums<acc_t<T>> (&state)[N], const BackwardParams& p,
                                                  const Partition& partition, const WorkTile& work,
                                                  const ColumnPlace<N>& place, Source&& source, Gate gate) {
  using A = acc_t<T>;
  Affine<A> affine[N] = {};
  A invstd[N];
  if (place.active) load_affine(affine, invstd, p, Channels<N>(partition, p.shape, place.col));
#pragma unroll
  for (int e = 0; e < N; ++e) state[e] = {};
  iterate_columns<N, kReduceChunk<T, N, true>, false>(partition, p.shape.numel(), work, place, [&](const auto& chunk) {
    for_gradient_vecs<T, N>(
        p, chunk, source, gate, [&](int e) { return affine[e]; },
        [&](int, const GradientVec<T, N>& vec) {
#pragma unroll
          for (int e = 0; e < N; ++e) state[e].add(vec.dy[e], vec.x[e] - affine[e].mean);
        });
  });
  reduce_rows(state, place.vec_col, place.row, partition.tile_vecs, partition.thread_rows);
}

template <class T, int N>
__device__ __forceinline__ void backward_reduce_interleaved(const BackwardParams& p, const Partition& partition,
                                                            const Scratch& scratch, const WorkTile& work, Gate gate) {
  using A = acc_t<T>;
  const ColumnPlace<N> place(partition, work);
  Sums<A> state[N];
  block_column_sums<T, N>(state, p, partition, work, place, gradient_from_global<T, N, Reuse::again>(p), gate);
  merge_blocks(state, place.active && place.row == 0, place.col, p.shape.c, partition, scratch, work,
               [&](int64_t channel, Sums<A> whole) {
                 // What the end of the tensor cut from the last vector: fewer than UNIT elements.
                 const int64_t numel = p.shape.numel();
                 const auto at = load_affine<A>(p, channel);
                 for (int64_t i = numel & -int64_t{N}; i < numel; ++i) {
                   if (i % p.shape.c != channel) continue;
                   const A x = widen(static_cast<const T*>(p.x)[i]);
                   const bool pass_on = gate == Gate::none || (gate == Gate::relu && is_positive(at(x))) ||
                                        (gate == Gate::mask && (p.mask[i / 8] >> (i % 8) & 1));
                   if (pass_on) whole.add(widen(static_cast<const T*>(p.dy)[i]), x - at.mean);
                 }
                 finish_sums(p, channel, whole);
               });
}

}  // namespace bnext::cuda
