// The vocabulary that every backend shares: storage types and layouts.
// Compiles for host and device; knows nothing of torch or of CUDA's runtime.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define BNEXT_HD __host__ __device__ __forceinline__
#else
#define BNEXT_HD inline
#endif

namespace bnext {

enum class DType : int32_t { f32, f64, f16, bf16 };

enum class Layout : int32_t {
  planar,       // (n, c, s), s contiguous: NCHW and friends
  interleaved,  // (n * s, c), c contiguous: NHWC and every (N, C) input
};

// Bytes of one element in memory.
BNEXT_HD constexpr int64_t size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

// Bytes of one statistic of a tensor of type t: float32, except that float64 keeps float64.
BNEXT_HD constexpr int64_t acc_size_of(DType t) { return t == DType::f64 ? 8 : 4; }

// 16-bit storage types are plain bits; half.h converts them.
struct f16 { uint16_t bits; };
struct bf16 { uint16_t bits; };

// Accumulation type of a storage type.
template <class T> struct acc { using type = float; };
template <> struct acc<double> { using type = double; };
template <class T> using acc_t = typename acc<T>::type;

template <class T> struct dtype_of;
template <> struct dtype_of<float> { static constexpr DType value = DType::f32; };
template <> struct dtype_of<double> { static constexpr DType value = DType::f64; };
template <> struct dtype_of<f16> { static constexpr DType value = DType::f16; };
template <> struct dtype_of<bf16> { static constexpr DType value = DType::bf16; };

}  // namespace bnext
