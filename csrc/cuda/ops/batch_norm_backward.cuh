// The backward of batch norm as an operation that every plan runs (see plans/block.cuh for what an operation has):
// dy, x -> sum of dy' and of dy' * (x - mean) of each channel; then dy, x, sums -> dx, dresidual?; where dy' is dy
// times the activation's derivative.
#pragma once

#include <utility>

#include "../../core/epilogue.h"
#include "../device/channels.cuh"
#include "../device/loaders.cuh"
#include "../device/pairwise_sum.cuh"
#include "with_op.cuh"

namespace bnext::cuda {

// The two sums of a channel. They are plain: mean is known, and centred products do not cancel.
template <class A>
struct alignas(2 * sizeof(A)) Sums {
  A dy, dy_xmu;

  // Of g * (x - mean), where the textbook has g * x: the difference to mean * sum of g would cancel in the end.
  __device__ __forceinline__ void add(A g, A xmu) {
    dy += g;
    dy_xmu = std::fma(g, xmu, dy_xmu);
  }
  __device__ __forceinline__ void merge(const Sums& other) { *this = *this + other; }
  __device__ __forceinline__ Sums operator+(const Sums& other) const { return {dy + other.dy, dy_xmu + other.dy_xmu}; }
};

// The merge of several sums at once: see device/reduce.cuh.
template <int COUNT, class A>
__device__ __forceinline__ Sums<A> merge_all(const Sums<A> (&sums)[COUNT]) {
  return pairwise_sum<COUNT>([&](int i) { return sums[i]; });
}

template <class Element, Derivative DERIVATIVE, int VEC = kVec<Element, masks(DERIVATIVE)>>
struct BatchNormBackward {
  using Params = BatchNormBackwardParams;
  using T = Element;
  using A = acc_t<T>;
  static constexpr int N = VEC;
  static constexpr bool kGeneral = DERIVATIVE == Derivative::general;
  static constexpr bool kResident = has_resident_kernels(sizeof(T), kGeneral);
  static constexpr bool kReducesMasked = true;
  static constexpr bool kReducesExtras = masks(DERIVATIVE);
  // Both passes read dy and x, also where the second could do without x: plans keep what they have read.
  static constexpr int kInputs = 2;
  static constexpr int kRegisterBytes = register_bytes(dtype_of<T>::value, kGeneral, masks(DERIVATIVE));
  __device__ __forceinline__ static const void* input(const BatchNormBackwardParams& p, int i) {
    return i == 0 ? p.dy : p.x;
  }
  __device__ __forceinline__ static const void* extra_input(const BatchNormBackwardParams&) { return nullptr; }

  // What is known of a channel before its reduction.
  struct ChannelParams { A mean, invstd, weight, bias; };
  __device__ __forceinline__ static ChannelParams channel_params(const BatchNormBackwardParams& p, int64_t channel) {
    return {static_cast<const A*>(p.mean)[channel], static_cast<const A*>(p.invstd)[channel],
            load_parameter<T>(p.weight, p.weight_dtype, channel, A(1)),
            load_parameter<T>(p.bias, p.weight_dtype, channel, A(0))};
  }
  // What else finishing a channel takes. The reduction reads it before whoever finishes, so that it need not be
  // fetched.
  struct Operands { A invstd; };
  __device__ __forceinline__ static Operands operands(const BatchNormBackwardParams& p, int64_t channel) {
    return {static_cast<const A*>(p.invstd)[channel]};
  }
  __device__ __forceinline__ static void prefetch(const BatchNormBackwardParams&, int64_t) {}

  // ---- reduction

  using State = Sums<A>;
  static_assert(sizeof(State) == kBackwardNumbers.state * sizeof(A));

  // The forward's affine step, bit for bit: scale is weight * invstd there as well.
  using Centre = Affine<A>;
  __device__ __forceinline__ static Centre centre(const ChannelParams& params) {
    return {params.mean, params.weight * params.invstd, params.bias};
  }

  // Vectors of each of dy and x in flight; fewer next to masked ends, to the states of N columns, and to the code of
  // all activations.
  template <bool ALIGNED>
  static constexpr int kPlanarReduceChunk = vecs_in<T, N>(ALIGNED && !kGeneral ? 64 : 32);
  static constexpr int kColumnReduceChunk = vecs_in<T, N>(kGeneral ? 16 : 32);

  // What the derivative takes besides x: the mask, which has a byte a vector of 8 (plans see to it that masked vectors
  // are such), or else the residual.
  template <int COUNT>
  struct Extras {
    uint32_t bits[COUNT];
    Vec<T, N> added[COUNT];
  };
  template <int COUNT, bool WHOLE>
  __device__ __forceinline__ static Extras<COUNT> load_reduce_extras(const BatchNormBackwardParams& p,
                                                                     const Chunk<COUNT, WHOLE>& chunk) {
    Extras<COUNT> extras;
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
      const bool is = masked(p) && (WHOLE || int64_t{chunk.vec[k]} * N < p.shape.numel());
      extras.bits[k] = is ? p.mask[chunk.vec[k]] : 0;
    }
    // By the cache: the second pass reads the residual again, which no plan keeps.
    if (adds(p)) FromGlobal<T, N, Reuse::again>(p.residual, p.shape).load(chunk, extras.added);
    return extras;
  }

  // One thread's part of a channel: up to 4 independent sums, for short chains of dependent additions.
  struct PlanarReducer {
    static constexpr int kSums = N < 4 ? N : 4;
    // One channel's, for x - mean, and for the activation's argument where there is one.
    Affine<A> affine;
    Sums<A> sums[kSums] = {};

    __device__ __forceinline__ explicit PlanarReducer(const Centre& centre) : affine(centre) {}

    template <int COUNT, bool WHOLE>
    __device__ __forceinline__ void add(const BatchNormBackwardParams& p, const Chunk<COUNT, WHOLE>& chunk,
                                        const Vec<T, N> (&vecs)[2][COUNT], const Extras<COUNT>& extras) {
      for_each_gradient(
          p, chunk, vecs, extras, [&](int) { return affine; },
          [&](int k, const A(&dy)[N], const A(&x)[N]) {
#pragma unroll
            for (int e = 0; e < N; ++e) {
              // Elements of a neighbouring channel are skipped, not multiplied by 0: they may be infinite.
              if (chunk.has(k, e)) sums[e % kSums].add(dy[e], x[e] - affine.mean);
            }
          });
    }

    __device__ __forceinline__ State result() { return merge_all(sums); }
  };

  static constexpr bool kNeedsShiftRow = false;

  // One thread's N columns. Their affine steps stay in registers, since every row needs them.
  struct ColumnReducer {
    Affine<A> affine[N];
    State sums[N];

    __device__ __forceinline__ ColumnReducer(const Centre (&centres)[N], const Vec<T, N>&) {
#pragma unroll
      for (int e = 0; e < N; ++e) {
        affine[e] = centres[e];
        sums[e] = {};
      }
    }

    template <int COUNT>
    __device__ __forceinline__ void add(const BatchNormBackwardParams& p, const Chunk<COUNT, true>& chunk,
                                        const Vec<T, N> (&vecs)[2][COUNT], const Extras<COUNT>& extras) {
      for_each_gradient(
          p, chunk, vecs, extras, [&](int e) { return affine[e]; },
          [&](int, const A(&dy)[N], const A(&x)[N]) {
#pragma unroll
            for (int e = 0; e < N; ++e) sums[e].add(dy[e], x[e] - affine[e].mean);
          });
    }

    // What merge_rows() takes: of each column all threads' sums are adjacent, so that the lanes of merge() read without
    // bank conflicts.
    __device__ __forceinline__ void store(const ColumnPlace<N>&, void* memory) const {
#pragma unroll
      for (int e = 0; e < N; ++e) static_cast<State*>(memory)[e * kMaxThreads + threadIdx.x] = sums[e];
    }
    // What a lane of the merging warp has of column `e`: the sums of every 32nd thread, one of each warp. A warp that
    // the block does not have counts as 0, so that the loop has a constant length.
    __device__ __forceinline__ static State merge(void* memory, int e, int lane, int) {
      constexpr int kWarps = kMaxThreads / kWarp;
      State some[kWarps];
#pragma unroll
      for (int k = 0; k < kWarps; ++k) {
        some[k] =
            k * kWarp < blockDim.x ? static_cast<const State*>(memory)[e * kMaxThreads + k * kWarp + lane] : State{};
      }
      return merge_all(some);
    }

    // Of columns [begin, end) together, which are of one channel. The bounds are known at run time only, and registers
    // have constant indices: all columns take part, those outside with 0.
    __device__ __forceinline__ State over(int begin, int end) const {
      State some[N];
#pragma unroll
      for (int e = 0; e < N; ++e) some[e] = e >= begin && e < end ? sums[e] : State{};
      return merge_all(some);
    }
  };

  // Adds the elements that the end of the tensor cut from the last vector of columns: fewer than N.
  __device__ __forceinline__ static void add_tail(const BatchNormBackwardParams& p, int64_t channel, State& whole) {
    const int64_t numel = p.shape.numel();
    const Affine<A> affine = centre(channel_params(p, channel));
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

  // Writes a channel's sums, and the gradients of its parameters: of the bias sum_dy itself, of the weight sum_dy_xmu
  // with the factor that turns x - mean into xhat.
  __device__ __forceinline__ static void finish(const BatchNormBackwardParams& p, int64_t channel, const State& whole,
                                                const Operands& operands) {
    static_cast<A*>(p.sum_dy)[channel] = whole.dy;
    static_cast<A*>(p.sum_dy_xmu)[channel] = whole.dy_xmu;
    store_parameter<T>(p.dweight, p.weight_dtype, channel, whole.dy_xmu * operands.invstd);
    store_parameter<T>(p.dbias, p.weight_dtype, channel, whole.dy);
  }

  __device__ __forceinline__ static void between_passes(const BatchNormBackwardParams&) {}
  __device__ __forceinline__ static void at_kernel_end(const BatchNormBackwardParams&, const Scratch&) {}

  // ---- from a channel's sums to the coefficients of its gradient

  // All of it, as the gradient needs both sums.
  using Summary = State;
  static_assert(sizeof(Summary) == kBackwardNumbers.summary * sizeof(A));
  __device__ __forceinline__ static Summary summary(const BatchNormBackwardParams&, const State& whole) {
    return whole;
  }

  // The forward's affine step, for the activation's argument, and the gradient. In evaluation mode there are no sums.
  struct Coefficients {
    Affine<A> affine;
    AffineGradient<A> gradient;
  };
  static_assert(sizeof(Coefficients) == kBackwardNumbers.coefficients * sizeof(A));

  // What finish() wrote, or a synchronised sum put in its place. Without a dx, or in evaluation mode, nobody wrote the
  // sums, although there may be memory for them.
  __device__ __forceinline__ static Summary load_summary(const BatchNormBackwardParams& p, int64_t channel) {
    if (!p.training || !p.dx) return {};
    return {static_cast<const A*>(p.sum_dy)[channel], static_cast<const A*>(p.sum_dy_xmu)[channel]};
  }
  // A pass on its own saves nothing: unlike the forward's in evaluation mode, it has no statistics of its own.
  __device__ __forceinline__ static Summary load_standalone_summary(const BatchNormBackwardParams& p, int64_t channel,
                                                                    bool) {
    return load_summary(p, channel);
  }

  __device__ __forceinline__ static Coefficients coefficients(const BatchNormBackwardParams& p,
                                                              const ChannelParams& params, const Summary& sums) {
    const Affine<A> affine = centre(params);
    // In evaluation mode mean and invstd are constants, and dx = dy' * scale.
    if (!p.training) return {affine, {affine.mean, affine.scale, A(0), A(0)}};
    const A inverse = A(1) / static_cast<A>(p.count);
    // The order of the products is part of the result: invstd squared by itself may overflow where the sum is small.
    return {affine,
            {affine.mean, affine.scale, sums.dy * inverse, sums.dy_xmu * inverse * params.invstd * params.invstd}};
  }

  // ---- elementwise

  // Vectors of each of dy and x in flight; fewer next to the coefficients of N columns.
  template <bool COLUMNS>
  static constexpr int kApplyChunk = vecs_in<T, N>(COLUMNS && kGeneral   ? 16
                                                   : COLUMNS || kGeneral ? 32
                                                                         : 64);

  template <int COUNT, bool WHOLE>
  __device__ __forceinline__ static Extras<COUNT> load_apply_extras(const BatchNormBackwardParams& p,
                                                                    const Chunk<COUNT, WHOLE>& chunk) {
    return load_reduce_extras(p, chunk);
  }

  // at(e) is the coefficients of element e of a vector.
  template <int COUNT, bool WHOLE, class CoefficientsAt>
  __device__ __forceinline__ static void apply(const BatchNormBackwardParams& p, const Chunk<COUNT, WHOLE>& chunk,
                                               const Vec<T, N> (&vecs)[2][COUNT], const Extras<COUNT>& extras,
                                               const CoefficientsAt& at) {
    for_each_gradient(
        p, chunk, vecs, extras, [&](int e) { return at(e).affine; },
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
          } else {  // x must not touch the gradient, not even an infinite x: inf * 0 would be NaN
#pragma unroll
            for (int e = 0; e < N; ++e) dx[e] = dy[e] * at(e).gradient.scale;
          }
          store_at(static_cast<T*>(p.dx), chunk, k, narrow_vec<T, N>(dx));
        });
  }

 private:
  // Whether the derivative comes from the bits that the forward kept: a constant, but for kernels that look it up.
  __device__ __forceinline__ static bool masked(const BatchNormBackwardParams& p) {
    constexpr bool depends = DERIVATIVE == Derivative::general || DERIVATIVE == Derivative::run_time;
    return DERIVATIVE == Derivative::mask || (depends && p.mask != nullptr);
  }
  // Whether the activation's argument, which is to be found again, has the residual in it.
  __device__ __forceinline__ static bool adds(const BatchNormBackwardParams& p) {
    return kGeneral && !masked(p) && p.residual != nullptr;
  }

  // Calls body(k, dy', x) for each vector of a chunk.
  template <int COUNT, bool WHOLE, class AffineAt, class Body>
  __device__ __forceinline__ static void for_each_gradient(const BatchNormBackwardParams& p,
                                                           const Chunk<COUNT, WHOLE>& chunk,
                                                           const Vec<T, N> (&vecs)[2][COUNT],
                                                           const Extras<COUNT>& extras, const AffineAt& affine_at,
                                                           Body&& body) {
    const auto& bits = extras.bits;
    const bool active =
        DERIVATIVE == Derivative::run_time ? p.activation != Activation::none : DERIVATIVE != Derivative::none;
    // Of the whole chunk before anything else, so that the code of an activation is there once and not for each vector.
    A derivative[COUNT][N];
    if constexpr (kGeneral) {
      const A param = static_cast<A>(p.activation_param);
      if (masked(p)) {
#pragma unroll
        for (int k = 0; k < COUNT; ++k) {
#pragma unroll
          for (int e = 0; e < N; ++e) derivative[k][e] = bits[k] >> (e % 8) & 1 ? A(1) : param;
        }
      } else {
        // First the argument, in the registers that the derivative then takes.
#pragma unroll
        for (int k = 0; k < COUNT; ++k) {
          widen_vec<T, N>(vecs[1][k], derivative[k]);
#pragma unroll
          for (int e = 0; e < N; ++e) {
            derivative[k][e] = affine_at(e)(derivative[k][e]);
            if (adds(p)) derivative[k][e] += extras.added[k][e];
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
          // masked() is a constant but in run_time, whose kernels have one instance of the code for all.
          if (masked(p)) dy[e] = bits[k] >> (e % 8) & 1 ? dy[e] : A(0);
          else dy[e] = relu_gate(affine_at(e)(x[e]), dy[e]);
        }
      }
      body(k, dy, x);
    }
  }
};

// ---- see with_op.cuh

template <class F>
cudaError_t with_op(const BatchNormBackwardParams& p, F&& f) {
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    switch (derivative_of(p)) {
      case Derivative::none: return f(BatchNormBackward<T, Derivative::none>{});
      case Derivative::relu: return f(BatchNormBackward<T, Derivative::relu>{});
      case Derivative::mask: return f(BatchNormBackward<T, Derivative::mask>{});
      case Derivative::general: return f(BatchNormBackward<T, Derivative::general>{});
      case Derivative::run_time: break;  // derivative_of() knows the rest
    }
    return cudaErrorInvalidValue;
  });
}

template <class F>
cudaError_t with_reduction(const BatchNormBackwardParams& p, F&& f) {
  return with_op(p, std::forward<F>(f));
}

template <class T, int N> struct RunTime<BatchNormBackwardParams, T, N> {
  using Op = BatchNormBackward<T, Derivative::run_time, N>;
};

}  // namespace bnext::cuda
