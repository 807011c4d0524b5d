// What is done once for each channel, between the passes over the data: for some channels together, in loops over
// arrays. Where channels are many and short, it takes as long as the passes do.
#pragma once

#include <algorithm>
#include <vector>

#include "../core/half.h"
#include "plan.h"

namespace bnext::cpu {

// Channels that are taken together, at most: arrays of so many live on the stack.
constexpr int64_t kChannelBatch = 64;

// Calls run(first, end) for channels [first, end) in steps of at most kChannelBatch.
template <class F>
void for_each_step(int64_t first, int64_t end, F run) {
  for (; first < end; first += kChannelBatch) run(first, std::min(first + kChannelBatch, end));
}

// Elements [first, end) of a [c] vector whose dtype is known at run time only, or `fallback` where it is null.
template <class A>
void load_channels(A* values, const void* p, DType t, int64_t first, int64_t end, A fallback) {
  if (p == nullptr) {
    std::fill(values, values + (end - first), fallback);
    return;
  }
  with_dtype(t, [=](auto type) {
    const auto* from = static_cast<const decltype(type)*>(p);
    for (int64_t channel = first; channel < end; channel++)
      values[channel - first] = static_cast<A>(widen(from[channel]));
  });
}

// The reverse; nothing where p is null.
template <class A>
void store_channels(const A* values, void* p, DType t, int64_t first, int64_t end) {
  if (p == nullptr) return;
  with_dtype(t, [=](auto type) {
    using T = decltype(type);
    T* const to = static_cast<T*>(p);
    for (int64_t channel = first; channel < end; channel++)
      to[channel] = narrow<T>(static_cast<acc_t<T>>(values[channel - first]));
  });
}

// Calls visit(channel, column) for those of the first `limit` columns, whole periods, that belong to channels
// [first, end): of each channel in ascending order.
template <class F>
void for_each_column(const Plan& plan, int64_t first, int64_t end, int64_t limit, F visit) {
  const int64_t inner = plan.inner;
  for (int64_t start = 0; start < limit; start += plan.channels * inner) {
    if (inner == 1) {  // a loop for the compiler's vectors
      for (int64_t channel = first; channel < end; channel++) visit(channel, start + channel);
      continue;
    }
    for (int64_t channel = first; channel < end; channel++)
      for (int64_t i = 0; i < inner; i++) visit(channel, start + channel * inner + i);
  }
}

// Arrays with an entry for each column of each split of the rows: of all columns, or of a group's, in one split.
class ColumnEntries {
 public:
  explicit ColumnEntries(const Plan& plan) : ColumnEntries(plan, 0, plan.width, plan.splits()) {}
  ColumnEntries(const Plan& plan, const SubMatrix& group) : ColumnEntries(plan, group.param, group.width, 1) {}

  int64_t size() const { return splits_ * pitch_; }
  int64_t splits() const { return splits_; }
  int64_t at(int64_t down, int64_t column) const { return down * pitch_ + column - column_; }

  // Calls visit(channel, entry) for the columns of channels [first, end) in a split: of each channel in ascending
  // order.
  template <class F>
  void for_each(int64_t down, int64_t first, int64_t end, F visit) const {
    const int64_t columns = down == plan_.blocks_down ? plan_.tail : plan_.width;
    for_each_column(plan_, first, end, columns,
                    [&](int64_t channel, int64_t column) { visit(channel, at(down, column)); });
  }

 private:
  ColumnEntries(const Plan& plan, int64_t column, int64_t width, int64_t splits)
      : plan_(plan), column_(column), pitch_(width + kPadding), splits_(splits) {}

  const Plan& plan_;
  int64_t column_, pitch_, splits_;  // of the first column; entries of a split
};

// A parameter of every channel, laid out for the kernels: an entry for each channel, for each column, or both, where
// reductions read it, too, and take columns where elementwise passes do not.
template <class A>
class PerChannel {
 public:
  explicit PerChannel(const Plan& plan, bool reductions_read_it = false)
      : plan_(plan),
        channels_(plan.by_column ? 0 : plan.channels + kPadding),
        columns_(plan.by_column || (reductions_read_it && plan.sums_by_column) ? plan.width + kPadding : 0) {}

  void set(int64_t first, int64_t end, const A* values) {
    if (!channels_.empty()) std::copy(values, values + (end - first), channels_.begin() + first);
    if (columns_.empty()) return;
    A* const entries = columns_.data();
    for_each_column(plan_, first, end, plan_.width,
                    [=](int64_t channel, int64_t column) { entries[column] = values[channel - first]; });
  }
  const A* data(bool by_column) const { return by_column ? columns_.data() : channels_.data(); }

 private:
  const Plan& plan_;
  std::vector<A> channels_, columns_;
};

}  // namespace bnext::cpu
