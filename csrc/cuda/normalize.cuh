// The stage `normalize` for one block: x, residual? -> y, mask?. Used by normalize.cu and by the
// small plan of forward.cu.
#pragma once

#include "../core/epilogue.h"
#include "../core/welford.h"
#include "source.cuh"

namespace bnext::cuda {

// What follows the affine step. A kernel of the two-pass plan passes a constant, which folds.
enum class Epilogue { none, relu, add, add_relu };

constexpr bool adds(Epilogue e) { return e == Epilogue::add || e == Epilogue::add_relu; }
constexpr bool clips(Epilogue e) { return e == Epilogue::relu || e == Epilogue::add_relu; }
constexpr bool masks(Epilogue e) { return e == Epilogue::add_relu; }

inline Epilogue epilogue_of(const ForwardParams& p) {
  const bool relu = p.activation == Activation::relu;
  return p.residual ? (relu ? Epilogue::add_relu : Epilogue::add) : (relu ? Epilogue::relu : Epilogue::none);
}

// Units of each of x and residual that a thread has in flight.
template <class T, int UNIT> constexpr int kApplyChunk = units_in<T, UNIT>(64);

template <class A>
__device__ __forceinline__ Affine<A> with_parameters(const ForwardParams& p, int64_t channel, A mean, A invstd) {
  const A weight = load_scalar<A>(p.weight, p.weight_dtype, channel, A(1));
  return {mean, weight * invstd, load_scalar<A>(p.bias, p.weight_dtype, channel, A(0))};
}

// One channel's affine step, by the running statistics or by the batch's. `keep` says that this thread
// is the one to save what the running statistics gave.
template <class A>
__device__ __forceinline__ Affine<A> forward_affine(const ForwardParams& p, int64_t channel, bool by_running,
                                                    bool keep) {
  A mean, invstd;
  A* means = static_cast<A*>(p.mean);
  A* invstds = static_cast<A*>(p.invstd);
  if (by_running) {
    mean = load_scalar<A>(p.running_mean, p.running_dtype, channel, A(0));
    invstd = inverse_std(load_scalar<A>(p.running_var, p.running_dtype, channel, A(1)), p.eps);
    if (keep && means) means[channel] = mean;
    if (keep && invstds) invstds[channel] = invstd;
  } else {
    mean = means ? means[channel] : A(0);
    invstd = invstds[channel];
  }
  return with_parameters(p, channel, mean, invstd);
}

// affine(e) is the affine step of element e of a unit.
template <class T, int UNIT, int COUNT, bool WHOLE, class Source, class AffineAt>
__device__ __forceinline__ void normalize_chunk(const ForwardParams& p, const Chunk<COUNT, WHOLE>& chunk, Source& x,
                                                Epilogue epilogue, const AffineAt& affine) {
  using A = acc_t<T>;
  T* y = static_cast<T*>(p.y);

  Unit<T, UNIT> values[COUNT], added[COUNT];
  x.load(chunk, values);
  if (adds(epilogue)) FromMemory<T, UNIT, Reuse::last>(p.residual, p.shape).load(chunk, added);
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    A v[UNIT];
    uint32_t bits = 0;
    widen_unit<T, UNIT>(values[k], v);
#pragma unroll
    for (int e = 0; e < UNIT; ++e) {
      v[e] = affine(e)(v[e]);
      if (adds(epilogue)) v[e] += added[k][e];
      if (masks(epilogue)) bits |= static_cast<uint32_t>(chunk.has(k, e) && passes(v[e])) << (e % 8);
      if (clips(epilogue)) v[e] = relu(v[e]);
    }
    store_at(y, chunk, k, narrow_unit<T, UNIT>(v));
    if constexpr (UNIT == 8) {
      if (masks(epilogue) && p.mask) p.mask[chunk.offset[k] >> 3] = static_cast<uint8_t>(bits);
    }
  }
}

template <class T, int UNIT, bool ALIGNED, class Source>
__device__ __forceinline__ void normalize_share(const ForwardParams& p, const Pass& pass, const Share& share,
                                                Source&& x, Epilogue epilogue, const Affine<acc_t<T>>& affine) {
  walk_planar<UNIT, ALIGNED, kApplyChunk<T, UNIT>>(pass, p.shape, share, [&](const auto& chunk) {
    normalize_chunk<T, UNIT>(p, chunk, x, epilogue, [&](int) { return affine; });
  });
}

template <class T, int UNIT>
__device__ __forceinline__ void normalize_planar(const ForwardParams& p, const Pass& pass, const Share& share,
                                                 Epilogue epilogue, bool by_running) {
  const bool keep = share.split == 0 && threadIdx.x == 0;
  const auto affine = forward_affine<acc_t<T>>(p, share.tile, by_running, keep);
  normalize_share<T, UNIT, true>(p, pass, share, FromMemory<T, UNIT, Reuse::last>(p.x, p.shape), epilogue, affine);
}

template <class T, int UNIT, bool PARTIAL, class Source>
__device__ __forceinline__ void normalize_tile(const ForwardParams& p, const Pass& pass, const Share& share,
                                               const ColumnPlace<UNIT>& place, Source&& x, Epilogue epilogue,
                                               const Affine<acc_t<T>> (&affine)[UNIT]) {
  walk_columns<UNIT, kApplyChunk<T, UNIT>, PARTIAL>(pass, p.shape.numel(), share, place, [&](const auto& chunk) {
    normalize_chunk<T, UNIT>(p, chunk, x, epilogue, [&](int e) { return affine[e]; });
  });
}

template <class T, int UNIT>
__device__ __forceinline__ void normalize_columns(const ForwardParams& p, const Pass& pass, const Share& share,
                                                  Epilogue epilogue, bool by_running) {
  const ColumnPlace<UNIT> place(pass, share);
  if (!place.active) return;
  Affine<acc_t<T>> affine[UNIT];
#pragma unroll
  for (int e = 0; e < UNIT; ++e) {
    const ChannelColumn column(pass, p.shape, place.col + e);
    affine[e] =
        forward_affine<acc_t<T>>(p, column.channel, by_running, column.first && share.split == 0 && place.row == 0);
  }
  normalize_tile<T, UNIT, true>(p, pass, share, place, FromMemory<T, UNIT, Reuse::last>(p.x, p.shape), epilogue,
                                affine);
}

}  // namespace bnext::cuda
