// The stage `normalize` for one block: x, residual? -> y, mask?. Used by normalize.cu and by the kernels
// that do all of a forward.
#pragma once

#include "../core/epilogue.h"
#include "../core/welford.h"
#include "channels.cuh"
#include "loaders.cuh"

namespace bnext::cuda {

// What follows the affine step. A kernel of the two-pass plan passes a constant, which folds.
enum class Epilogue { none, relu, add, add_relu };

constexpr bool adds(Epilogue e) { return e == Epilogue::add || e == Epilogue::add_relu; }
constexpr bool clips(Epilogue e) { return e == Epilogue::relu || e == Epilogue::add_relu; }
constexpr bool masks(Epilogue e) { return e == Epilogue::add_relu; }

inline Epilogue epilogue_of(const ForwardParams& p) {
  const bool relu = p.activation == Activation::relu;
  return p.residual ? (relu ? Epilogue::add_relu : Epilogue::add) : (relu ? Epilogue::relu : Epilogue::none);
}

// Units of each of x and residual that a thread has in flight.
template <class T, int N> constexpr int kApplyChunk = vecs_in<T, N>(64);

// The affine steps of some channels, given their statistics.
template <class A, int WIDTH>
__device__ __forceinline__ void make_affine(Affine<A> (&affine)[WIDTH], const ForwardParams& p,
                                            const Channels<WIDTH>& channels, const A (&mean)[WIDTH],
                                            const A (&invstd)[WIDTH]) {
  A weight[WIDTH], bias[WIDTH];
  load_vector(weight, p.weight, p.weight_dtype, channels, A(1));
  load_vector(bias, p.bias, p.weight_dtype, channels, A(0));
#pragma unroll
  for (int e = 0; e < WIDTH; ++e) affine[e] = {mean[e], weight[e] * invstd[e], bias[e]};
}

// The same by the running statistics, or by the batch's. `keep` says that this thread is one to save, for channels
// whose first column it has, what the running statistics gave.
template <class A, int WIDTH>
__device__ __forceinline__ void load_affine(Affine<A> (&affine)[WIDTH], const ForwardParams& p,
                                            const Channels<WIDTH>& channels, bool by_running, bool keep) {
  A mean[WIDTH], invstd[WIDTH];
  if (by_running) {
    load_vector(mean, p.running_mean, p.running_dtype, channels, A(0));
    load_vector(invstd, p.running_var, p.running_dtype, channels, A(1));
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) {
      invstd[e] = inverse_std(invstd[e], p.eps);
      if (!keep || !channels.first[e]) continue;
      if (p.mean) static_cast<A*>(p.mean)[channels.at[e]] = mean[e];
      if (p.invstd) static_cast<A*>(p.invstd)[channels.at[e]] = invstd[e];
    }
  } else {
    load_vector(mean, p.mean, dtype_of<A>::value, channels, A(0));
    load_vector<A>(invstd, p.invstd, channels);
  }
  make_affine(affine, p, channels, mean, invstd);
}

// Adds one to num_batches_tracked, if it is wanted, once in a launch: when every block that reads it has done so.
__device__ __forceinline__ void increment_batches_tracked(const ForwardParams& p) {
  if (p.num_batches_tracked && blockIdx.x == 0 && threadIdx.x == 0) ++*p.num_batches_tracked;
}

// affine(e) is the affine step of element e of a vector.
template <class T, int N, int COUNT, bool WHOLE, class Source, class AffineAt>
__device__ __forceinline__ void normalize_chunk(const ForwardParams& p, const Chunk<COUNT, WHOLE>& chunk, Source& x,
                                                Epilogue epilogue, const AffineAt& affine) {
  using A = acc_t<T>;
  T* y = static_cast<T*>(p.y);

  Vec<T, N> values[COUNT], added[COUNT];
  x.load(chunk, values);
  if (adds(epilogue)) FromGlobal<T, N, Reuse::last>(p.residual, p.shape).load(chunk, added);
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    A v[N];
    uint32_t bits = 0;
    widen_vec<T, N>(values[k], v);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      v[e] = affine(e)(v[e]);
      if (adds(epilogue)) v[e] += added[k][e];
      if (masks(epilogue)) bits |= static_cast<uint32_t>(chunk.has(k, e) && is_positive(v[e])) << (e % 8);
      if (clips(epilogue)) v[e] = relu(v[e]);
    }
    store_at(y, chunk, k, narrow_vec<T, N>(v));
    if constexpr (N == 8) {
      if (masks(epilogue) && p.mask) p.mask[chunk.vec[k]] = static_cast<uint8_t>(bits);
    }
  }
}

template <class T, int N, class Source>
__device__ __forceinline__ void normalize_strip(const ForwardParams& p, const Partition& partition,
                                                const WorkTile& work, Source&& x, Epilogue epilogue,
                                                const Affine<acc_t<T>>& affine) {
  iterate_planar<N, true, kApplyChunk<T, N>>(partition, p.shape, work, [&](const auto& chunk) {
    normalize_chunk<T, N>(p, chunk, x, epilogue, [&](int) { return affine; });
  });
}

template <class T, int N>
__device__ __forceinline__ void normalize_planar(const ForwardParams& p, const Partition& partition,
                                                 const WorkTile& work, Epilogue epilogue, bool by_running) {
  Affine<acc_t<T>> affine[1];
  load_affine(affine, p, Channels<1>(work.tile), by_running, work.split == 0 && threadIdx.x == 0);
  normalize_strip<T, N>(p, partition, work, FromGlobal<T, N, Reuse::last>(p.x, p.shape), epilogue, affine[0]);
}

// PARTIAL: the last matrix row may end within a vector.
template <class T, int N, bool PARTIAL, class Source>
__device__ __forceinline__ void normalize_tile(const ForwardParams& p, const Partition& partition, const WorkTile& work,
                                               const ColumnPlace<N>& place, Source&& x, Epilogue epilogue,
                                               const Affine<acc_t<T>> (&affine)[N]) {
  iterate_columns<N, kApplyChunk<T, N>, PARTIAL>(partition, p.shape.numel(), work, place, [&](const auto& chunk) {
    normalize_chunk<T, N>(p, chunk, x, epilogue, [&](int e) { return affine[e]; });
  });
}

template <class T, int N>
__device__ __forceinline__ void normalize_columns(const ForwardParams& p, const Partition& partition,
                                                  const WorkTile& work, Epilogue epilogue, bool by_running) {
  const ColumnPlace<N> place(partition, work);
  if (!place.active) return;
  Affine<acc_t<T>> affine[N];
  load_affine(affine, p, Channels<N>(partition, p.shape, place.col), by_running, work.split == 0 && place.row == 0);
  normalize_tile<T, N, true>(p, partition, work, place, FromGlobal<T, N, Reuse::last>(p.x, p.shape), epilogue, affine);
}

}  // namespace bnext::cuda
