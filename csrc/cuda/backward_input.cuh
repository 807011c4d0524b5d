// The stage `backward_input` for one block: dy, x, sums -> dx, dresidual?. Used by backward_input.cu
// and by the small plan of backward.cu.
#pragma once

#include "backward.cuh"

namespace bnext::cuda {

// Units of each of dy and x in flight; LEAN is next to the coefficients of UNIT columns.
template <class T, int UNIT, bool LEAN> constexpr int kGradientChunk = units_in<T, UNIT>(LEAN ? 32 : 64);

// One channel's coefficients: of the sign (the forward's), and of the gradient.
template <class A>
struct ChannelGradient {
  Affine<A> affine;
  AffineGradient<A> gradient;

  ChannelGradient() = default;
  __device__ __forceinline__ ChannelGradient(const BackwardParams& p, int64_t channel, A sum_dy, A sum_dy_xmu) {
    affine = backward_affine<A>(p, channel);
    const A invstd = static_cast<const A*>(p.invstd)[channel];
    const A inverse = A(1) / static_cast<A>(p.count);
    gradient = {affine.mean, affine.scale, sum_dy * inverse, sum_dy_xmu * inverse * invstd * invstd};
  }
  // By the sums in memory, which eval mode does without.
  __device__ __forceinline__ ChannelGradient(const BackwardParams& p, int64_t channel)
      : ChannelGradient(p, channel, p.training ? static_cast<const A*>(p.sum_dy)[channel] : A(0),
                        p.training ? static_cast<const A*>(p.sum_dy_xmu)[channel] : A(0)) {}
};

template <class T, int UNIT, int COUNT, bool WHOLE, class Source, class ChannelAt>
__device__ __forceinline__ void backward_input_chunk(const BackwardParams& p, const Chunk<COUNT, WHOLE>& chunk,
                                                     Source& source, Gate gate, const ChannelAt& channel) {
  using A = acc_t<T>;
  for_gradient_units<T, UNIT>(
      p, chunk, source, gate, [&](int e) { return channel(e).affine; },
      [&](int k, GradientUnit<T, UNIT>& unit) {
        if (gate == Gate::mask && p.dresidual) {
          store_at(static_cast<T*>(p.dresidual), chunk, k, narrow_unit<T, UNIT>(unit.dy));
        }
        if (!p.dx) return;
        A dx[UNIT];
#pragma unroll
        for (int e = 0; e < UNIT; ++e) {
          // In eval mode x must not touch the gradient, not even an infinite x.
          dx[e] = p.training ? channel(e).gradient(unit.dy[e], unit.x[e]) : unit.dy[e] * channel(e).gradient.scale;
        }
        store_at(static_cast<T*>(p.dx), chunk, k, narrow_unit<T, UNIT>(dx));
      });
}

template <class T, int UNIT, bool ALIGNED, class Source>
__device__ __forceinline__ void backward_input_share(const BackwardParams& p, const Pass& pass, const Share& share,
                                                     Source&& source, Gate gate,
                                                     const ChannelGradient<acc_t<T>>& channel) {
  walk_planar<UNIT, ALIGNED, kGradientChunk<T, UNIT, !ALIGNED>>(pass, p.shape, share, [&](const auto& chunk) {
    backward_input_chunk<T, UNIT>(p, chunk, source, gate, [&](int) { return channel; });
  });
}

template <class T, int UNIT>
__device__ __forceinline__ void backward_input_planar(const BackwardParams& p, const Pass& pass, const Share& share,
                                                      Gate gate) {
  const ChannelGradient<acc_t<T>> channel(p, share.tile);
  backward_input_share<T, UNIT, true>(p, pass, share, gradient_from_memory<T, UNIT, Reuse::last>(p), gate, channel);
}

template <class T, int UNIT, bool PARTIAL, class Source>
__device__ __forceinline__ void backward_input_tile(const BackwardParams& p, const Pass& pass, const Share& share,
                                                    const ColumnPlace<UNIT>& place, Source&& source, Gate gate,
                                                    const ChannelGradient<acc_t<T>> (&channel)[UNIT]) {
  walk_columns<UNIT, kGradientChunk<T, UNIT, true>, PARTIAL>(
      pass, p.shape.numel(), share, place, [&](const auto& chunk) {
        backward_input_chunk<T, UNIT>(p, chunk, source, gate, [&](int e) { return channel[e]; });
      });
}

template <class T, int UNIT>
__device__ __forceinline__ void backward_input_columns(const BackwardParams& p, const Pass& pass, const Share& share,
                                                       Gate gate) {
  const ColumnPlace<UNIT> place(pass, share);
  if (!place.active) return;
  ChannelGradient<acc_t<T>> channel[UNIT];
#pragma unroll
  for (int e = 0; e < UNIT; ++e) {
    channel[e] = ChannelGradient<acc_t<T>>(p, ChannelColumn(pass, p.shape, place.col + e).channel);
  }
  backward_input_tile<T, UNIT, true>(p, pass, share, place, gradient_from_memory<T, UNIT, Reuse::last>(p), gate,
                                     channel);
}

}  // namespace bnext::cuda
