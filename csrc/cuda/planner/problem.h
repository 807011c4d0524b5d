// What a plan depends on, of a forward or a backward.
#pragma once

#include "plan.h"

namespace bnext::cuda {

struct Problem {
  Shape shape;
  DType dtype;
  bool general;               // an activation without kernels of its own
  bool masked;                // the elementwise pass reads or writes a mask
  bool reduce_masked;         // the reduction reads it
  int64_t tensors;            // that the reduction reads
  int64_t beside;             // that the elementwise pass alone reads, or writes beside its output
  int64_t state_bytes;        // of a partial result
  int64_t coefficient_bytes;  // of a channel, in the elementwise pass

  int32_t vec_of(bool with_mask) const { return with_mask ? 8 : static_cast<int32_t>(16 / size_of(dtype)); }
  int32_t vec() const { return vec_of(masked); }
  int64_t vec_bytes() const { return vec() * size_of(dtype) * tensors; }
  int64_t bytes() const { return shape.numel() * size_of(dtype) * tensors; }
  // Shared memory that merges the states of a block's threads.
  int64_t merge_bytes(const Partition& partition) const {
    const int64_t acc = acc_size_of(dtype), numbers = state_bytes / acc;
    if (!partition.by_columns) return planar_merge_bytes(numbers, acc);
    return partition.packed() ? packed_merge_bytes(numbers, acc) : column_merge_bytes(partition.vec, numbers, acc);
  }
};

// Shared memory that a resident block needs beside its part of a tile: `merge_bytes` and some more, and what the system
// reserves.
constexpr int64_t reserved_bytes(int64_t merge_bytes) { return merge_bytes + 2048; }

}  // namespace bnext::cuda
