// The backward of batch norm as an operation that every plan runs (see plans/block.cuh for what an operation has):
// dy, x -> sum of dy' and of dy' * (x - mean) of each channel; then dy, x, sums -> dx, dresidual?; where dy' is dy
// times the activation's derivative.
#pragma once

#include "../../core/epilogue.h"
#include "../device/channels.cuh"
#include "../device/loaders.cuh"
#include "../launch.h"

namespace bnext::cuda {

// Vectors of these are of 8 elements, whose bits are a byte.
constexpr bool masks(Derivative d) { return d >= Derivative::mask; }

// The two sums of a channel. They are plain: mean is known, and centred products do not cancel.
template <class A>
struct alignas(2 * sizeof(A)) Sums {
  A dy, dy_xmu;

  // Of g * (x - mean), where the textbook has g * x: the difference to mean * sum of g would cancel in the end.
  __device__ __forceinline__ void add(A g, A xmu) {
    dy += g;
    dy_xmu = std::fma(g, xmu, dy_xmu);
  }
  __device__ __forceinline__ void merge(const Sums& other) {
    dy += other.dy;
    dy_xmu += other.dy_xmu;
  }
};

template <class Element, Derivative DERIVATIVE, int VEC = kVec<Element, masks(DERIVATIVE)>>
struct BatchNormBackward {
  using Params = BatchNormBackwardParams;
  using T = Element;
  using A = acc_t<T>;
  static constexpr int N = VEC;
  static constexpr bool kGeneral = DERIVATIVE == Derivative::general;
  // exp of a float64 takes so much code that the general kernels of that type would be a fifth of the build.
  static constexpr bool kResident = !(kGeneral && sizeof(T) == 8);
  // Both passes read dy and x, also where the second could do without x: plans keep what they have read.
  static constexpr int kInputs = 2;
  __device__ __forceinline__ static const void* input(const BatchNormBackwardParams& p, int i) {
    return i == 0 ? p.dy : p.x;
  }

  // ---- reduction

  using State = Sums<A>;

  // Vectors of each of dy and x in flight; fewer next to masked ends, to the states of N columns, and to the code of
  // all activations.
  template <bool ALIGNED>
  static constexpr int kPlanarReduceChunk = vecs_in<T, N>(ALIGNED && !kGeneral ? 64 : 32);
  static constexpr int kColumnReduceChunk = vecs_in<T, N>(kGeneral ? 16 : 32);

  // One thread's part of a channel: up to 4 independent sums, for short chains of dependent additions.
  struct PlanarReducer {
    static constexpr int kSums = N < 4 ? N : 4;
    Affine<A> affine;
    Sums<A> sums[kSums] = {};

    __device__ __forceinline__ PlanarReducer(const BatchNormBackwardParams& p, int64_t channel)
        : affine(load_affine(p, channel)) {}

    template <int COUNT, bool WHOLE>
    __device__ __forceinline__ void add(const BatchNormBackwardParams& p, const Chunk<COUNT, WHOLE>& chunk,
                                        const Vec<T, N> (&vecs)[2][COUNT]) {
      for_each_gradient(
          p, chunk, vecs, [&](int) { return affine; },
          [&](int k, const A(&dy)[N], const A(&x)[N]) {
#pragma unroll
            for (int e = 0; e < N; ++e) {
              // Elements of a neighbouring channel are skipped, not multiplied by 0: they may be infinite.
              if (chunk.has(k, e)) sums[e % kSums].add(dy[e], x[e] - affine.mean);
            }
          });
    }

    // In halves, so that the order is fixed, and the chain of dependent additions short.
    __device__ __forceinline__ State result() {
#pragma unroll
      for (int half = kSums / 2; half >= 1; half /= 2) {
#pragma unroll
        for (int e = 0; e < half; ++e) sums[e].merge(sums[e + half]);
      }
      return sums[0];
    }
  };

  // One thread's N columns. Their affine steps stay in registers, since every row needs them.
  struct ColumnReducer {
    Affine<A> affine[N] = {};
    State sums[N];

    __device__ __forceinline__ ColumnReducer(const BatchNormBackwardParams& p, const Channels<N>& channels,
                                             bool active) {
      // A thread past the tile's columns has none to load; it still meets the barriers of the reduction.
      A invstd[N];
      if (active) load_affine(affine, invstd, p, channels);
#pragma unroll
      for (int e = 0; e < N; ++e) sums[e] = {};
    }

    template <int COUNT>
    __device__ __forceinline__ void add(const BatchNormBackwardParams& p, const Chunk<COUNT, true>& chunk,
                                        const Vec<T, N> (&vecs)[2][COUNT]) {
      for_each_gradient(
          p, chunk, vecs, [&](int e) { return affine[e]; },
          [&](int, const A(&dy)[N], const A(&x)[N]) {
#pragma unroll
            for (int e = 0; e < N; ++e) sums[e].add(dy[e], x[e] - affine[e].mean);
          });
    }

    __device__ __forceinline__ void result(State (&state)[N]) const {
#pragma unroll
      for (int e = 0; e < N; ++e) state[e] = sums[e];
    }
  };

  // Adds the elements that the end of the tensor cut from the last vector of columns: fewer than N.
  __device__ __forceinline__ static void add_tail(const BatchNormBackwardParams& p, int64_t channel, State& whole) {
    const int64_t numel = p.shape.numel();
    const Affine<A> affine = load_affine(p, channel);
    const A param = static_cast<A>(p.activation_param);
#pragma unroll 1
    for (int64_t i = numel & -int64_t{N}; i < numel; ++i) {
      if (i % p.shape.c != channel) continue;
      // At most N - 1 elements of the whole tensor: short code counts here, and not speed.
      const A x = widen(static_cast<const T*>(p.x)[i]);
      A derivative = A(1);
      if (p.mask) {
        derivative = p.mask[i / 8] >> (i % 8) & 1 ? A(1) : param;
      } else if (DERIVATIVE != Derivative::none) {
        A z = affine(x);
        if (p.residual) z += widen(static_cast<const T*>(p.residual)[i]);
        if constexpr (kGeneral) {
          with_general_activation(p.activation, [&](auto act) { derivative = decltype(act)::grad(z, param); });
        } else if (DERIVATIVE != Derivative::run_time || p.activation != Activation::none) {
          derivative = Relu::grad(z, param);
        }
      }
      whole.add(through(widen(static_cast<const T*>(p.dy)[i]), derivative), x - affine.mean);
    }
  }

  // Writes a channel's sums, and the gradients of its parameters.
  __device__ __forceinline__ static void finish(const BatchNormBackwardParams& p, int64_t channel, const State& whole) {
    static_cast<A*>(p.sum_dy)[channel] = whole.dy;
    static_cast<A*>(p.sum_dy_xmu)[channel] = whole.dy_xmu;
    store_parameter<T>(p.dweight, p.weight_dtype, channel, whole.dy_xmu * static_cast<const A*>(p.invstd)[channel]);
    store_parameter<T>(p.dbias, p.weight_dtype, channel, whole.dy);
  }

  __device__ __forceinline__ static void after_reduction(const BatchNormBackwardParams&) {}
  __device__ __forceinline__ static void end(const BatchNormBackwardParams&, const Scratch&, int64_t) {}

  // ---- from a channel's sums to the coefficients of its gradient

  // All of it, as the gradient needs both sums.
  using Summary = State;
  __device__ __forceinline__ static Summary summary(const BatchNormBackwardParams&, const State& whole) {
    return whole;
  }

  // The forward's affine step, for the activation's argument, and the gradient. In evaluation mode there are no sums.
  struct Coefficients {
    Affine<A> affine;
    AffineGradient<A> gradient;
  };

  template <int WIDTH>
  __device__ __forceinline__ static void coefficients(Coefficients (&out)[WIDTH], const BatchNormBackwardParams& p,
                                                      const Channels<WIDTH>& channels, const Summary (&sums)[WIDTH]) {
    Affine<A> affine[WIDTH];
    A invstd[WIDTH];
    load_affine(affine, invstd, p, channels);
    // One division a thread, not one a column.
    const A inverse = p.training ? A(1) / static_cast<A>(p.count) : A(0);
    // The order of the products is part of the result: invstd squared by itself may overflow where the sum is small.
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) {
      out[e].affine = affine[e];
      out[e].gradient = {affine[e].mean, affine[e].scale, p.training ? sums[e].dy * inverse : A(0),
                         p.training ? sums[e].dy_xmu * inverse * invstd[e] * invstd[e] : A(0)};
    }
  }

  // By what finish() wrote, or a synchronised sum put in its place.
  template <int WIDTH>
  __device__ __forceinline__ static void load_coefficients(Coefficients (&out)[WIDTH], const BatchNormBackwardParams& p,
                                                           const Channels<WIDTH>& channels) {
    A sum_dy[WIDTH], sum_dy_xmu[WIDTH];
    // Without a dx, or in evaluation mode, nobody wrote the sums, although there may be memory for them.
    const bool summed = p.training && p.dx;
    load_parameters<A>(sum_dy, summed ? p.sum_dy : nullptr, dtype_of<A>::value, channels, A(0));
    load_parameters<A>(sum_dy_xmu, summed ? p.sum_dy_xmu : nullptr, dtype_of<A>::value, channels, A(0));
    Summary sums[WIDTH];
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) sums[e] = {sum_dy[e], sum_dy_xmu[e]};
    coefficients(out, p, channels, sums);
  }

  // A pass on its own saves nothing: unlike the forward's in evaluation mode, it has no statistics of its own.
  template <int WIDTH>
  __device__ __forceinline__ static void load_coefficients_of_pass(Coefficients (&out)[WIDTH],
                                                                   const BatchNormBackwardParams& p,
                                                                   const Channels<WIDTH>& channels, bool) {
    load_coefficients(out, p, channels);
  }

  // ---- elementwise

  // Vectors of each of dy and x in flight; fewer next to the coefficients of N columns.
  template <bool COLUMNS>
  static constexpr int kApplyChunk = vecs_in<T, N>(COLUMNS && kGeneral   ? 16
                                                   : COLUMNS || kGeneral ? 32
                                                                         : 64);

  // at(e) is the coefficients of element e of a vector.
  template <int COUNT, bool WHOLE, class CoefficientsAt>
  __device__ __forceinline__ static void apply(const BatchNormBackwardParams& p, const Chunk<COUNT, WHOLE>& chunk,
                                               const Vec<T, N> (&vecs)[2][COUNT], const CoefficientsAt& at) {
    for_each_gradient(
        p, chunk, vecs, [&](int e) { return at(e).affine; },
        [&](int k, const A(&dy)[N], const A(&x)[N]) {
          // Without an activation dresidual is dy itself, and with relu alone there is no residual.
          if (masks(DERIVATIVE) && p.dresidual) {
            store_at(static_cast<T*>(p.dresidual), chunk, k, narrow_vec<T, N>(dy));
          }
          if (!p.dx) return;
          A dx[N];
          if (p.training) {
#pragma unroll
            for (int e = 0; e < N; ++e) dx[e] = at(e).gradient(dy[e], x[e]);
          } else {  // x must not touch the gradient, not even an infinite x
#pragma unroll
            for (int e = 0; e < N; ++e) dx[e] = dy[e] * at(e).gradient.scale;
          }
          store_at(static_cast<T*>(p.dx), chunk, k, narrow_vec<T, N>(dx));
        });
  }

 private:
  // The forward's affine steps, bit for bit: scale is weight * invstd there as well. And invstd.
  template <int WIDTH>
  __device__ __forceinline__ static void load_affine(Affine<A> (&affine)[WIDTH], A (&invstd)[WIDTH],
                                                     const BatchNormBackwardParams& p,
                                                     const Channels<WIDTH>& channels) {
    A mean[WIDTH], weight[WIDTH], bias[WIDTH];
    load_vector<A>(mean, p.mean, channels);
    load_vector<A>(invstd, p.invstd, channels);
    load_parameters<T>(weight, p.weight, p.weight_dtype, channels, A(1));
    load_parameters<T>(bias, p.bias, p.weight_dtype, channels, A(0));
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) affine[e] = {mean[e], weight[e] * invstd[e], bias[e]};
  }

  __device__ __forceinline__ static Affine<A> load_affine(const BatchNormBackwardParams& p, int64_t channel) {
    Affine<A> affine[1];
    A invstd[1];
    load_affine(affine, invstd, p, Channels<1>(channel));
    return affine[0];
  }

  // Calls body(k, dy', x) for each vector of a chunk.
  template <int COUNT, bool WHOLE, class AffineAt, class Body>
  __device__ __forceinline__ static void for_each_gradient(const BatchNormBackwardParams& p,
                                                           const Chunk<COUNT, WHOLE>& chunk,
                                                           const Vec<T, N> (&vecs)[2][COUNT], const AffineAt& affine_at,
                                                           Body&& body) {
    // What the derivative takes besides x, all loads in flight together. The mask has a byte a vector of 8; plans see
    // to it that masked vectors are such.
    const bool masked = DERIVATIVE == Derivative::mask || (DERIVATIVE >= Derivative::general && p.mask != nullptr);
    const bool adds = kGeneral && !masked && p.residual != nullptr;
    uint32_t bits[COUNT];
    Vec<T, N> added[COUNT];
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
      bits[k] = masked && (WHOLE || int64_t{chunk.vec[k]} * N < p.shape.numel()) ? p.mask[chunk.vec[k]] : 0;
    }
    // By the cache: the second pass reads the residual again, which no plan keeps.
    if (adds) FromGlobal<T, N, Reuse::again>(p.residual, p.shape).load(chunk, added);

    const bool active =
        DERIVATIVE == Derivative::run_time ? p.activation != Activation::none : DERIVATIVE != Derivative::none;
    // Of the whole chunk before anything else, so that the code of an activation is there once and not for each vector.
    A derivative[COUNT][N];
    if constexpr (kGeneral) {
      const A param = static_cast<A>(p.activation_param);
      if (masked) {
#pragma unroll
        for (int k = 0; k < COUNT; ++k) {
#pragma unroll
          for (int e = 0; e < N; ++e) derivative[k][e] = bits[k] >> (e % 8) & 1 ? A(1) : param;
        }
      } else {
#pragma unroll
        for (int k = 0; k < COUNT; ++k) {
          widen_vec<T, N>(vecs[1][k], derivative[k]);
#pragma unroll
          for (int e = 0; e < N; ++e) {
            derivative[k][e] = affine_at(e)(derivative[k][e]);
            if (adds) derivative[k][e] += added[k][e];
          }
        }
        // The branch is uniform over the grid, and there is nothing but arithmetic in each of its arms.
        with_general_activation(p.activation, [&](auto act) {
#pragma unroll
          for (int k = 0; k < COUNT; ++k) {
#pragma unroll
            for (int e = 0; e < N; ++e) derivative[k][e] = decltype(act)::grad(derivative[k][e], param);
          }
        });
      }
    }
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
      A dy[N], x[N];
      widen_vec<T, N>(vecs[0][k], dy);
      widen_vec<T, N>(vecs[1][k], x);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        if (!active) continue;
        if constexpr (kGeneral) {
          dy[e] = through(dy[e], derivative[k][e]);
        } else {
          // relu's derivative is 0 or 1, which makes the product a selection: one instruction less. `masked` is a
          // constant but in run_time, whose kernels have one instance of the code for all.
          A derivative;
          if (masked) derivative = bits[k] >> (e % 8) & 1 ? A(1) : A(0);
          else derivative = Relu::grad(affine_at(e)(x[e]), A(0));
          dy[e] = derivative == A(1) ? dy[e] : A(0);
        }
      }
      body(k, dy, x);
    }
  }
};

}  // namespace bnext::cuda
