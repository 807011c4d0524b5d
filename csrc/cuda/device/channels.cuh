// The channels that a thread's columns belong to, and the loading of [c] vectors for all of them at once.
#pragma once

#include "../../core/half.h"
#include "../plan.h"
#include "cuda_compat.h"

namespace bnext::cuda {

template <int WIDTH>
struct Channels {
  int64_t at[WIDTH];
  bool first[WIDTH];  // whether it is the channel's first column

  // Of WIDTH columns from `col` on, of which channels change every `channel_stride`.
  __device__ __forceinline__ Channels(const Partition& partition, const Shape& shape, int64_t col) {
    const int64_t stride = partition.channel_stride;
    int64_t plane = stride == 1 ? col : divide(col, stride);
    int64_t position = col - plane * stride;
    int64_t channel = plane < shape.c ? plane : plane - divide(plane, shape.c) * shape.c;
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) {
      at[e] = channel;
      first[e] = position == 0 && plane < shape.c;
      if (++position == stride) {
        position = 0;
        ++plane;
        if (++channel == shape.c) channel = 0;
      }
    }
  }
  __device__ __forceinline__ explicit Channels(int64_t channel) : at{channel}, first{true} {
    static_assert(WIDTH == 1);
  }

 private:
  // A 64-bit division takes about 100 instructions.
  __device__ __forceinline__ static int64_t divide(int64_t a, int64_t b) {
    if ((a | b) >> 32 == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
    return a / b;
  }
};

// Elements of a vector of type T; all loads are in flight before the first is used.
template <class T, class A, int WIDTH>
__device__ __forceinline__ void load_vector(A (&out)[WIDTH], const void* p, const Channels<WIDTH>& channels) {
  T raw[WIDTH];
#pragma unroll
  for (int e = 0; e < WIDTH; ++e) raw[e] = static_cast<const T*>(p)[channels.at[e]];
#pragma unroll
  for (int e = 0; e < WIDTH; ++e) out[e] = static_cast<A>(widen(raw[e]));
}

// The same where the type is known at run time only; `fallback` where the vector is null.
template <class A, int WIDTH>
__device__ __forceinline__ void load_vector(A (&out)[WIDTH], const void* p, DType t, const Channels<WIDTH>& channels,
                                            A fallback) {
  if (p == nullptr) {
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) out[e] = fallback;
    return;
  }
  switch (t) {
#define BNEXT_CASE(name, type, python) \
  case DType::name: return load_vector<type>(out, p, channels);
    BNEXT_DTYPES(BNEXT_CASE)
#undef BNEXT_CASE
  }
}

}  // namespace bnext::cuda
