// The stage `backward_input` for one block: dy, x, sums -> dx, dresidual?. Used by backward_input.cu
// and by the kernels that do all of a backward.
#pragma once

#include "backward.cuh"

namespace bnext::cuda {

// Units of each of dy and x in flight; LEAN is next to the coefficients of UNIT columns.
template <class T, int N, bool LEAN> constexpr int kGradientChunk = vecs_in<T, N>(LEAN ? 32 : 64);

// One channel's coefficients: of the sign (the forward's), and of the gradient.
template <class A>
struct ChannelGradient {
  Affine<A> affine;
  AffineGradient<A> gradient;

  ChannelGradient() = default;
  // Without the sums in eval mode.
  __device__ __forceinline__ ChannelGradient(const BackwardParams& p, const Affine<A>& affine, A invstd, A sum_dy,
                                             A sum_dy_xmu)
      : affine(affine) {
    const A inverse = p.training ? A(1) / static_cast<A>(p.count) : A(0);
    gradient = {affine.mean, affine.scale, p.training ? sum_dy * inverse : A(0),
                p.training ? sum_dy_xmu * inverse * invstd * invstd : A(0)};
  }
};

// Of some channels, given the sums.
template <class A, int WIDTH>
__device__ __forceinline__ void make_gradient(ChannelGradient<A> (&gradient)[WIDTH], const BackwardParams& p,
                                              const Channels<WIDTH>& channels, const A (&sum_dy)[WIDTH],
                                              const A (&sum_dy_xmu)[WIDTH]) {
  Affine<A> affine[WIDTH];
  A invstd[WIDTH];
  load_affine(affine, invstd, p, channels);
#pragma unroll
  for (int e = 0; e < WIDTH; ++e) gradient[e] = {p, affine[e], invstd[e], sum_dy[e], sum_dy_xmu[e]};
}

// By the sums in memory, which eval mode does without.
template <class A, int WIDTH>
__device__ __forceinline__ void load_gradient(ChannelGradient<A> (&gradient)[WIDTH], const BackwardParams& p,
                                              const Channels<WIDTH>& channels) {
  A sum_dy[WIDTH], sum_dy_xmu[WIDTH];
  load_vector(sum_dy, p.training ? p.sum_dy : nullptr, dtype_of<A>::value, channels, A(0));
  load_vector(sum_dy_xmu, p.training ? p.sum_dy_xmu : nullptr, dtype_of<A>::value, channels, A(0));
  make_gradient(gradient, p, channels, sum_dy, sum_dy_xmu);
}

template <class T, int N, int COUNT, bool WHOLE, class Source, class ChannelAt>
__device__ __forceinline__ void backward_input_chunk(const BackwardParams& p, const Chunk<COUNT, WHOLE>& chunk,
                                                     Source& source, Gate gate, const ChannelAt& channel) {
  using A = acc_t<T>;
  for_gradient_vecs<T, N>(
      p, chunk, source, gate, [&](int e) { return channel(e).affine; },
      [&](int k, GradientVec<T, N>& vec) {
        if (gate == Gate::mask && p.dresidual) {
          store_at(static_cast<T*>(p.dresidual), chunk, k, narrow_vec<T, N>(vec.dy));
        }
        if (!p.dx) return;
        A dx[N];
        if (p.training) {
#pragma unroll
          for (int e = 0; e < N; ++e) dx[e] = channel(e).gradient(vec.dy[e], vec.x[e]);
        } else {  // x must not touch the gradient, not even an infinite x
#pragma unroll
          for (int e = 0; e < N; ++e) dx[e] = vec.dy[e] * channel(e).gradient.scale;
        }
        store_at(static_cast<T*>(p.dx), chunk, k, narrow_vec<T, N>(dx));
      });
}

template <class T, int N, class Source>
__device__ __forceinline__ void backward_input_strip(const BackwardParams& p, const Partition& partition,
                                                     const WorkTile& work, Source&& source, Gate gate,
                                                     const ChannelGradient<acc_t<T>>& channel) {
  iterate_planar<N, true, kGradientChunk<T, N, false>>(partition, p.shape, work, [&](const auto& chunk) {
    backward_input_chunk<T, N>(p, chunk, source, gate, [&](int) { return channel; });
  });
}

template <class T, int N>
__device__ __forceinline__ void backward_input_planar(const BackwardParams& p, const Partition& partition,
                                                      const WorkTile& work, Gate gate) {
  ChannelGradient<acc_t<T>> channel[1];
  load_gradient(channel, p, Channels<1>(work.tile));
  backward_input_strip<T, N>(p, partition, work, gradient_from_global<T, N, Reuse::last>(p), gate, channel[0]);
}

// PARTIAL: the last matrix row may end within a vector.
template <class T, int N, bool PARTIAL, class Source>
__device__ __forceinline__ void backward_input_tile(const BackwardParams& p, const Partition& partition,
                                                    const WorkTile& work, const ColumnPlace<N>& place, Source&& source,
                                                    Gate gate, const ChannelGradient<acc_t<T>> (&channel)[N]) {
  iterate_columns<N, kGradientChunk<T, N, true>, PARTIAL>(
      partition, p.shape.numel(), work, place, [&](const auto& chunk) {
        backward_input_chunk<T, N>(p, chunk, source, gate, [&](int e) { return channel[e]; });
      });
}

template <class T, int N>
__device__ __forceinline__ void backward_input_columns(const BackwardParams& p, const Partition& partition,
                                                       const WorkTile& work, Gate gate) {
  const ColumnPlace<N> place(partition, work);
  if (!place.active) return;
  ChannelGradient<acc_t<T>> channel[N];
  load_gradient(channel, p, Channels<N>(partition, p.shape, place.col));
  backward_input_tile<T, N, true>(p, partition, work, place, gradient_from_global<T, N, Reuse::last>(p), gate, channel);
}

}  // namespace bnext::cuda
