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
template <class T, int UNIT, bool LEAN> constexpr int kReduceChunk = units_in<T, UNIT>(LEAN ? 32 : 64);

template <class A>
__device__ __forceinline__ void finish_sums(const BackwardParams& p, int64_t channel, const Sums<A>& sums) {
  static_cast<A*>(p.sum_dy)[channel] = sums.dy;
  static_cast<A*>(p.sum_dy_xmu)[channel] = sums.dy_xmu;
  store_scalar<A>(p.dweight, p.weight_dtype, channel, sums.dy_xmu * static_cast<const A*>(p.invstd)[channel]);
  store_scalar<A>(p.dbias, p.weight_dtype, channel, sums.dy);
}

// The block's share of one channel; in thread 0.
template <class T, int UNIT, bool ALIGNED, class Source>
__device__ __forceinline__ Sums<acc_t<T>> block_sums(const BackwardParams& p, const Pass& pass, const Share& share,
                                                     Source&& source, Gate gate) {
  using A = acc_t<T>;
  const auto affine = load_affine<A>(p, share.tile);
  constexpr int kParts = UNIT < 4 ? UNIT : 4;  // independent sums: short chains of dependent additions
  Sums<A> part[kParts] = {};
  walk_planar<UNIT, ALIGNED, kReduceChunk<T, UNIT, !ALIGNED>>(pass, p.shape, share, [&](const auto& chunk) {
    for_gradient_units<T, UNIT>(
        p, chunk, source, gate, [&](int) { return affine; },
        [&](int k, const GradientUnit<T, UNIT>& unit) {
#pragma unroll
          for (int e = 0; e < UNIT; ++e) {
            if (chunk.has(k, e)) part[e % kParts].add(unit.dy[e], unit.x[e] - affine.mean);
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

template <class T, int UNIT, bool ALIGNED>
__device__ __forceinline__ void backward_reduce_planar(const BackwardParams& p, const Pass& pass,
                                                       const Scratch& scratch, const Share& share, Gate gate) {
  using A = acc_t<T>;
  const Sums<A> state[1] = {
      block_sums<T, UNIT, ALIGNED>(p, pass, share, gradient_from_memory<T, UNIT, Reuse::again>(p), gate)};
  merge_blocks(state, threadIdx.x == 0, share.tile, p.shape.c, pass, scratch, share,
               [&](int64_t channel, const Sums<A>& whole) { finish_sums(p, channel, whole); });
}

// The block's share of a tile of columns; in the threads of row 0.
template <class T, int UNIT, class Source>
__device__ __forceinline__ void block_column_sums(Sums<acc_t<T>> (&state)[UNIT], const BackwardParams& p,
                                                  const Pass& pass, const Share& share, const ColumnPlace<UNIT>& place,
                                                  Source&& source, Gate gate) {
  using A = acc_t<T>;
  Affine<A> affine[UNIT] = {};
  A invstd[UNIT];
  if (place.active) load_affine(affine, invstd, p, Channels<UNIT>(pass, p.shape, place.col));
#pragma unroll
  for (int e = 0; e < UNIT; ++e) state[e] = {};
  walk_columns<UNIT, kReduceChunk<T, UNIT, true>, false>(pass, p.shape.numel(), share, place, [&](const auto& chunk) {
    for_gradient_units<T, UNIT>(
        p, chunk, source, gate, [&](int e) { return affine[e]; },
        [&](int, const GradientUnit<T, UNIT>& unit) {
#pragma unroll
          for (int e = 0; e < UNIT; ++e) state[e].add(unit.dy[e], unit.x[e] - affine[e].mean);
        });
  });
  reduce_rows(state, place.lane, place.row, pass.lanes, pass.lane_rows);
}

template <class T, int UNIT>
__device__ __forceinline__ void backward_reduce_interleaved(const BackwardParams& p, const Pass& pass,
                                                            const Scratch& scratch, const Share& share, Gate gate) {
  using A = acc_t<T>;
  const ColumnPlace<UNIT> place(pass, share);
  Sums<A> state[UNIT];
  block_column_sums<T, UNIT>(state, p, pass, share, place, gradient_from_memory<T, UNIT, Reuse::again>(p), gate);
  merge_blocks(state, place.active && place.row == 0, place.col, p.shape.c, pass, scratch, share,
               [&](int64_t channel, Sums<A> whole) {
                 // What the end of the tensor cut from the last unit: fewer than UNIT elements.
                 const int64_t numel = p.shape.numel();
                 const auto at = load_affine<A>(p, channel);
                 for (int64_t i = numel & -int64_t{UNIT}; i < numel; ++i) {
                   if (i % p.shape.c != channel) continue;
                   const A x = widen(static_cast<const T*>(p.x)[i]);
                   const bool pass_on = gate == Gate::none || (gate == Gate::relu && passes(at(x))) ||
                                        (gate == Gate::mask && (p.mask[i / 8] >> (i % 8) & 1));
                   if (pass_on) whole.add(widen(static_cast<const T*>(p.dy)[i]), x - at.mean);
                 }
                 finish_sums(p, channel, whole);
               });
}

}  // namespace bnext::cuda
