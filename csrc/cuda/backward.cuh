// What the two stages of the backward share: the gate that the activation left, and a unit of dy'.
#pragma once

#include "../core/epilogue.h"
#include "channels.cuh"
#include "source.cuh"

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

template <class T, int UNIT>
struct GradientUnit {
  acc_t<T> dy[UNIT];  // dy'
  acc_t<T> x[UNIT];
};

// Where a pass gets dy and x from.
template <class SourceOfDy, class SourceOfX>
struct GradientSource {
  SourceOfDy dy;
  SourceOfX x;
};

template <class T, int UNIT, Reuse REUSE>
__device__ __forceinline__ auto gradient_from_memory(const BackwardParams& p) {
  using Source = FromMemory<T, UNIT, REUSE>;
  return GradientSource<Source, Source>{Source(p.dy, p.shape), Source(p.x, p.shape)};
}

// The chunk's dy, x and mask, then unit by unit to body(k, GradientUnit).
template <class T, int UNIT, int COUNT, bool WHOLE, class Source, class AffineAt, class Body>
__device__ __forceinline__ void for_gradient_units(const BackwardParams& p, const Chunk<COUNT, WHOLE>& chunk,
                                                   Source& source, Gate gate, const AffineAt& affine, Body&& body) {
  Unit<T, UNIT> dy[COUNT], x[COUNT];
  source.dy.load(chunk, dy);
  source.x.load(chunk, x);
  uint32_t bits[COUNT];
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    // One byte a unit of 8; plans see to it that masked units are such.
    bits[k] =
        gate == Gate::mask && (WHOLE || int64_t{chunk.unit[k]} * UNIT < p.shape.numel()) ? p.mask[chunk.unit[k]] : 0;
  }
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    GradientUnit<T, UNIT> unit;
    widen_unit<T, UNIT>(dy[k], unit.dy);
    widen_unit<T, UNIT>(x[k], unit.x);
#pragma unroll
    for (int e = 0; e < UNIT; ++e) {
      bool pass = true;
      if (gate == Gate::relu) pass = passes(affine(e)(unit.x[e]));
      if (gate == Gate::mask) pass = bits[k] >> (e % 8) & 1;
      if (!pass) unit.dy[e] = acc_t<T>(0);
    }
    body(k, unit);
  }
}

}  // namespace bnext::cuda
