// Elementwise passes over tensors that no cache holds: which of their stores go past the caches, and which way they
// take through memory.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "vec.h"

namespace bnext::cpu {
namespace {

// How a pass over a block stores. Past the caches go whole cache lines, as half a line takes a detour through memory.
struct Streaming {
  static constexpr int64_t kLineBytes = 64;

  bool past_caches = false;
  bool backwards = false;  // the pass goes from the end of memory on
  // The vectors that two rows share go past the caches as well. Where they do not, the line between two rows is
  // fetched first, by the normal stores at their ends, which takes up to 0.1 us.
  bool seams = false;

  // The i-th of so many rows, on the pass's way.
  int64_t row_at(int64_t i, int64_t rows) const { return backwards ? rows - 1 - i : i; }
  // Whether rows are worth it though they are not whole lines.
  template <class T> bool is_long(const SubMatrix& block) const {
    constexpr int64_t kFollowing = 1024 / sizeof(T), kLong = 512 / sizeof(T);
    return block.width >= (block.stride == block.width && !seams ? kFollowing : kLong);
  }
  // Elements of a row before its first line.
  template <class T> static int64_t before_line(const T* row) {
    return static_cast<int64_t>(-reinterpret_cast<uintptr_t>(row) % kLineBytes / sizeof(T));
  }
};

// Whether the lines of one output are those of all.
inline bool share_lines(std::initializer_list<const void*> outputs) {
  const void* first = nullptr;
  for (const void* out : outputs) {
    if (first == nullptr) first = out;
    const uintptr_t apart = reinterpret_cast<uintptr_t>(out) - reinterpret_cast<uintptr_t>(first);
    if (out != nullptr && apart % Streaming::kLineBytes != 0) return false;
  }
  return true;
}

// A load waits for every store past the caches under way whose address has the same low 12 bits, and of an output that
// was allocated right behind an input each store has those of the input's next cache line: passes take up to 2.8 times
// as long. From the end of memory on, there is none nearby.
inline bool is_faster_backwards(std::initializer_list<const void*> inputs, std::initializer_list<const void*> outputs) {
  constexpr uintptr_t kPage = 4096;
  uintptr_t nearest_ahead = kPage, nearest_behind = kPage;
  for (const void* out : outputs) {
    for (const void* in : inputs) {
      const uintptr_t ahead = (reinterpret_cast<uintptr_t>(out) - reinterpret_cast<uintptr_t>(in)) % kPage;
      if (in == nullptr || out == nullptr || ahead == 0) continue;
      nearest_ahead = std::min(nearest_ahead, ahead);
      nearest_behind = std::min(nearest_behind, kPage - ahead);
    }
  }
  return nearest_ahead < nearest_behind;
}

// Of a pass over a block of tensors, some of whose pointers may be null. `seams`: whether the kernel knows what to do
// with them, where rows follow each other.
template <class T>
Streaming streaming_of(bool beyond_cache, const SubMatrix& block, bool seams, std::initializer_list<const void*> inputs,
                       std::initializer_list<const void*> outputs) {
  Streaming streaming;
  if (!kHasStreams || !beyond_cache) return streaming;
  streaming.seams = seams && block.rows > 1 && block.stride == block.width && block.param_step == 1;
  if (!streaming.is_long<T>(block) && block.width * sizeof(T) % Streaming::kLineBytes != 0) return {};
  if (!share_lines(outputs)) return {};
  streaming.past_caches = true;
  streaming.backwards = is_faster_backwards(inputs, outputs);
  return streaming;
}

// A row of a pass whose stores stay in the caches. What is read next is fetched ahead.
struct CachedRow {
  static constexpr bool fetches = true;
  template <class T> CachedRow(const Streaming&, const SubMatrix&, int64_t, const T*) {}
};
template <class A, class F>
void for_each_vector(CachedRow, int64_t width, Tail tail, F f) {
  for_each_vector<A>(width, tail, f);
}

// A row of one whose stores do not. Elements [head, end) are vectors that go past the caches, as does the seam behind
// them, if there is one; elements [begin, head) do not, nor do those that are left, whose tail is partial. Nothing is
// fetched ahead: beside such stores it takes 3 % longer.
template <bool seams> struct StreamedRow {
  static constexpr bool fetches = false;
  int64_t begin = 0, head = 0, end = 0;
  int64_t seam = 0;  // how many of its lanes are this row's
  bool backwards;

  // Of the block's row r, whose output begins at `row`.
  template <class T>
  StreamedRow(const Streaming& streaming, const SubMatrix& block, int64_t r, const T* row)
      : backwards(streaming.backwards) {
    constexpr int64_t lanes = Vec<acc_t<T>>::lanes, line = Streaming::kLineBytes / sizeof(T);
    const int64_t to_line = Streaming::before_line(row), lines = (block.width - to_line) / line * line;
    if (!streaming.seams && lines != block.width && !streaming.is_long<T>(block)) return;
    head = to_line;
    end = to_line + lines;
    if (!seams || !streaming.seams) return;
    // Lanes before the first whole vector are those of the seam behind the row before.
    if (r > 0) begin = head = to_line % lanes;
    if (r + 1 == block.rows) return;
    end = head + (block.width - head) / lanes * lanes;
    seam = block.width - end;
  }
};
template <class A, bool seams, class F>
void for_each_vector(const StreamedRow<seams>& row, int64_t width, Tail, F f) {
  constexpr int64_t lanes = Vec<A>::lanes;
  for (int64_t i = row.begin; i < row.head; i += lanes) f(i, Partial{std::min(lanes, row.head - i)});
  if constexpr (seams) {
    if (row.seam > 0 && row.backwards) f(row.end, Seam{row.seam});
  }
  const int64_t step = row.backwards ? -lanes : lanes;
  int64_t i = row.backwards ? row.end - lanes : row.head;
  for (int64_t left = row.end - row.head; left > 0; left -= lanes, i += step) f(i, Streamed{});
  if constexpr (seams) {
    if (row.seam > 0 && !row.backwards) f(row.end, Seam{row.seam});
    if (row.seam > 0) return;
  }
  for_each_vector<A>(width, Tail::partial, f, row.end);
}

// Calls f(Type<...>{}) with the type of a block's rows.
template <class T> struct Type { using type = T; };
template <bool seams, class F>
void with_rows(const Streaming& streaming, F f) {
  if constexpr (kHasStreams) {
    if (streaming.past_caches) return f(Type<StreamedRow<seams>>{});
  }
  f(Type<CachedRow>{});
}

// Calls f(rows, r) for the rows of a block on the pass's way: for `rows`, a constant, of them from row r on. By columns
// and in the caches several are taken at once, as loads of parameters bound such loops. Not where a vector takes so
// many registers that the parameters would be in memory either way.
template <class A, class Row, bool by_column, class F>
void for_each_rows(const Streaming& streaming, const SubMatrix& block, bool in_order, F f) {
  int64_t i = 0;
  if constexpr (by_column && std::is_same_v<Row, CachedRow> && Vec<A>::registers <= 2) {
    if (!in_order)
      for (; i + kRowsAtOnce <= block.rows; i += kRowsAtOnce) f(Index<kRowsAtOnce>{}, i);
  }
  for (; i < block.rows; i++) f(Index<1>{}, streaming.row_at(i, block.rows));
}

}  // namespace
}  // namespace bnext::cpu
