// What the two stages of the backward share: the gate that the activation left, and a unit of dy'.
#pragma once

#include "../core/epilogue.h"
#include "vec.cuh"
#include "walk.cuh"

namespace bnext::cuda {

// What decides where the gradient passes: nothing, the sign recomputed from x, or the forward's mask.
enum class Gate { none, relu, mask };

inline Gate gate_of(const BackwardParams& p) {
  return p.activation != Activation::relu ? Gate::none : p.mask ? Gate::mask : Gate::relu;
}

// The forward's affine step, bit for bit: scale is weight * invstd there as well.
template <class A>
__device__ __forceinline__ Affine<A> backward_affine(const BackwardParams& p, int64_t channel) {
  const A weight = load_scalar<A>(p.weight, p.weight_dtype, channel, A(1));
  return {static_cast<const A*>(p.mean)[channel], weight * static_cast<const A*>(p.invstd)[channel],
          load_scalar<A>(p.bias, p.weight_dtype, channel, A(0))};
}

template <class T, int UNIT>
struct GradientUnit {
  acc_t<T> dy[UNIT];  // dy'
  acc_t<T> x[UNIT];
};

// The chunk's dy, x and mask from memory, then unit by unit to body(k, GradientUnit).
template <Reuse REUSE, class T, int UNIT, int COUNT, bool WHOLE, class AffineAt, class Body>
__device__ __forceinline__ void for_gradient_units(const BackwardParams& p, const Chunk<COUNT, WHOLE>& chunk, Gate gate,
                                                   const AffineAt& affine, Body&& body) {
  const int64_t numel = p.shape.numel();
  Unit<T, UNIT> dy[COUNT], x[COUNT];
  uint32_t bits[COUNT];
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    dy[k] = load_at<REUSE, UNIT, WHOLE>(static_cast<const T*>(p.dy), chunk.offset[k], numel);
    x[k] = load_at<REUSE, UNIT, WHOLE>(static_cast<const T*>(p.x), chunk.offset[k], numel);
    // One byte a unit of 8; the two-pass plan and the small plan see to it that masked units are such.
    bits[k] = gate == Gate::mask && (WHOLE || chunk.offset[k] < numel) ? p.mask[chunk.offset[k] >> 3] : 0;
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
