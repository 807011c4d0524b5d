// The two halves of the backward on one block: the sums of dy' and dy' * (x - mean), and the
// input gradient. dy' is dy times the activation's derivative.
#pragma once

#include "normalize_kernel.h"

namespace bnext::cpu {
namespace {

// dy' of a row, by the derivative of the activation. The common derivatives, of a compare and a selection, are taken on
// the way, from x - mean, which is there for the sums anyway. at(j, part) is a function of it, for the vector at column
// j of the row that begins `ahead` elements on.
template <class T, Derivative from, bool by_column> struct DyPrime {
  using A = acc_t<T>;
  const T* dy;  // at the row's first element, which has bit `first` of the mask
  const uint8_t* mask;
  int64_t first;
  Parameter<A, by_column> scale, bias;

  template <class P> auto at(int64_t j, P part) const {
    if constexpr (from == Derivative::relu) {
      return [this, j, part, s = scale.at(j, part), b = bias.at(j, part)](int64_t ahead, const Vec<A>& xmu) {
        return relu_gate(affine(xmu, s, b), load(dy + ahead + j, part));
      };
    } else {
      return [this, j, part](int64_t ahead, const Vec<A>&) {
        const Vec<A> v = load(dy + ahead + j, part);
        if constexpr (from != Derivative::mask) return v;
        else return select_or_zero(get_bits(mask, first + ahead + j, lanes_of<A>(part)), v);
      };
    }
  }
};

// The derivatives that the `general` variant works out for a row before anything else: one loop for each activation in
// one function of its own, in place of all activations in every kernel. Other variants have none, and no buffer.
template <class A, Derivative from> struct Derivatives {};
template <class A> struct Derivatives<A, Derivative::general> { A row[kGeneralRow + kPadding]; };

template <class T, bool by_column> struct DyPrime<T, Derivative::general, by_column> {
  using A = acc_t<T>;
  const T* dy;
  const A* derivatives;
  int64_t first;

  template <class P> auto at(int64_t j, P part) const {
    return
        [this, j, part](int64_t, const Vec<A>&) { return through(load(dy + j, part), load(derivatives + j, Full{})); };
  }
};

// Into `row`, by the bits that the forward kept, or by the activation's argument, found again.
template <class T, bool by_column>
[[gnu::noinline, gnu::flatten]] void derivatives_of_row(const BackwardArgs<acc_t<T>>& args, int64_t first,
                                                        int64_t channel, int64_t width, acc_t<T>* row) {
  using A = acc_t<T>;
  if (args.mask == nullptr) {
    // z as the forward found it, then its derivative in place.
    arguments_of_row<T, by_column>(args, first, channel, width, row);
    derivatives(args.activation, args.activation_param, row, width);
    return;
  }
  // A bit that is not set stands for the activation's parameter: the slope of leaky_relu, 0 for all others.
  const Vec<A> one(A(1)), other(args.activation_param);
  fill_row(row, width, [&](int64_t j, auto part) {
    return where_le(select_or_zero(get_bits(args.mask, first + j, lanes_of<A>(part)), one), 0, other, one);
  });
}

template <class T, Derivative from, bool by_column>
DyPrime<T, from, by_column> dy_prime_of_row(const BackwardArgs<acc_t<T>>& args, int64_t first, int64_t channel,
                                            int64_t width, Derivatives<acc_t<T>, from>& derivatives) {
  if constexpr (from == Derivative::general) {
    derivatives_of_row<T, by_column>(args, first, channel, width, derivatives.row);
    return {static_cast<const T*>(args.dy) + first, derivatives.row, first};
  } else {
    using P = Parameter<acc_t<T>, by_column>;
    // Without an activation scale and bias may be null: mean stands in for them, unread.
    const acc_t<T>* scale = (from == Derivative::relu ? args.scale : args.mean) + channel;
    const acc_t<T>* bias = (from == Derivative::relu ? args.bias : args.mean) + channel;
    return {static_cast<const T*>(args.dy) + first, args.mask, first, P(scale), P(bias)};
  }
}

// Both sums of a block of each of these channels. Sums of a block are short enough for the accumulation type; those of
// blocks are added in double, by whoever calls this.
template <class T, Derivative from>
[[gnu::flatten]] void sums(const BackwardArgs<acc_t<T>>& args, const SubMatrix& block, int64_t channels, int64_t next,
                           Sums* of_channels) {
  using A = acc_t<T>;
  using V = Vec<A>;
  Derivatives<A, from> derivatives;
  for (int64_t channel = 0; channel < channels; channel++) {
    const int64_t start = block.first + channel * block.width, param = block.param + channel;
    // Several of each, so that an addition need not wait for the one before; as many as AVX2 has registers for.
    V dys[2] = {V(0), V(0)}, products[4] = {V(0), V(0), V(0), V(0)};
    const V mean(args.mean[param]);
    const auto begin = [&](int64_t r) {
      return dy_prime_of_row<T, from, false>(args, start + r * block.stride, param, block.width, derivatives);
    };
    // A strip jumps from image to image, which no hardware prefetcher foresees.
    const int64_t following = channel + 1 < channels ? start + block.width : next;
    const Prefetcher<T> next_dy(args.dy, following), next_x(args.x, following);
    sum_rows<A>(block.rows, block.width, begin, [&](const auto& dy_prime, int64_t j, auto which, auto part) {
      const int64_t i = dy_prime.first + j;
      next_dy.fetch(i - start);
      next_x.fetch(i - start);
      const V xmu = load(static_cast<const T*>(args.x) + i, part) - mean;
      V dy = dy_prime.at(j, part)(0, xmu);
      // Derivatives that took a loop of their own are not found twice: the gradient reads dy' instead.
      if constexpr (from == Derivative::general) {
        if (args.dz != nullptr) store(static_cast<T*>(args.dz) + i, part, dy);
      }
      // Both factors: 0 times an infinite x of a lane that does not count would be NaN.
      dy = zero_inactive(part, dy);
      V& sum = dys[which.value / 2];
      sum = sum + dy;
      products[which.value] = fma(dy, zero_inactive(part, xmu), products[which.value]);
    });
    // In double from here on: what is added up next are blocks, of which there may be thousands.
    of_channels[channel] = {sum(dys), sum(products)};
  }
}

// Adds `rows` rows, a constant, to the sums of each column: the more at once, the less traffic of sums. `left` rows
// follow.
template <class T, Derivative from, int rows, class A = acc_t<T>>
void add_rows(const BackwardArgs<A>& args, Derivatives<A, from>& derivatives, int64_t first, int64_t stride,
              int64_t width, int64_t left, int64_t param, A* dys, A* products) {
  using V = Vec<A>;
  const T* x = static_cast<const T*>(args.x) + first;
  const Parameter<A, true> mean(args.mean + param);
  const auto dy_prime = dy_prime_of_row<T, from, true>(args, first, param, width, derivatives);
  const int64_t next = first + std::min(Prefetcher<T>::rows_ahead(stride), left) * stride;
  const Prefetcher<T> next_dy(args.dy, next), next_x(args.x, next);
  // Columns have sums of their own: none comes twice. The sums are loaded and stored once for all of these rows.
  for_each_vector<A>(width, Tail::partial, [&](int64_t j, auto part) {
    const V m = mean.at(j, part);
    const auto dy_prime_j = dy_prime.at(j, part);
    V dy_sum = load(dys + j, Full{}), product = load(products + j, Full{});
    for (int r = 0; r < rows; r++) {
      next_dy.fetch(r * stride + j);
      next_x.fetch(r * stride + j);
      const V xmu = load(x + r * stride + j, part) - m;
      const V dy = dy_prime_j(r * stride, xmu);
      if constexpr (from == Derivative::general) {
        if (args.dz != nullptr) store(static_cast<T*>(args.dz) + first + j, part, dy);
      }
      dy_sum = dy_sum + dy;
      product = fma(dy, xmu, product);
    }
    store(dys + j, Full{}, dy_sum);
    store(products + j, Full{}, product);
  });
}

// Likewise of each column. Every kColumnRows rows the sums go on in double, before they lose digits to their own size.
template <class T, Derivative from>
[[gnu::flatten]] void column_sums(const BackwardArgs<acc_t<T>>& args, const SubMatrix& block, double* sum_dy,
                                  double* sum_dy_xmu) {
  using A = acc_t<T>;
  using V = Vec<A>;
  using D = Vec<double>;
  for (int64_t j = 0; j < block.width; j += D::lanes) {
    store(sum_dy + j, Full{}, D(0.0));
    store(sum_dy_xmu + j, Full{}, D(0.0));
  }
  Derivatives<A, from> derivatives;
  // Arrays of a block's columns, of 2 KB each, stay in the first-level cache beside the rows that pass.
  A dys[kColumns + kPadding], products[kColumns + kPadding];
  for (int64_t begin = 0; begin < block.rows; begin += kColumnRows) {
    const int64_t end = begin + kColumnRows < block.rows ? begin + kColumnRows : block.rows;
    for (int64_t j = 0; j < block.width; j += V::lanes) {
      store(dys + j, Full{}, V(0));
      store(products + j, Full{}, V(0));
    }
    // Rows share a load and a store of the sums, which is what bounds this loop.
    int64_t r = begin;
    const auto add = [&](auto rows) {
      add_rows<T, from, rows.value>(args, derivatives, block.first + r * block.stride, block.stride, block.width,
                                    block.rows - r - rows.value, block.param, dys, products);
    };
    // `general` has the derivatives of one row at a time.
    if constexpr (from != Derivative::general) {
      for (; r + kRowsAtOnce <= end; r += kRowsAtOnce) add(Index<kRowsAtOnce>{});
    }
    for (; r < end; r++) add(Index<1>{});
    for (int64_t j = 0; j < block.width; j += D::lanes) {
      store(sum_dy + j, Full{}, load_as_double(sum_dy + j) + load_as_double(dys + j));
      store(sum_dy_xmu + j, Full{}, load_as_double(sum_dy_xmu + j) + load_as_double(products + j));
    }
  }
}

// Whether x is read: in eval mode, where dx = dy' * scale, only if the activation asks for it. dx does not depend on x
// then, which may be missing, and must not: an infinite x would make it NaN.
template <Derivative from, bool training> constexpr bool kReadsX = training || from == Derivative::relu;

// The input gradient of the rows of a block.
template <class T, Derivative from, bool training, bool by_column, class Row>
[[gnu::flatten]] void gradient_rows(const BackwardArgs<acc_t<T>>& args, const SubMatrix& block,
                                    const Streaming& streaming) {
  using A = acc_t<T>;
  using V = Vec<A>;
  using P = Parameter<A, by_column>;
  constexpr bool reads_x = kReadsX<from, training>;
  Derivatives<A, from> derivatives;
  T *const to_dx = static_cast<T*>(args.dx), *const to_dresidual = static_cast<T*>(args.dresidual);
  // In place, where the sums left dy' in dx, what was stored is not to be loaded again. Rows of columns seldom have a
  // tail.
  const Tail tail = by_column || args.dx == args.dy ? Tail::partial : Tail::overlapping;
  const int64_t rows_ahead = Prefetcher<T>::rows_ahead(block.stride);
  // `rows`, a constant, of them from row r on.
  const auto run = [&](auto rows, int64_t r) {
    const int64_t first = block.first + r * block.stride;
    const int64_t channel = block.param + r * block.param_step;
    const T* x = static_cast<const T*>(args.x) + (reads_x ? first : 0);
    T* dx = to_dx + (to_dx != nullptr ? first : 0);
    T* dresidual = to_dresidual + (to_dresidual != nullptr ? first : 0);
    const Row row(streaming, block, r, dx != nullptr ? dx : dresidual);
    const P mean(args.mean + channel), scale(args.scale + channel);
    // In eval mode these two are null: mean stands in for them, unread.
    const P mean_dy((training ? args.mean_dy : args.mean) + channel);
    const P slope((training ? args.slope : args.mean) + channel);
    const auto dy_prime = dy_prime_of_row<T, from, by_column>(args, first, channel, block.width, derivatives);
    const int64_t next = first + std::min(rows_ahead, block.rows - rows.value - r) * block.stride;
    const Prefetcher<T> next_dy(args.dy, next), next_x(args.x, next);
    const Prefetcher<T> next_output(to_dx != nullptr ? to_dx : to_dresidual, next);
    for_each_vector<A>(row, block.width, tail, [&](int64_t j, auto part) {
      const V &mean_j = mean.at(j, part), &scale_j = scale.at(j, part);
      const V &mean_dy_j = mean_dy.at(j, part), &slope_j = slope.at(j, part);
      const auto dy_prime_j = dy_prime.at(j, part);
      for (int k = 0; k < rows.value; k++) {
        const int64_t i = k * block.stride + j;
        if constexpr (Row::fetches && by_column) {
          next_dy.fetch(i);
          if constexpr (reads_x) next_x.fetch(i);
          next_output.fetch(i);
        }
        V xmu(0);
        if constexpr (reads_x) xmu = load(x + i, part) - mean_j;
        const V dy = dy_prime_j(k * block.stride, xmu);
        // The residual is added before the activation, so that its gradient is dy'.
        if (dresidual != nullptr) store(dresidual + i, part, dy);
        if (dx == nullptr) continue;
        if constexpr (training) store(dx + i, part, input_gradient(dy, xmu, mean_dy_j, slope_j, scale_j));
        else store(dx + i, part, dy * scale_j);
      }
    });
  };
  for_each_rows<A, Row, by_column && from != Derivative::general>(streaming, block, /*in_order=*/false, run);
}

// The block.
template <class T, Derivative from, bool training, bool by_column>
void gradient(const BackwardArgs<acc_t<T>>& args, const SubMatrix& block) {
  // Not in training, where rows seldom follow each other; `general` has the derivatives of one row at a time.
  constexpr bool seams = !training && !by_column && from != Derivative::general;
  const void* const x = kReadsX<from, training> ? args.x : nullptr;
  const Streaming streaming = streaming_of<T>(args.beyond_cache, block, seams, {args.dy, x}, {args.dx, args.dresidual});
  with_rows<seams>(streaming, [&](auto row) {
    gradient_rows<T, from, training, by_column, typename decltype(row)::type>(args, block, streaming);
  });
}

}  // namespace
}  // namespace bnext::cpu
