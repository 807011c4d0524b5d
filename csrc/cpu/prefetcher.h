// What kernels fetch ahead, where the hardware does not.
#pragma once

#include <algorithm>

#include "vec.h"

namespace bnext::cpu {
namespace {

// Elements that will be read soon, fetched into the second-level cache: the first keeps track of few lines that are
// under way, and would wait for memory with them. They may lie beyond the tensor: nobody dereferences them.
template <class T> struct Prefetcher {
  // How far to fetch ahead in data that is read in order, where other loads distract the hardware.
  static constexpr int64_t kDistance = 2048 / sizeof(T);
  // The same in a block whose rows have others between them, in whole rows.
  static int64_t distance(const SubMatrix& block) {
    return block.stride != block.width ? ceil_div(kDistance, block.width) * block.stride : kDistance;
  }
  // How many rows ahead where several, `stride` apart, are read at once: so many streams that the hardware does not
  // keep up.
  static int64_t rows_ahead(int64_t stride) { return std::max(kRowsAtOnce, 4 * kDistance / stride); }
  uintptr_t row;
  Prefetcher(const void* base, int64_t first) : row(reinterpret_cast<uintptr_t>(base) + first * sizeof(T)) {}
  // Of every vector. (Two of 16 bits share a line: to fetch it once takes 2 to 5 % less in caches, and more from
  // memory.)
  void fetch(int64_t i) const { prefetch(reinterpret_cast<const void*>(row + i * sizeof(T))); }
};

}  // namespace
}  // namespace bnext::cpu
