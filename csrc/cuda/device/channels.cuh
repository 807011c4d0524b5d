// The channels that columns belong to, and how [c] vectors are loaded, stored and shared among the threads of a block.
#pragma once

#include <cstring>

#include "../../core/half.h"
#include "../planner/partition.h"
#include "cuda_compat.h"
#include "tile_iterator.cuh"

namespace bnext::cuda {

// The channel that a column belongs to, where channels change every `channel_stride` columns and begin again after the
// last.
struct ColumnChannel {
  int64_t channel;
  bool first;  // of the channel's columns

  __device__ __forceinline__ ColumnChannel(const Partition& partition, const Shape& shape, int64_t col) {
    const int64_t stride = partition.columns.channel_stride, plane = stride == 1 ? col : divide(col, stride);
    channel = plane < shape.c ? plane : plane - divide(plane, shape.c) * shape.c;
    first = plane < shape.c && plane * stride == col;
  }

 private:
  // A 64-bit division takes about 100 instructions.
  __device__ __forceinline__ static int64_t divide(int64_t a, int64_t b) {
    if ((a | b) >> 32 == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
    return a / b;
  }
};

// A [c] vector of parameters or running statistics is of the input's type T, or of the one it is accumulated in: which,
// is known at run time only. Null where the vector is.
template <class T>
__device__ __forceinline__ const void* parameter_at(const void* p, DType t, int64_t channel) {
  if (p == nullptr) return nullptr;
  return static_cast<const unsigned char*>(p) + channel * (t == dtype_of<T>::value ? sizeof(T) : sizeof(acc_t<T>));
}

// One element of such a vector; `fallback` where it is null.
template <class T>
__device__ __forceinline__ acc_t<T> load_parameter(const void* p, DType t, int64_t channel, acc_t<T> fallback) {
  if (p == nullptr) return fallback;
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

// What the threads of a block need of the channels of a tile's columns, found once for each column, by one thread, and
// shared: words [word][column] in shared memory. (Each thread by itself would load single floats, 32 bytes from those
// of its neighbours: on an H100 that took 1.5 to 2 us of every pass.)
template <int N, class C>
class ColumnCache {
 public:
  static constexpr int kWords = sizeof(C) / sizeof(uint32_t);
  static constexpr size_t kBytes = sizeof(C) * N * kMaxTileVecs;

  // In `memory` of kBytes, aligned to 16.
  __device__ __forceinline__ ColumnCache(void* memory, const Partition& partition)
      : words_(static_cast<uint32_t*>(memory)), columns_(partition.columns.tile_vecs * N) {}

  // of(ColumnChannel) gives what belongs to each column of the tile. All threads must call; `memory` is free when they
  // do, and again when all have got what they need.
  template <class Of>
  __device__ __forceinline__ void fill(const Partition& partition, const Shape& shape, const WorkTile& work,
                                       const Of& of) const {
    const int64_t first = work.tile * columns_, columns = min(int64_t{columns_}, partition.columns.cols - first);
#pragma unroll 1
    for (int i = threadIdx.x; i < columns; i += blockDim.x) {
      const C c = of(ColumnChannel(partition, shape, first + i));
      uint32_t words[kWords];
      memcpy(words, &c, sizeof(C));
#pragma unroll
      for (int w = 0; w < kWords; ++w) words_[w * columns_ + i] = words[w];
    }
    __syncthreads();
  }

  // Those of the N columns of a thread that is active.
  __device__ __forceinline__ void load(C (&out)[N], const ColumnPlace<N>& place) const {
    uint32_t words[kWords][N];
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const uint32_t* from = words_ + w * columns_ + place.vec_col * N;
#pragma unroll
      for (int e = 0; e < N; e += kStep) {
        const Step step = *reinterpret_cast<const Step*>(from + e);
        memcpy(&words[w][e], step.word, sizeof(step));
      }
    }
#pragma unroll
    for (int e = 0; e < N; ++e) {
      uint32_t mine[kWords];
#pragma unroll
      for (int w = 0; w < kWords; ++w) mine[w] = words[w][e];
      memcpy(&out[e], mine, sizeof(C));
    }
  }

 private:
  static constexpr int kStep = N < 4 ? N : 4;
  struct alignas(kStep * sizeof(uint32_t)) Step { uint32_t word[kStep]; };  // what one instruction loads

  uint32_t* words_;
  int columns_;
};

}  // namespace bnext::cuda
