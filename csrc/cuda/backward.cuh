// What the two stages of the backward share: the gate that the activation left, and a vector of dy'.
#pragma once

#include "../core/epilogue.h"
#include "channels.cuh"
#include "loaders.cuh"

namespace bnext::cuda {

// What decides where the gradient passes: nothing, the sign recomputed from x, or the forward's mask.
enum class Gate { none, relu, mask };

inline Gate gate_of(const BackwardParams& p) {
  return p.activation != Activation::relu ? Gate::none : p.mask ? Gate::mask : Gate::relu;
}

// The forward's affine steps of some channels, bit for bit: scale is weight * invstd there as well. And invstd.
template <class A, int WIDTH>
__device__ __forceinline__ void load_affine(Affine<A> (&affine)[WIDTH], A (&invstd)[WIDTH], const BackwardParams& p,
                                            const Channels<WIDTH>& channels) {
  A mean[WIDTH], weight[WIDTH], bias[WIDTH];
  load_vector<A>(mean, p.mean, channels);
  load_vector<A>(invstd, p.invstd, channels);
  load_vector(weight, p.weight, p.weight_dtype, channels, A(1));
  load_vector(bias, p.bias, p.weight_dtype, channels, A(0));
#pragma unroll
  for (int e = 0; e < WIDTH; ++e) affine[e] = {mean[e], weight[e] * invstd[e], bias[e]};
}

template <class A>
__device__ __forceinline__ Affine<A> load_affine(const BackwardParams& p, int64_t channel) {
  Affine<A> affine[1];
  A invstd[1];
  load_affine(affine, invstd, p, Channels<1>(channel));
  return affine[0];
}

template <class T, int N>
struct GradientVec {
  acc_t<T> dy[N];  // dy'
  acc_t<T> x[N];
};

// Where a pass gets dy and x from.
template <class SourceOfDy, class SourceOfX>
struct GradientSource {
  SourceOfDy dy;
  SourceOfX x;
};

template <class T, int N, Reuse REUSE>
__device__ __forceinline__ auto gradient_from_global(const BackwardParams& p) {
  using Source = FromGlobal<T, N, REUSE>;
  return GradientSource<Source, Source>{Source(p.dy, p.shape), Source(p.x, p.shape)};
}

// The chunk's dy, x and mask, then vector by vector to body(k, GradientUnit).
template <class T, int N, int COUNT, bool WHOLE, class Source, class AffineAt, class Body>
__device__ __forceinline__ void for_gradient_vecs(const BackwardParams& p, const Chunk<COUNT, WHOLE>& chunk,
                                                  Source& source, Gate gate, const AffineAt& affine, Body&& body) {
  Vec<T, N> dy[COUNT], x[COUNT];
  source.dy.load(chunk, dy);
  source.x.load(chunk, x);
  uint32_t bits[COUNT];
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    // One byte a vector of 8; plans see to it that masked vectors are such.
    bits[k] = gate == Gate::mask && (WHOLE || int64_t{chunk.vec[k]} * N < p.shape.numel()) ? p.mask[chunk.vec[k]] : 0;
  }
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    GradientVec<T, N> vec;
    widen_vec<T, N>(dy[k], vec.dy);
    widen_vec<T, N>(x[k], vec.x);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      bool positive = true;
      if (gate == Gate::relu) positive = is_positive(affine(e)(vec.x[e]));
      if (gate == Gate::mask) positive = bits[k] >> (e % 8) & 1;
      if (!positive) vec.dy[e] = acc_t<T>(0);
    }
    body(k, vec);
  }
}

}  // namespace bnext::cuda
