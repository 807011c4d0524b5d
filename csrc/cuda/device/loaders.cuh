// Where a block gets the vectors of its input tensors from, and how it stores its outputs: a vector's address is
// computed here and nowhere else. What is not a vector the operations access themselves: a byte of mask to a vector,
// and the elements that the end of an interleaved tensor cuts off.
#pragma once

#include "../planner/partition.h"
#include "vec.cuh"

namespace bnext::cuda {

// Some of the tensor's vectors, by their number in memory. Unless WHOLE, only elements [lo, hi) of a vector are the
// thread's: the others belong to a neighbouring plane, or lie past the end.
template <int COUNT, bool WHOLE>
struct Chunk {
  static constexpr int count = COUNT;
  static constexpr bool whole = WHOLE;
  uint32_t vec[COUNT];
  int32_t lo[COUNT], hi[COUNT];
  bool keep_in_l2;  // for the kernel that follows

  __device__ __forceinline__ bool has(int k, int e) const { return WHOLE || (e >= lo[k] && e < hi[k]); }
};

// Element 0 of a tensor's vector: one instruction, of 32 bits times a constant.
template <int N, class T>
__device__ __forceinline__ T* vec_at(T* p, uint32_t vec) {
  return p + uint64_t{vec} * N;
}

// Vector k of a chunk. Reading may take in what is not the thread's, as long as it is the tensor's.
template <Reuse REUSE, int N, int COUNT, bool WHOLE, class T>
__device__ __forceinline__ Vec<T, N> load_at(const T* p, const Chunk<COUNT, WHOLE>& chunk, int k, int64_t numel) {
  if constexpr (WHOLE) return load_vec<REUSE, T, N>(vec_at<N>(p, chunk.vec[k]), chunk.keep_in_l2);
  else return load_within<REUSE, N>(p, int64_t{chunk.vec[k]} * N, numel, chunk.keep_in_l2);
}

// Writes the elements that are the thread's, and no other.
template <int N, int COUNT, bool WHOLE, class T>
__device__ __forceinline__ void store_at(T* p, const Chunk<COUNT, WHOLE>& chunk, int k, const Vec<T, N>& vec) {
  T* to = vec_at<N>(p, chunk.vec[k]);
  // A vector that covers a plane's end is mostly whole all the same: one store then, and not N.
  if (WHOLE || (chunk.lo[k] == 0 && chunk.hi[k] == N)) {
    store_vec<T, N>(to, vec);
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e) {
      if (chunk.has(k, e)) to[e] = narrow<T>(vec[e]);
    }
  }
}

// A loader of one tensor has load(chunk, vecs), which issues all loads of a chunk before the first is needed.

template <class T, int N, Reuse REUSE>
struct FromGlobal {
  const T* data;
  int64_t numel;

  __device__ __forceinline__ FromGlobal(const void* tensor, const Shape& shape)
      : data(static_cast<const T*>(tensor)), numel(shape.numel()) {}

  template <int COUNT, bool WHOLE>
  __device__ __forceinline__ void load(const Chunk<COUNT, WHOLE>& chunk, Vec<T, N> (&vecs)[COUNT]) {
#pragma unroll
    for (int k = 0; k < COUNT; ++k) vecs[k] = load_at<REUSE, N>(data, chunk, k, numel);
  }
};

// The loaders of an operation's INPUTS tensors, one chunk of each at a time.
template <class Loader, int INPUTS>
struct Loaders {
  Loader each[INPUTS];

  template <class T, int N, int COUNT, bool WHOLE>
  __device__ __forceinline__ void load(const Chunk<COUNT, WHOLE>& chunk, Vec<T, N> (&vecs)[INPUTS][COUNT]) {
#pragma unroll
    for (int i = 0; i < INPUTS; ++i) each[i].load(chunk, vecs[i]);
  }
};

// Loaders of all that the operation reads in both passes.
template <class Op, Reuse REUSE>
__device__ __forceinline__ auto from_global(const typename Op::Params& p) {
  using Loader = FromGlobal<typename Op::T, Op::N, REUSE>;
  if constexpr (Op::kInputs == 1) return Loaders<Loader, 1>{{Loader(Op::input(p, 0), p.shape)}};
  else return Loaders<Loader, 2>{{Loader(Op::input(p, 0), p.shape), Loader(Op::input(p, 1), p.shape)}};
}

}  // namespace bnext::cuda
