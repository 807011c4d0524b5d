// y = act(affine(x) + residual) on one block.
#pragma once

#include "activation_kernel.h"
#include "prefetcher.h"
#include "streaming.h"

namespace bnext::cpu {
namespace {

// A channel's parameter along a row: one number, or an array with an entry for each column.
template <class A, bool by_column> struct Parameter;
template <class A> struct Parameter<A, false> {
  const A* p;
  Vec<A> v;
  explicit Parameter(const A* q) : p(q), v(*q) {}
  template <class P> const Vec<A>& at(int64_t, P) const { return v; }
  Vec<A> at(int64_t, Seam seam) const { return joined(v, Vec<A>(p[1]), seam.n); }
};
template <class A> struct Parameter<A, true> {
  const A* p;
  explicit Parameter(const A* q) : p(q) {}
  template <class P> Vec<A> at(int64_t j, P) const { return load(p + j, Full{}); }
  Vec<A> at(int64_t j, Partial part) const { return load(p + j, part); }  // another task may be writing what follows
};

// f(j, part) into a buffer, to the end of the row's last vector.
template <class A, class F>
void fill_row(A* row, int64_t width, F f) {
  for_each_vector<A>(width, Tail::partial, [&](int64_t j, auto part) { store(row + j, Full{}, f(j, part)); });
}

// z of the `width` elements of a row that begin at element `first`, the rest of its last vector included. Forward and
// backward both take it from here, so that they stand on the same side of an activation's kinks.
template <class T, bool by_column, class Args>
[[gnu::noinline, gnu::flatten]] void arguments_of_row(const Args& args, int64_t first, int64_t channel, int64_t width,
                                                      acc_t<T>* z) {
  using A = acc_t<T>;
  const T* x = static_cast<const T*>(args.x) + first;
  const Parameter<A, by_column> mean(args.mean + channel), scale(args.scale + channel), bias(args.bias + channel);
  const Prefetcher<T> ahead(args.x, first + Prefetcher<T>::kDistance);
  const auto normalized = [&](int64_t j, auto part) {
    if constexpr (by_column) ahead.fetch(j);
    return affine(load(x + j, part) - mean.at(j, part), scale.at(j, part), bias.at(j, part));
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
bool has_whole_bytes(const Streaming& streaming, const SubMatrix& block, const T* y) {
  const int64_t head = Streaming::before_line(y + block.first);
  if (streaming.seams) return (block.first + head) % 8 == 0;
  return (block.first | block.stride | head) % 8 == 0 && block.width % Vec<acc_t<T>>::lanes == 0;
}

// The rows of a block, without an activation or with relu.
template <class T, Epilogue epilogue, bool by_column, class Row>
[[gnu::flatten]] void normalize_rows(const NormalizeArgs<acc_t<T>>& args, const SubMatrix& block,
                                     const Streaming& streaming, bool in_order) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr bool adds = epilogue == Epilogue::add || epilogue == Epilogue::add_relu;
  uint8_t* const mask = args.mask;  // loaded once: for all the compiler knows, stores to y may change it
  const int64_t distance = Prefetcher<T>::distance(block), rows_ahead = Prefetcher<T>::rows_ahead(block.stride);
  constexpr Tail tail = by_column ? Tail::partial : Tail::overlapping;  // rows of columns seldom have one
  // `rows`, a constant, of them from row r on.
  const auto run = [&](auto rows, int64_t r) {
    const int64_t first = block.first + r * block.stride;
    const int64_t channel = block.param + r * block.param_step;
    const T* x = static_cast<const T*>(args.x) + first;
    const T* residual = static_cast<const T*>(args.residual) + (adds ? first : 0);
    T* y = static_cast<T*>(args.y) + first;
    const Row row(streaming, block, r, y);
    const Parameter<A, by_column> mean(args.mean + channel), scale(args.scale + channel), bias(args.bias + channel);
    const int64_t next =
        first + (by_column ? std::min(rows_ahead, block.rows - rows.value - r) * block.stride : distance);
    const Prefetcher<T> next_x(args.x, next), next_y(args.y, next);
    for_each_vector<A>(row, block.width, tail, [&](int64_t j, auto part) {
      const V &mean_j = mean.at(j, part), &scale_j = scale.at(j, part), &bias_j = bias.at(j, part);
      for (int k = 0; k < rows.value; k++) {
        const int64_t i = k * block.stride + j;
        if constexpr (Row::fetches) next_x.fetch(i);
        if constexpr (Row::fetches && by_column) next_y.fetch(i);
        V v = affine(load(x + i, part) - mean_j, scale_j, bias_j);
        if constexpr (adds) v = v + load(residual + i, part);
        // The bit is of the sum before it is rounded to T: the backward asks for the very z that relu saw.
        if constexpr (epilogue == Epilogue::add_relu) {
          if (mask != nullptr) put_bits(mask, first + i, lanes_of<A>(part), positive_bits(v));
        }
        if constexpr (epilogue == Epilogue::relu || epilogue == Epilogue::add_relu) v = relu(v);
        store(y + i, part, v);
      }
    });
  };
  for_each_rows<A, Row, by_column>(streaming, block, in_order, run);
}

// The block.
template <class T, Epilogue epilogue, bool by_column>
void normalize(const NormalizeArgs<acc_t<T>>& args, const SubMatrix& block) {
  constexpr bool adds = epilogue == Epilogue::add || epilogue == Epilogue::add_relu;
  Streaming streaming = streaming_of<T>(args.beyond_cache, block, /*seams=*/!by_column,
                                        {args.x, adds ? args.residual : nullptr}, {args.y});
  const bool in_order = args.mask != nullptr && !has_whole_bytes(streaming, block, static_cast<const T*>(args.y));
  if (in_order) streaming.backwards = false;
  with_rows<!by_column>(streaming, [&](auto row) {
    normalize_rows<T, epilogue, by_column, typename decltype(row)::type>(args, block, streaming, in_order);
  });
}

// With any activation: z of a row goes to a buffer that stays in the first-level cache, and one activation's loop over
// it. The activations' code is there once, and not in each of these kernels.
template <class T, bool by_column>
[[gnu::flatten]] void normalize_general(const NormalizeArgs<acc_t<T>>& args, const SubMatrix& block) {
  using A = acc_t<T>;
  A z[kGeneralRow + kPadding];  // 8 KB of float: stays in the first-level cache
  const Streaming streaming = streaming_of<T>(args.beyond_cache, block, /*seams=*/false, {}, {args.y});
  for (int64_t r = 0; r < block.rows; r++) {
    const int64_t first = block.first + r * block.stride;
    arguments_of_row<T, by_column>(args, first, block.param + r * block.param_step, block.width, z);
    if (args.mask != nullptr) write_mask(args.activation, z, block.width, args.mask, first);
    values(args.activation, args.activation_param, z, block.width);
    T* y = static_cast<T*>(args.y) + first;
    with_rows<false>(streaming, [&](auto type) {
      const typename decltype(type)::type row(streaming, block, r, y);
      for_each_vector<A>(row, block.width, Tail::overlapping,
                         [&](int64_t j, auto part) { store(y + j, part, load(z + j, Full{})); });
    });
  }
}

}  // namespace
}  // namespace bnext::cpu
