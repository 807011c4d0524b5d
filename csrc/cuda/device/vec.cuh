// Vectors: what a thread moves at once.
#pragma once

#include "../../core/half.h"
#include "../planner/partition.h"
#include "cuda_compat.h"

namespace bnext::cuda {

// Elements of a vector of T.
template <class T, bool MASKED> constexpr int kVec = vec_elements(sizeof(T), MASKED);

// Unroll factor: vectors that `bytes` of registers hold, for each tensor that a thread has in flight.
template <class T, int N>
constexpr int vecs_in(int bytes) {
  const int vecs = bytes / (N * static_cast<int>(sizeof(T)));
  return vecs > 0 ? vecs : 1;
}

// Whether a kernel that follows reads the data again, of which the L2 cache should keep some (see
// Partition::l2_steps); or this is the last time.
enum class Reuse { again, last };

// A vector as it came from memory: 32-bit words, of which a 16-bit type has two elements each, so that
// widening and narrowing take an instruction an element.
template <class T, int N>
struct alignas(16) Vec {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "a new width needs operator[] and narrow_vec");
  static constexpr int words = N * static_cast<int>(sizeof(T)) / 4;
  uint32_t word[words];

  // Element e, widened. Indices are constants once loops are unrolled: a run-time index would move the words to
  // local memory.
  __device__ __forceinline__ acc_t<T> operator[](int e) const {
    if constexpr (sizeof(T) == 2) return widen_half(word[e / 2], e % 2);
    else if constexpr (sizeof(T) == 4) return bit_cast<float>(word[e]);
    else return bit_cast<double>(static_cast<uint64_t>(word[2 * e + 1]) << 32 | word[2 * e]);
  }

  // bf16 is the upper half of a float: a shift or a mask widens it. f16 takes a conversion.
  __device__ __forceinline__ static float widen_half(uint32_t pair, int high) {
    if constexpr (dtype_of<T>::value == DType::bf16) return bit_cast<float>(high ? pair & 0xffff0000u : pair << 16);
#if defined(__CUDA_ARCH__)
    return high ? __high2float(bit_cast<__half2>(pair)) : __low2float(bit_cast<__half2>(pair));
#else
    return to_float(f16{static_cast<uint16_t>(high ? pair >> 16 : pair)});
#endif
  }
};

// In steps of 16 bytes, the widest load there is; 32-byte vectors of 8 floats take two.
template <Reuse REUSE, class T, int N>
__device__ __forceinline__ Vec<T, N> load_vec(const T* p, bool keep) {
  Vec<T, N> vec;
#pragma unroll
  for (int i = 0; i < vec.words / 4; ++i) {
    const uint4* at = reinterpret_cast<const uint4*>(p) + i;
    const uint4 w = REUSE == Reuse::last ? __ldcs(at) : load_evict_last_or_first(at, keep);
    vec.word[4 * i] = w.x;
    vec.word[4 * i + 1] = w.y;
    vec.word[4 * i + 2] = w.z;
    vec.word[4 * i + 3] = w.w;
  }
  return vec;
}

template <class T, int N>
__device__ __forceinline__ void store_vec(T* p, const Vec<T, N>& vec) {
  // Outputs are not read again by the kernel that writes them: leave the cache to the inputs.
#pragma unroll
  for (int i = 0; i < vec.words / 4; ++i) {
    __stcs(reinterpret_cast<uint4*>(p) + i,
           uint4{vec.word[4 * i], vec.word[4 * i + 1], vec.word[4 * i + 2], vec.word[4 * i + 3]});
  }
}

// All elements at once, for code that goes over them more than once.
template <class T, int N>
__device__ __forceinline__ void widen_vec(const Vec<T, N>& vec, acc_t<T> (&a)[N]) {
#pragma unroll
  for (int e = 0; e < N; ++e) a[e] = vec[e];
}

// Two accumulators as two 16-bit floats: one instruction, where two singles take three.
template <class T>
__device__ __forceinline__ uint32_t narrow_pair(float low, float high) {
#if defined(__CUDA_ARCH__)
  if constexpr (dtype_of<T>::value == DType::bf16) return bit_cast<uint32_t>(__floats2bfloat162_rn(low, high));
  else return bit_cast<uint32_t>(__floats2half2_rn(low, high));
#else
  return narrow<T>(low).bits | static_cast<uint32_t>(narrow<T>(high).bits) << 16;
#endif
}

// Rounds to nearest even, as torch does: the one rounding between the accumulation type and memory.
template <class T, int N>
__device__ __forceinline__ Vec<T, N> narrow_vec(const acc_t<T> (&a)[N]) {
  Vec<T, N> vec;
  // Words are assembled in registers: a store of single elements would be N instructions.
#pragma unroll
  for (int e = 0; e < N; ++e) {
    if constexpr (sizeof(T) == 2) {
      if (e % 2 == 0) vec.word[e / 2] = narrow_pair<T>(a[e], a[e + 1]);
    } else if constexpr (sizeof(T) == 4) {
      vec.word[e] = bit_cast<uint32_t>(a[e]);
    } else {
      vec.word[2 * e] = static_cast<uint32_t>(bit_cast<uint64_t>(a[e]));
      vec.word[2 * e + 1] = static_cast<uint32_t>(bit_cast<uint64_t>(a[e]) >> 32);
    }
  }
  return vec;
}

// The vector of p that starts at element `offset` of `numel`; what lies past the end is zero.
template <Reuse REUSE, int N, class T>
__device__ __forceinline__ Vec<T, N> load_within(const T* p, int64_t offset, int64_t numel, bool keep) {
  if (offset + N <= numel) return load_vec<REUSE, T, N>(p + offset, keep);
  // By way of the accumulation type, which is exact both ways: the last vector of a tensor is not worth code of its
  // own.
  acc_t<T> a[N];
#pragma unroll
  for (int e = 0; e < N; ++e) a[e] = offset + e < numel ? widen(p[offset + e]) : acc_t<T>(0);
  return narrow_vec<T, N>(a);
}

}  // namespace bnext::cuda
