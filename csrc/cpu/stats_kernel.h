// Statistics of one block, in two passes over data that the first pass has brought into cache:
// deviations from a first guess give the mean, deviations from the mean the variance. As cheap as
// sums of squares, and nothing cancels.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace bnext::cpu {
namespace {

// The first guess is the block's first element, so that differences to it are exact where
// |mean| >> std. The centre of the second pass, and the shift of the result, is the mean rounded
// to A; what the rounding lost is put right in the end, because it is known in double.
template <class T>
[[gnu::flatten]] Welford<double> moments(const void* x, const SubMatrix& block, int64_t next) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const T* p = static_cast<const T*>(x) + block.first;
  A shift;
  {
    A lanes[V::lanes];
    store(lanes, Full{}, load(p, Partial{1}));
    shift = lanes[0];
  }
  const V k(shift);
  V deviations[4] = {V(0), V(0), V(0), V(0)};
  sum_rows<A>(
      block.rows, block.width, [&](int64_t r) { return p + r * block.stride; },
      [&](const T* row, int64_t i, auto which, auto part) {
        V& d = deviations[which.value];
        d = d + counted(part, load(row + i, part) - k);
      });
  const double count = static_cast<double>(block.rows * block.width);
  const double offset = sum(deviations) / count;

  const A centre = static_cast<A>(shift + offset);
  const V c(centre);
  V squares[4] = {V(0), V(0), V(0), V(0)};
  // The second look finds its data in cache: time to fetch the next block's.
  const Ahead<T> ahead(x, next);
  sum_rows<A>(
      block.rows, block.width, [&](int64_t r) { return r * block.stride; },
      [&](int64_t row, int64_t i, auto which, auto part) {
        ahead.fetch(row + i);
        const V d = counted(part, load(p + row + i, part) - c);
        squares[which.value] = fma(d, d, squares[which.value]);
      });
  // sum((x - mean)^2) = sum((x - centre)^2) - count * (mean - centre)^2, where the last term is a rounding error
  // squared.
  const double lost = (static_cast<double>(centre) - shift) - offset;
  return {count, centre, -lost, sum(squares) / count - lost * lost};
}

// The same for each column, kColumnRows rows at a time, which are merged into the columns' state
// in double. The first guess is the first row, and from then on the means of the first rows. During
// the loop `var` holds M2, the sum of squared deviations: all columns share their counts, so that a
// merge takes no division.
template <class T>
[[gnu::flatten]] void column_moments(const void* x, const SubMatrix& block, acc_t<T>* shift, double* offset,
                                     double* var) {
  using A = acc_t<T>;
  using V = Vec<A>;
  using D = Vec<double>;
  const T* p = static_cast<const T*>(x) + block.first;
  const int64_t width = block.width, stride = block.stride;
  // Columns have one sum each: none comes twice. What stands in the lanes behind the last one is never read.
  const auto each_vector = [&](auto f) { for_each_vector<A>(width, Tail::partial, f); };
  // The first row is each column's first guess.
  each_vector([&](int64_t j, auto part) { store(shift + j, Full{}, load(p + j, part)); });

  A sums[kColumns + kPadding], centre[kColumns + kPadding];
  for (int64_t begin = 0; begin < block.rows; begin += kColumnRows) {
    const int64_t rows = block.rows - begin < kColumnRows ? block.rows - begin : kColumnRows;
    const T* q = p + begin * stride;

    // Row after row, as memory comes, but 4 at once, to spare the traffic of the sums.
    each_vector([&](int64_t j, auto) { store(sums + j, Full{}, V(0)); });
    for (int64_t r = 0; r < rows; r += 4) {
      const T* row = q + r * stride;
      if (r + 4 <= rows) {
        each_vector([&](int64_t j, auto part) {
          const V k = load(shift + j, Full{});
          const V a = (load(row + j, part) - k) + (load(row + stride + j, part) - k);
          const V b = (load(row + 2 * stride + j, part) - k) + (load(row + 3 * stride + j, part) - k);
          store(sums + j, Full{}, load(sums + j, Full{}) + (a + b));
        });
      } else {
        for (int64_t i = r; i < rows; i++, row += stride)
          each_vector([&](int64_t j, auto part) {
            const V k = load(shift + j, Full{});
            store(sums + j, Full{}, load(sums + j, Full{}) + (load(row + j, part) - k));
          });
      }
    }

    const D each_row(1.0 / static_cast<double>(rows));
    for (int64_t j = 0; j < width; j += D::lanes)
      store(centre + j, Full{}, wide(shift + j) + wide(sums + j) * each_row);

    // Now down the columns: the rows are in cache, and the squares in a register.
    const D count(static_cast<double>(rows));
    const double seen = static_cast<double>(begin), total = seen + static_cast<double>(rows);
    const D weight(static_cast<double>(rows) / total), spread(seen * (static_cast<double>(rows) / total));
    each_vector([&](int64_t j, auto part) {
      const V c = load(centre + j, Full{});
      V even(0), odd(0);  // two, so that an addition need not wait for the one before
      int64_t r = 0;
      for (; r + 2 <= rows; r += 2) {
        const V d = load(q + r * stride + j, part) - c;
        const V e = load(q + (r + 1) * stride + j, part) - c;
        even = fma(d, d, even);
        odd = fma(e, e, odd);
      }
      if (r < rows) {
        const V d = load(q + r * stride + j, part) - c;
        even = fma(d, d, even);
      }
      A squares[V::lanes];
      store(squares, Full{}, even + odd);
      for (int64_t i = 0; i < V::lanes; i += D::lanes) {
        const int64_t d = j + i;
        const D mean = wide(sums + d) * each_row;
        const D lost = (wide(centre + d) - wide(shift + d)) - mean;
        const D m2 = fnma(lost * lost, count, wide(squares + i));
        if (begin == 0) {
          store(shift + d, Full{}, wide(centre + d));
          store(offset + d, Full{}, D(0.0) - lost);
          store(var + d, Full{}, m2);
          continue;
        }
        const D delta = mean - wide(offset + d);
        store(offset + d, Full{}, fma(delta, weight, wide(offset + d)));
        store(var + d, Full{}, wide(var + d) + fma(delta * delta, spread, m2));
      }
    });
  }

  const D each_row(1.0 / static_cast<double>(block.rows));
  for (int64_t j = 0; j < width; j += D::lanes) store(var + j, Full{}, wide(var + j) * each_row);
}

}  // namespace
}  // namespace bnext::cpu
