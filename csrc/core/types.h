// The vocabulary that every backend shares: storage types and layouts.
// Compiles for host and device; knows nothing of torch or of CUDA's runtime.
#pragma once

#include <cstdint>

#include "names.h"

#if defined(__CUDACC__)
#define BNEXT_HD __host__ __device__ __forceinline__
#define BNEXT_HD_CALLED inline __host__ __device__ __noinline__  // whose code is too long for a copy in every place
#else
#define BNEXT_HD inline
#define BNEXT_HD_CALLED inline
#endif

// What follows a switch that has a case for every value.
#define BNEXT_UNREACHABLE() __builtin_unreachable()

namespace bnext {

// 16-bit storage types are plain bits; half.h converts them.
struct f16 { uint16_t bits; };
struct bf16 { uint16_t bits; };

// Storage types: the enumerator, the type in memory, and the name that Python sees.
#define BNEXT_DTYPES(X)     \
  X(f32, float, "float32")  \
  X(f64, double, "float64") \
  X(f16, f16, "float16")    \
  X(bf16, bf16, "bfloat16")

BNEXT_NAMED_ENUM(DType, int32_t, BNEXT_DTYPES)

// f(T{}), for T the type in memory.
template <class F>
BNEXT_HD auto with_dtype(DType t, F&& f) {
  switch (t) {
#define BNEXT_CASE(name, type, python) \
  case DType::name: return f(type{});
    BNEXT_DTYPES(BNEXT_CASE)
#undef BNEXT_CASE
  }
  BNEXT_UNREACHABLE();
}

// planar: (n, c, s), s contiguous: NCHW and friends. interleaved: (n * s, c), c contiguous: NHWC and every (N, C)
// input.
#define BNEXT_LAYOUTS(X) X(planar) X(interleaved)
BNEXT_NAMED_ENUM(Layout, int32_t, BNEXT_LAYOUTS)

BNEXT_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bytes of one element in memory.
BNEXT_HD constexpr int64_t size_of(DType t) {
  switch (t) {
#define BNEXT_CASE(name, type, python) \
  case DType::name: return sizeof(type);
    BNEXT_DTYPES(BNEXT_CASE)
#undef BNEXT_CASE
  }
  BNEXT_UNREACHABLE();
}

// Accumulation type of a storage type: float, except that double keeps double.
template <class T> struct acc { using type = float; };
template <> struct acc<double> { using type = double; };
template <class T> using acc_t = typename acc<T>::type;

// Bytes of one statistic of a tensor of type t.
BNEXT_HD constexpr int64_t acc_size_of(DType t) {
  switch (t) {
#define BNEXT_CASE(name, type, python) \
  case DType::name: return sizeof(acc_t<type>);
    BNEXT_DTYPES(BNEXT_CASE)
#undef BNEXT_CASE
  }
  BNEXT_UNREACHABLE();
}

template <class T> struct dtype_of;
#define BNEXT_SPECIALIZATION(name, type, python) \
  template <> struct dtype_of<type> { static constexpr DType value = DType::name; };
BNEXT_DTYPES(BNEXT_SPECIALIZATION)
#undef BNEXT_SPECIALIZATION

}  // namespace bnext
