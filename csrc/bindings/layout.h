// From strides to one of the two layouts that the backends know.
#pragma once

#include <ATen/core/Tensor.h>

#include "../core/params.h"
#include "checks.h"

namespace bnext {

// The memory format that x is normalized in, which is also the one that torch.nn gives y. Where
// strides of size-1 dimensions leave it open, torch takes contiguous.
inline at::MemoryFormat format_of(const Tensor& x) {
  return x.is_contiguous() ? at::MemoryFormat::Contiguous : x.suggest_memory_format();
}

// One layout for each problem, so that equal problems meet equal kernels: a single value a plane
// is a matrix, a single channel is a plane. No product here overflows, since each one divides a
// number of elements that exists. `n`: how many examples of x.
inline Shape shape_of(const Tensor& x, int64_t n, at::MemoryFormat format) {
  const int64_t c = x.size(1);
  if (x.numel() == 0) return {Layout::planar, 0, c, 0};
  const int64_t s = x.numel() / (x.size(0) * c);
  if (c == 1) return {Layout::planar, 1, 1, n * s};
  const bool planar = format == at::MemoryFormat::Contiguous && s != 1;
  return {planar ? Layout::planar : Layout::interleaved, n, c, s};
}

inline Shape shape_of(const Tensor& x, at::MemoryFormat format) { return shape_of(x, x.size(0), format); }

// t in `format`, and where a backend will read it (`aligned`) on the 16-byte boundary that its
// vectors need: a slice of a larger storage may not be.
inline Tensor dense(const Tensor& t, at::MemoryFormat format, bool aligned) {
  Tensor d = t.contiguous(format);
  if (aligned && reinterpret_cast<uintptr_t>(d.const_data_ptr()) % 16 != 0) d = d.clone();
  return d;
}

}  // namespace bnext
