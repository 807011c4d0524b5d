// Statistics of one block: sums of the deviations from a centre, and of their squares, in one sweep over the data. The
// centre is the mean of a fourth as many numbers of the same channel: docs/math.md shows that cancellation then costs
// little, whatever the data. Only where there are not so many before it does a block need a look at its own.
#pragma once

#include <type_traits>

#include "prefetcher.h"

namespace bnext::cpu {
namespace {

// The mean of the block's first fourth, rounded. It is the first element and the mean of the differences to it, which
// are exact where |mean| >> std.
template <class T>
[[gnu::flatten]] acc_t<T> centre(const void* x, const SubMatrix& block) {
  const bool few = block.rows < kPerCentre;  // then a fourth of each
  const int64_t rows = few ? block.rows : ceil_div(block.rows, kPerCentre);
  const int64_t width = few ? ceil_div(block.width, kPerCentre) : block.width;
  using A = acc_t<T>;
  using V = Vec<A>;
  const T* p = static_cast<const T*>(x) + block.first;
  A first[V::lanes];
  store(first, Full{}, load(p, Partial{1}));
  // Any element would do; this one is sure to be there.
  const V k(first[0]);
  V deviations[4] = {V(0), V(0), V(0), V(0)};
  sum_rows<A>(
      rows, width, [&](int64_t r) { return p + r * block.stride; },
      [&](const T* row, int64_t i, auto which, auto part) {
        V& d = deviations[which.value];
        d = d + zero_inactive(part, load(row + i, part) - k);
      });
  return first[0] + fast_sum(deviations) / static_cast<A>(rows * width);
}

// The mean is left as centre + offset, in double: so it has lost nothing where the next block takes it, or the end
// result.
template <class T>
[[gnu::flatten]] Welford<double> moments(const void* x, const SubMatrix& block, acc_t<T> centre, int64_t next) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const T* p = static_cast<const T*>(x) + block.first;
  const V c(centre);
  // Several of each, so that an addition need not wait for the one before; as many as AVX2 has registers for.
  V deviations[2] = {V(0), V(0)}, squares[4] = {V(0), V(0), V(0), V(0)};
  // A strip jumps from image to image, which no hardware prefetcher foresees.
  const Prefetcher<T> ahead(x, next);
  sum_rows<A>(
      block.rows, block.width, [&](int64_t r) { return r * block.stride; },
      [&](int64_t row, int64_t i, auto which, auto part) {
        ahead.fetch(row + i);
        const V d = zero_inactive(part, load(p + row + i, part) - c);
        V& sum = deviations[which.value / 2];
        sum = sum + d;
        squares[which.value] = fma(d, d, squares[which.value]);
      });
  const double count = static_cast<double>(block.rows * block.width);
  const double offset = sum(deviations) / count, var = sum(squares) / count - offset * offset;
  return {count, centre, offset, var < 0 ? 0 : var};  // a NaN stays one
}

// The same for each column. The first rows get their centre by a sweep over a fourth of them; from then on it is the
// mean of all rows before, for kPerCentre times as many. Sums of kColumnRows rows go on in double, before they lose
// digits to their own size. During the loop `var` holds M2, the sum of squared deviations.
template <class T>
[[gnu::flatten]] void column_moments(const void* x, const SubMatrix& block, acc_t<T>* shift, double* offset,
                                     double* var) {
  using A = acc_t<T>;
  using V = Vec<A>;
  using D = Vec<double>;
  const T* p = static_cast<const T*>(x) + block.first;
  const int64_t width = block.width, stride = block.stride;
  // Columns have sums of their own: none comes twice. What stands in the lanes behind the last one is never read.
  const auto each_vector = [&](auto f) { for_each_vector<A>(width, Tail::partial, f); };
  const auto each_double = [&](auto f) {
    for (int64_t j = 0; j < width; j += D::lanes) f(j);
  };

  A sums[kColumns + kPadding], squares[kColumns + kPadding];
  // Adds `rows` rows, a constant, to the sums of each column: the more at once, the less traffic of sums.
  const auto add_rows = [&](int64_t first, auto rows, auto wants_squares) {
    const T* const row = p + first * stride;
    const Prefetcher<T> next(row,
                             std::min(Prefetcher<T>::rows_ahead(stride), block.rows - first - rows.value) * stride);
    each_vector([&](int64_t j, auto part) {
      const V k = load(shift + j, Full{});
      V sum(0), square(0);
      for (int r = 0; r < rows.value; r++) {
        next.fetch(r * stride + j);
        const V d = load(row + r * stride + j, part) - k;
        sum = sum + d;
        if constexpr (wants_squares.value) square = fma(d, d, square);
      }
      store(sums + j, Full{}, load(sums + j, Full{}) + sum);
      if constexpr (wants_squares.value) store(squares + j, Full{}, load(squares + j, Full{}) + square);
    });
  };
  // The sums of at most kColumnRows rows.
  const auto sum_chunk = [&](int64_t begin, int64_t end, auto wants_squares) {
    each_vector([&](int64_t j, auto) {
      store(sums + j, Full{}, V(0));
      store(squares + j, Full{}, V(0));
    });
    int64_t r = begin;
    for (; r + kRowsAtOnce <= end; r += kRowsAtOnce) add_rows(r, Index<kRowsAtOnce>{}, wants_squares);
    for (; r < end; r++) add_rows(r, Index<1>{}, wants_squares);
  };

  const int64_t some = std::min(block.rows, kColumnRows), fourth = ceil_div(some, kPerCentre);
  each_vector([&](int64_t j, auto part) { store(shift + j, Full{}, load(p + j, part)); });
  sum_chunk(0, fourth, std::false_type{});
  const D each_of_some(1.0 / static_cast<double>(fourth));
  each_double([&](int64_t j) {
    store(shift + j, Full{}, fma(load_as_double(sums + j), each_of_some, load_as_double(shift + j)));
    store(offset + j, Full{}, D(0.0));
    store(var + j, Full{}, D(0.0));
  });

  double sums_of_all[kColumns + kPadding], squares_of_all[kColumns + kPadding];
  const auto sum_all = [&](int64_t begin, int64_t end) {
    each_double([&](int64_t j) {
      store(sums_of_all + j, Full{}, D(0.0));
      store(squares_of_all + j, Full{}, D(0.0));
    });
    for (int64_t r = begin; r < end; r += kColumnRows) {
      sum_chunk(r, std::min(r + kColumnRows, end), std::true_type{});
      each_double([&](int64_t j) {
        store(sums_of_all + j, Full{}, load_as_double(sums_of_all + j) + load_as_double(sums + j));
        store(squares_of_all + j, Full{}, load_as_double(squares_of_all + j) + load_as_double(squares + j));
      });
    }
  };
  // Where all of a column's rows are to one side of their centre, its squares cancel: moves it to their mean. Returns
  // whether there was any such column. The mean of the rows before stays where it is.
  const auto move_far_centres = [&](double rows) {
    const auto is_far = [&](int64_t j) { return 2 * sums_of_all[j] * sums_of_all[j] > squares_of_all[j] * rows; };
    int far = 0;
    for (int64_t j = 0; j < width; j++) far |= is_far(j);  // a loop for the compiler's vectors
    if (far == 0) return false;
    for (int64_t j = 0; j < width; j++) {
      if (!is_far(j)) continue;
      const double k = shift[j];
      shift[j] = static_cast<A>(k + sums_of_all[j] / rows);
      offset[j] += k - shift[j];
    }
    return true;
  };

  // Rows [begin, end) share a centre.
  for (int64_t begin = 0, end = some; begin < block.rows;
       begin = end, end = std::min((1 + kPerCentre) * end, block.rows)) {
    for (bool may_move = begin > 0;; may_move = false) {  // so that sum_all() is inlined once
      sum_all(begin, end);
      if (!may_move || !move_far_centres(static_cast<double>(end - begin))) break;
    }
    // Chan's update, and the mean, as far as it can be represented, as the next centre. All columns share their counts,
    // so that it takes no division.
    const double seen = static_cast<double>(begin), rows = static_cast<double>(end - begin), total = seen + rows;
    const D each_row(1.0 / rows), weight(rows / total), spread(seen * (rows / total)), count(rows);
    each_double([&](int64_t j) {
      const D k = load_as_double(shift + j), mean = load_as_double(sums_of_all + j) * each_row;
      const D m2 = max_keep_nan(D(0.0), fnma(mean * mean, count, load_as_double(squares_of_all + j)));
      const D delta = mean - load_as_double(offset + j), moved = fma(delta, weight, load_as_double(offset + j));
      store(var + j, Full{}, load_as_double(var + j) + fma(delta * delta, spread, m2));
      store(shift + j, Full{}, k + moved);
      store(offset + j, Full{}, (k - load_as_double(shift + j)) + moved);
    });
  }

  const D each_row(1.0 / static_cast<double>(block.rows));
  each_double([&](int64_t j) { store(var + j, Full{}, load_as_double(var + j) * each_row); });
}

}  // namespace
}  // namespace bnext::cpu
