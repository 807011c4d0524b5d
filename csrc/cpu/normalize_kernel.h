// y = act(affine(x) + residual) on one block.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace bnext::cpu {
namespace {

// A channel's parameter along a row: one number, or an array with an entry for each column.
template <class A, bool by_column> struct Parameter;
template <class A> struct Parameter<A, false> {
  Vec<A> v;
  explicit Parameter(const A* p) : v(*p) {}
  Vec<A> at(int64_t) const { return v; }
};
template <class A> struct Parameter<A, true> {
  const A* p;
  explicit Parameter(const A* q) : p(q) {}
  Vec<A> at(int64_t j) const { return load(p + j, Full{}); }
};

// epilogue.h's Affine, on vectors.
template <class A, bool by_column> struct VecAffine {
  Parameter<A, by_column> mean, scale, bias;
  Vec<A> operator()(const Vec<A>& x, int64_t j) const { return fma(x - mean.at(j), scale.at(j), bias.at(j)); }
};

enum class Addend { none, residual, residual_with_mask };

template <class T, Addend addend, bool by_column>
[[gnu::flatten]] void normalize(const NormalizeArgs<acc_t<T>>& args, const SubMatrix& block) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr bool masked = addend == Addend::residual_with_mask;
  const V low(args.low);
  for (int64_t r = 0; r < block.rows; r++) {
    const int64_t first = block.first + r * block.stride;
    const int64_t channel = block.param + r * block.param_step;
    const T* x = static_cast<const T*>(args.x) + first;
    const T* residual = static_cast<const T*>(args.residual) + (addend == Addend::none ? 0 : first);
    T* y = static_cast<T*>(args.y) + first;
    const bool stream = args.stream && (!masked || first % 8 == 0) && can_stream(y);
    const Parameter<A, by_column> mean(args.mean + channel), scale(args.scale + channel), bias(args.bias + channel);
    const VecAffine<A, by_column> affine{mean, scale, bias};
    const Ahead<T> ahead(args.x, first + Ahead<T>::distance);
    const auto body = [&](int64_t j, auto, auto part) {
      if constexpr (by_column) ahead.fetch(j);
      V v = affine(load(x + j, part), j);
      if constexpr (addend != Addend::none) v = v + load(residual + j, part);
      if constexpr (masked) put_bits(args.mask, first + j, lanes_of<A>(part), positive_bits(v));
      store(y + j, part, max_keep_nan(low, v), stream);
    };
    if constexpr (masked) {
      sweep_bytes<A>(first, block.width, body);
    } else {
      sweep<A>(block.width, body);
    }
  }
  if (args.stream) stream_fence();
}

}  // namespace
}  // namespace bnext::cpu
