// y = act(affine(x) + residual) on one block.
#pragma once

#include "activation_kernel.h"

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

// f(j, part) into a buffer, to the end of the row's last vector.
template <class A, class F>
void fill_row(A* row, int64_t width, F f) {
  for_each_vector<A>(width, Tail::partial, [&](int64_t j, auto part) { store(row + j, Full{}, f(j, part)); });
}

// The affine step of a row's vector at column j.
template <class A, bool by_column> struct VecAffine {
  Parameter<A, by_column> mean, scale, bias;
  Vec<A> operator()(const Vec<A>& x, int64_t j) const { return affine(x - mean.at(j), scale.at(j), bias.at(j)); }
};

// z of the `width` elements of a row that begin at element `first`, the rest of its last vector included. Forward and
// backward both take it from here, so that they stand on the same side of an activation's kinks.
template <class T, bool by_column, class Args>
[[gnu::noinline, gnu::flatten]] void arguments_of_row(const Args& args, int64_t first, int64_t channel, int64_t width,
                                                      acc_t<T>* z) {
  using A = acc_t<T>;
  const T* x = static_cast<const T*>(args.x) + first;
  const Parameter<A, by_column> mean(args.mean + channel), scale(args.scale + channel), bias(args.bias + channel);
  const VecAffine<A, by_column> affine{mean, scale, bias};
  const Prefetcher<T> ahead(args.x, first + Prefetcher<T>::kDistance);
  const auto normalized = [&](int64_t j, auto part) {
    if constexpr (by_column) ahead.fetch(j);
    return affine(load(x + j, part), j);
  };
  // Two loops rather than a test in one: this is all that a general kernel does per element beside the activation.
  if (args.residual == nullptr) {
    fill_row(z, width, normalized);
  } else {
    const T* residual = static_cast<const T*>(args.residual) + first;
    fill_row(z, width, [&](int64_t j, auto part) { return normalized(j, part) + load(residual + j, part); });
  }
}

// Whether each store to a block's rows has whole bytes of the mask, which can then be written in any order.
template <class T>
bool has_whole_bytes(const SubMatrix& block, const T* y) {
  const int64_t head = Streaming::before_line(y + block.first);
  return (block.first | block.stride | head) % 8 == 0 && block.width % Vec<acc_t<T>>::lanes == 0;
}

// Without an activation, and with relu.
template <class T, Epilogue epilogue, bool by_column>
[[gnu::flatten]] void normalize(const NormalizeArgs<acc_t<T>>& args, const SubMatrix& block) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr bool adds = epilogue == Epilogue::add || epilogue == Epilogue::add_relu;
  uint8_t* const mask = args.mask;  // loaded once: for all the compiler knows, stores to y may change it
  Stores stores = stores_of<T>(args.beyond_cache, block, {args.x, adds ? args.residual : nullptr}, {args.y});
  if (mask != nullptr && stores != Stores::to_cache && !has_whole_bytes(block, static_cast<const T*>(args.y)))
    stores = Stores::past_caches;
  const int64_t distance = Prefetcher<T>::distance(block, stores);
  for (int64_t i = 0; i < block.rows; i++) {
    const int64_t r = row_at(stores, i, block.rows);
    const int64_t first = block.first + r * block.stride;
    const int64_t channel = block.param + r * block.param_step;
    const T* x = static_cast<const T*>(args.x) + first;
    const T* residual = static_cast<const T*>(args.residual) + (adds ? first : 0);
    T* y = static_cast<T*>(args.y) + first;
    // Decided for each row, since rows begin at any place of a cache line.
    const Streaming streaming(stores, block, y);
    const Parameter<A, by_column> mean(args.mean + channel), scale(args.scale + channel), bias(args.bias + channel);
    const VecAffine<A, by_column> affine{mean, scale, bias};
    const Prefetcher<T> ahead(args.x, first + distance);
    for_each_vector<A>(streaming, block.width, Tail::overlapping, [&](int64_t j, auto part) {
      // Rows of columns load parameters besides, among which the hardware loses track of x.
      ahead.fetch(j);
      V v = affine(load(x + j, part), j);
      if constexpr (adds) v = v + load(residual + j, part);
      // The bit is of the sum before it is rounded to T: the backward asks for the very z that relu saw.
      if constexpr (epilogue == Epilogue::add_relu) {
        if (mask != nullptr) put_bits(mask, first + j, lanes_of<A>(part), positive_bits(v));
      }
      if constexpr (epilogue == Epilogue::relu || epilogue == Epilogue::add_relu) v = relu(v);
      store(y + j, part, v);
    });
  }
}

// With any activation: z of a row goes to a buffer that stays in the first-level cache, and one activation's loop over
// it. The activations' code is there once, and not in each of these kernels.
template <class T, bool by_column>
[[gnu::flatten]] void normalize_general(const NormalizeArgs<acc_t<T>>& args, const SubMatrix& block) {
  using A = acc_t<T>;
  // 8 KB each of float: both stay in the first-level cache.
  A z[kGeneralRow + kPadding], kept[kGeneralRow + kPadding];
  for (int64_t r = 0; r < block.rows; r++) {
    const int64_t first = block.first + r * block.stride;
    arguments_of_row<T, by_column>(args, first, block.param + r * block.param_step, block.width, z);
    if (args.mask != nullptr) {
      // A copy, since the values need z as well.
      fill_row(kept, block.width, [&](int64_t j, auto) { return load(z + j, Full{}); });
      mask_bits(args.activation, kept, block.width);
      for_each_vector<A>(block.width, Tail::overlapping, [&](int64_t j, auto part) {
        put_bits(args.mask, first + j, lanes_of<A>(part), positive_bits(load(kept + j, Full{})));
      });
    }
    values(args.activation, args.activation_param, z, block.width);
    T* y = static_cast<T*>(args.y) + first;
    const Streaming streaming(args.beyond_cache ? Stores::past_caches : Stores::to_cache, block, y);
    for_each_vector<A>(streaming, block.width, Tail::overlapping,
                       [&](int64_t j, auto part) { store(y + j, part, load(z + j, Full{})); });
  }
}

}  // namespace
}  // namespace bnext::cpu
