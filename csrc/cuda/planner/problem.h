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
  bool reads_counter;         // every channel's finish reads num_batches_tracked
  int64_t reduce_inputs;      // that the reduction reads
  int64_t apply_extras;       // that the elementwise pass alone reads, or writes beside its output
  int64_t state_bytes;        // of a partial result
  int64_t summary_bytes;      // of what follows from all of them
  int64_t coefficient_bytes;  // of a channel, in the elementwise pass

  void set_numbers(NumbersPerChannel numbers) {
    state_bytes = numbers.state * acc_size_of(dtype);
    summary_bytes = numbers.summary * acc_size_of(dtype);
    coefficient_bytes = numbers.coefficients * acc_size_of(dtype);
  }
  int32_t vec() const { return vec_elements(size_of(dtype), masked); }
  int32_t reduce_vec() const { return vec_elements(size_of(dtype), reduce_masked); }
  int64_t vec_bytes() const { return vec() * size_of(dtype) * reduce_inputs; }
  int64_t register_bytes() const { return cuda::register_bytes(dtype, general, reduce_masked); }
  int64_t bytes() const { return shape.numel() * size_of(dtype) * reduce_inputs; }
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
