// How the work on a shape is cut: a pure function of the shape, never of the number of threads.
//
// Both layouts are one: element (o, channel, i) of outer x channels x inner lies at
// (o * channels + channel) * inner + i, and interleaved data has inner = 1. What matters is whether
// inner fills a vector:
//   strips:  a channel is `outer` runs of `inner` contiguous elements, with one parameter each.
//   columns: where runs are short, the tensor is a matrix of `rows` x `width` whose columns keep to
//            one channel: column j belongs to channel (j / inner) % channels. Several outer indices
//            are folded into a row where channels * inner alone is narrow or odd; outer indices
//            that do not fill a row are the tail, a shorter last row.
// Reductions take short strips of many images as columns, too, but do not fold them.
#pragma once

#include <algorithm>

#include "kernels.h"

namespace bnext::cpu {

constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Plan {
  int64_t outer, channels, inner;
  bool by_column;       // elementwise passes and reductions; the rest is strips
  bool sums_by_column;  // reductions at least

  // Adjacent channels that a task takes from statistics to output, while they are in cache; 0 where tasks take parts of
  // channels.
  int64_t channels_per_task;
  int64_t channels_per_masked_task;  // where tasks write a mask, no byte of which two of them share

  // strips. Where tasks do not take whole channels, reductions cut a channel's outer * inner elements into pieces.
  int64_t piece, pieces;
  int64_t rows_per_block;  // whole runs that a row kernel takes at once

  // columns. Where tasks do not take whole channels, reductions cut the matrix into blocks; the tail is one more split,
  // a row high.
  int64_t width, rows, tail;
  int64_t block_width, blocks_across;
  int64_t block_rows, blocks_down;

  // Elementwise passes cut memory every `grain` elements, which are whole bytes of a mask.
  int64_t grain, grains;

  int64_t numel() const { return outer * channels * inner; }
  // strips: whether a row kernel takes all of a channel at once, and that block.
  bool channel_is_block() const { return outer <= rows_per_block && inner <= kRowElements; }
  SubMatrix block_of_channel(int64_t channel) const {
    return {channel * inner, outer, inner, channels * inner, channel, 0};
  }
  int64_t splits() const { return blocks_down + (tail > 0 ? 1 : 0); }
};

Plan make_plan(const Shape&);

// The blocks that make up elements [begin, end) of a channel, within the limits of the row kernels.
// f also gets the first element of the block that comes next, which may be the next channel's.
template <class F>
void for_each_block_of_strip(const Plan& plan, int64_t channel, int64_t begin, int64_t end, F f) {
  const int64_t inner = plan.inner, stride = plan.channels * inner;
  // Divided once: blocks may be so short that a division for each would be felt.
  int64_t run = begin / inner, i = begin % inner;
  const int64_t whole_runs = end / inner, first = run * stride + channel * inner + i;
  for (int64_t at = first, left = end - begin; left > 0;) {
    int64_t rows = 1, width = std::min({inner - i, left, kRowElements});
    if (width == inner) rows = std::min(plan.rows_per_block, whole_runs - run);
    const SubMatrix block = {at, rows, width, stride, channel, 0};
    left -= rows * width;
    i += width;
    at += width;
    if (i == inner) {
      at += rows * stride - inner;
      run += rows;
      i = 0;
    }
    f(block, left > 0 ? at : first + inner);
  }
}

// The blocks that make up elements [begin, end) of memory, in ascending order.
template <class F>
void for_each_block_of_memory(const Plan& plan, int64_t begin, int64_t end, F f) {
  const int64_t run = plan.by_column ? plan.width : plan.inner;
  while (begin < end) {
    const int64_t index = begin / run, i = begin % run;
    const int64_t param = plan.by_column ? i : index % plan.channels;
    int64_t rows = 1, width = run - i;
    if (i == 0 && width <= end - begin) {
      rows = (end - begin) / run;
      if (!plan.by_column && rows > plan.channels - param) rows = plan.channels - param;
    } else if (width > end - begin) {
      width = end - begin;
    }
    f(SubMatrix{begin, rows, width, run, param, plan.by_column ? 0 : 1});
    begin += rows * width;
  }
}

// Block (down, across) of the matrix; down == blocks_down is the tail. May have no rows or columns.
SubMatrix block_of_columns(const Plan&, int64_t down, int64_t across);

// Calls f(down, block) for the blocks of a task of a reduction of columns, of blocks_down * blocks_across tasks: rows
// one after another, as memory comes. The tail has no tasks of its own, which would take no time: a thread might get
// them all.
template <class F>
void for_each_block_of_columns(const Plan& plan, int64_t task, F f) {
  const int64_t down = task / plan.blocks_across, across = task % plan.blocks_across;
  for (int64_t d = down; d < (down + 1 == plan.blocks_down ? plan.splits() : down + 1); d++) {
    const SubMatrix block = block_of_columns(plan, d, across);
    if (block.rows > 0 && block.width > 0) f(d, block);
  }
}

}  // namespace bnext::cpu
