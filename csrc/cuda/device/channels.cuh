// The channels that a thread's columns belong to, and the loading of [c] vectors for all of them at once.
#pragma once

#include "../../core/half.h"
#include "../plan.h"
#include "cuda_compat.h"

namespace bnext::cuda {

template <int WIDTH>
struct Channels {
  // Found once for WIDTH columns: a division for each would cost more than the elementwise arithmetic.
  uint32_t at[WIDTH];
  bool first[WIDTH];  // whether it is the channel's first column

  // Of WIDTH columns from `col` on, of which channels change every `channel_stride`.
  __device__ __forceinline__ Channels(const Partition& partition, const Shape& shape, int64_t col) {
    const int64_t stride = partition.columns.channel_stride;
    const int64_t plane = stride == 1 ? col : divide(col, stride);
    const int64_t position = col - plane * stride;
    bool first_round = plane < shape.c, begins = position == 0;
    uint32_t channel = static_cast<uint32_t>(first_round ? plane : plane - divide(plane, shape.c) * shape.c);
    // Columns until the next channel; how many, once there are as many as WIDTH, makes no difference.
    const int every = static_cast<int>(min(stride, int64_t{WIDTH}));
    int left = static_cast<int>(min(stride - position, int64_t{WIDTH}));
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) {
      at[e] = channel;
      first[e] = begins && first_round;
      begins = --left == 0;
      if (begins) {
        left = every;
        if (++channel == static_cast<uint32_t>(shape.c)) {
          channel = 0;
          first_round = false;
        }
      }
    }
  }
  // Those from `channel` on, a column each.
  __device__ __forceinline__ explicit Channels(int64_t channel) {
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) {
      at[e] = static_cast<uint32_t>(channel) + e;
      first[e] = true;
    }
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

// A [c] vector of parameters or running statistics is of the input's type T, or of the one it is accumulated in: which,
// is known at run time only. `fallback` where the vector is null.
template <class T, int WIDTH>
__device__ __forceinline__ void load_parameters(acc_t<T> (&out)[WIDTH], const void* p, DType t,
                                                const Channels<WIDTH>& channels, acc_t<T> fallback) {
  if (p == nullptr) {
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) out[e] = fallback;
  } else if (t == dtype_of<T>::value) {
    load_vector<T>(out, p, channels);
  } else {
    load_vector<acc_t<T>>(out, p, channels);
  }
}

// One element of such a vector.
template <class T>
__device__ __forceinline__ acc_t<T> load_parameter(const void* p, DType t, int64_t channel) {
  if (t == dtype_of<T>::value) return widen(static_cast<const T*>(p)[channel]);
  return static_cast<const acc_t<T>*>(p)[channel];
}

// Where the vector is null, nothing is stored.
template <class T>
__device__ __forceinline__ void store_parameter(void* p, DType t, int64_t channel, acc_t<T> v) {
  if (p == nullptr) return;
  if (t == dtype_of<T>::value) static_cast<T*>(p)[channel] = narrow<T>(v);
  else static_cast<acc_t<T>*>(p)[channel] = v;
}

}  // namespace bnext::cuda
