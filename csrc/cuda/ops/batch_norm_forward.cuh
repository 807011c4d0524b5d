// The forward of batch norm as an operation that every plan runs (see plans/block.cuh for what an operation has):
// x -> (count, mean, variance) of each channel; then x, residual? -> y = act((x - mean) * scale + bias + residual),
// mask?.
#pragma once

#include <type_traits>

#include "../../core/epilogue.h"
#include "../../core/welford.h"
#include "../device/barrier.cuh"
#include "../device/channels.cuh"
#include "../device/loaders.cuh"
#include "../device/pairwise_sum.cuh"
#include "with_op.cuh"

namespace bnext {

// Sets all of `whole` but its shift to the merge of sets of so many numbers each: first their mean, then what they vary
// about it, both weighted by their counts. `offset` is to the shift of `whole`, and 0 of empty sets. One division and
// two short sums, where merging one by one takes a division each, and each waits for the one before.
//
// Weights are rounded, those of equal counts all to the same side, so that they do not sum to 1. What they weigh is
// therefore what variances differ by from their plain average: otherwise each of a dozen merges would make all of them
// that much smaller or larger.
template <int COUNT, class A>
__device__ __forceinline__ void merge_weighted(Welford<A>& whole, const A (&count)[COUNT], const A (&offset)[COUNT],
                                               const A (&var)[COUNT]) {
  whole.count = cuda::pairwise_sum<COUNT>([&](int i) { return count[i]; });
  const A inverse = reciprocal(max(whole.count, A(1)));
  A weight[COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; ++i) weight[i] = count[i] * inverse;
  whole.offset = cuda::pairwise_sum<COUNT>([&](int i) { return weight[i] * offset[i]; });
  constexpr A kEach = A(1) / A(COUNT);
  const A average = kEach * cuda::pairwise_sum<COUNT>([&](int i) { return var[i]; });
  whole.var = average + cuda::pairwise_sum<COUNT>([&](int i) {
                const A d = offset[i] - whole.offset;
                return weight[i] * ((var[i] - average) + d * d);
              });
}

// The merge of several states at once: see device/reduce.cuh.
template <int COUNT, class A>
__device__ __forceinline__ Welford<A> merge_all(const Welford<A> (&states)[COUNT]) {
  Welford<A> whole = {};
  // The shift is that of the first that is not empty, found from behind.
#pragma unroll
  for (int i = COUNT - 1; i >= 0; --i) whole.shift = states[i].count > A(0) ? states[i].shift : whole.shift;
  A count[COUNT], offset[COUNT], var[COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    count[i] = states[i].count;
    offset[i] = count[i] > A(0) ? (states[i].shift - whole.shift) + states[i].offset : A(0);
    var[i] = states[i].var;
  }
  merge_weighted(whole, count, offset, var);
  return whole;
}

}  // namespace bnext

namespace bnext::cuda {

template <class Element, Epilogue EPILOGUE, int VEC = kVec<Element, masks(EPILOGUE)>>
struct BatchNormForward {
  using Params = BatchNormForwardParams;
  using T = Element;
  using A = acc_t<T>;
  static constexpr int N = VEC;
  static constexpr bool kGeneral = EPILOGUE == Epilogue::general;
  static constexpr bool kResident = has_resident_kernels(sizeof(T), kGeneral);
  static constexpr bool kReducesMasked = false;
  static constexpr bool kReducesExtras = false;
  // The residual is none of them: statistics do not take it, and a plan that kept it would have half the room for x.
  static constexpr int kInputs = 1;
  static constexpr int kRegisterBytes = register_bytes(dtype_of<T>::value, kGeneral, /*reduces_masked=*/false);
  __device__ __forceinline__ static const void* input(const BatchNormForwardParams& p, int) { return p.x; }
  __device__ __forceinline__ static const void* extra_input(const BatchNormForwardParams& p) { return p.residual; }

  // What is known of a channel before its reduction.
  struct ChannelParams { A weight, bias; };
  __device__ __forceinline__ static ChannelParams channel_params(const BatchNormForwardParams& p, int64_t channel) {
    return {load_parameter<T>(p.weight, p.weight_dtype, channel, A(1)),
            load_parameter<T>(p.bias, p.weight_dtype, channel, A(0))};
  }

  // What else finishing a channel takes; and how it is fetched into the L2 cache, for whoever will.
  struct Operands { A running_mean, running_var; };
  __device__ __forceinline__ static Operands operands(const BatchNormForwardParams& p, int64_t channel) {
    return {load_parameter<T>(p.running_mean, p.running_dtype, channel, A(0)),
            load_parameter<T>(p.running_var, p.running_dtype, channel, A(1))};
  }
  __device__ __forceinline__ static void prefetch(const BatchNormForwardParams& p, int64_t channel) {
    prefetch_l2(parameter_at<T>(p.weight, p.weight_dtype, channel));
    prefetch_l2(parameter_at<T>(p.bias, p.weight_dtype, channel));
    prefetch_l2(parameter_at<T>(p.running_mean, p.running_dtype, channel));
    prefetch_l2(parameter_at<T>(p.running_var, p.running_dtype, channel));
  }

  // ---- reduction

  using State = Welford<A>;
  static_assert(sizeof(State) == kForwardNumbers.state * sizeof(A));

  // Statistics need nothing but x.
  struct Nothing {};
  template <int COUNT, bool WHOLE>
  __device__ __forceinline__ static Nothing load_reduce_extras(const BatchNormForwardParams&,
                                                               const Chunk<COUNT, WHOLE>&) {
    return {};
  }
  struct Centre {};
  __device__ __forceinline__ static Centre centre(const ChannelParams&) { return {}; }

  // Vectors of a planar chunk: 32 elements, all of whose loads are in flight together, or what the registers of a full
  // multiprocessor hold of wider elements, and of vectors with masked ends.
  template <bool ALIGNED>
  static constexpr int kPlanarReduceChunk = (sizeof(T) == 8 ? 8
                                             : ALIGNED      ? 32
                                                            : 16) /
                                            N;
  // Rows of a chunk of columns, next to the states of N columns.
  static constexpr int kColumnReduceChunk = N * sizeof(A) > 32 ? 2 : N * sizeof(T) > 16 ? 4 : 8;

  // One thread's part of a channel.
  struct PlanarReducer {
    State state = {};

    __device__ __forceinline__ explicit PlanarReducer(const Centre&) {}

    // Takes the chunk's mean, then its squared deviations from that, from registers: two sums that do not cancel.
    template <int COUNT, bool WHOLE>
    __device__ __forceinline__ void add(const BatchNormForwardParams&, const Chunk<COUNT, WHOLE>& chunk,
                                        const Vec<T, N> (&vecs)[1][COUNT], const Nothing&) {
      // Widened once: both sums below take the values from these registers.
      A value[COUNT][N];
      int n = 0;
#pragma unroll
      for (int k = 0; k < COUNT; ++k) {
        widen_vec<T, N>(vecs[0][k], value[k]);
        n += WHOLE ? N : max(chunk.hi[k] - chunk.lo[k], 0);
      }
      if (n == 0) return;  // of a vector that covers a plane's end, no element may be the thread's

      if (state.count == A(0)) {
        // The shift is the first of the thread's elements, found from behind with constant register indices.
#pragma unroll
        for (int i = COUNT * N - 1; i >= 0; --i) {
          if (chunk.has(i / N, i % N)) state.shift = value[i / N][i % N];
        }
      }

      // The count of a whole chunk is a constant, and so is what divides by it.
      const A inverse = WHOLE ? A(1) / A(COUNT * N) : reciprocal(static_cast<A>(n));
      const A mean = inverse * pairwise_sum<COUNT * N>([&](int i) {
                       A& v = value[i / N][i % N];
                       v = chunk.has(i / N, i % N) ? v - state.shift : A(0);
                       return v;
                     });
      const A var = inverse * pairwise_sum<COUNT * N>([&](int i) {
                      const A d = chunk.has(i / N, i % N) ? value[i / N][i % N] - mean : A(0);
                      return d * d;
                    });
      state.add(static_cast<A>(n), mean, var);
    }

    // Recentred, since from here on the state is merged with those of many threads.
    __device__ __forceinline__ State result() {
      state.recentre();
      return state;
    }
  };

  static constexpr bool kNeedsShiftRow = true;

  // One thread's N columns, all with the same count, so that they share the division of Welford::add; and with the same
  // shifts as the block's other threads, so that what they hold merges without.
  struct ColumnReducer {
    A count = A(0);
    A shift[N] = {}, offset[N] = {}, var[N] = {};

    // `first` is a vector of the block's first row, for the shifts: differences to a value of the channel are exact
    // where the mean is far above the deviation.
    __device__ __forceinline__ ColumnReducer(const Centre (&)[N], const Vec<T, N>& first) {
      widen_vec<T, N>(first, shift);
    }

    template <int COUNT>
    __device__ __forceinline__ void add(const BatchNormForwardParams&, const Chunk<COUNT, true>&,
                                        const Vec<T, N> (&vecs)[1][COUNT], const Nothing&) {
      const Vec<T, N>(&x)[COUNT] = vecs[0];
      const A total = count + A(COUNT);
      const A f = A(COUNT) * reciprocal(total);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        constexpr A inverse = A(1) / A(COUNT);
        const A mean = inverse * pairwise_sum<COUNT>([&](int k) { return x[k][e] - shift[e]; });
        const A chunk_var = inverse * pairwise_sum<COUNT>([&](int k) {
                              const A d = (x[k][e] - shift[e]) - mean;
                              return d * d;
                            });
        // Welford::add of the chunk, with f its part of the count so far.
        const A delta = mean - offset[e];
        offset[e] += delta * f;
        var[e] += f * ((chunk_var - var[e]) + delta * delta * (A(1) - f));
      }
      count = total;
    }

    // What merge_rows() takes: the threads' parts, how many rows each of them had, and the shifts of the tile.
    struct Part { A offset, var; };
    struct Memory {
      Part* parts;
      A *counts, *shifts;

      __device__ __forceinline__ explicit Memory(void* memory)
          : parts(static_cast<Part*>(memory)),
            counts(reinterpret_cast<A*>(parts + N * kMaxThreads)),
            shifts(counts + kMaxThreads) {}
    };

    // Of each column all threads' parts are adjacent, so that the lanes of merge() read without bank conflicts. Shifts
    // are the same in all rows: the first row's threads leave them.
    __device__ __forceinline__ void store(const ColumnPlace<N>& place, void* memory) const {
      const Memory to(memory);
      to.counts[threadIdx.x] = count;
#pragma unroll
      for (int e = 0; e < N; ++e) {
        to.parts[e * kMaxThreads + threadIdx.x] = {offset[e], var[e]};
        if (place.row == 0) to.shifts[e * kMaxTileVecs + place.vec_col] = shift[e];
      }
    }

    // What a lane of the merging warp has of column `e`: the parts of every 32nd thread, one of each warp. A warp that
    // the block does not have counts as empty, so that the loop has a constant length.
    __device__ __forceinline__ static State merge(void* memory, int e, int lane, int lanes) {
      const Memory from(memory);
      constexpr int kWarps = kMaxThreads / kWarp;
      A counts[kWarps], offsets[kWarps], vars[kWarps];
#pragma unroll
      for (int k = 0; k < kWarps; ++k) {
        const bool is = k * kWarp < blockDim.x;
        const Part part = is ? from.parts[e * kMaxThreads + k * kWarp + lane] : Part{};
        counts[k] = is ? from.counts[k * kWarp + lane] : A(0);
        offsets[k] = part.offset;
        vars[k] = part.var;
      }
      State whole = {};
      whole.shift = from.shifts[e * kMaxTileVecs + lane % lanes];
      merge_weighted(whole, counts, offsets, vars);
      whole.recentre();
      return whole;
    }

    // Of columns [begin, end) together, which are of one channel.
    __device__ __forceinline__ State over(int begin, int end) const {
      State whole = {};
      // `begin` and `end` are known at run time only, and registers have constant indices: all columns take part, those
      // outside with 0. The shift is that of column `begin`.
#pragma unroll
      for (int e = N - 1; e >= 0; --e) whole.shift = e >= begin ? shift[e] : whole.shift;
      const A inverse = reciprocal(static_cast<A>(max(end - begin, 1)));
      A mean[N];
#pragma unroll
      for (int e = 0; e < N; ++e) mean[e] = e >= begin && e < end ? (shift[e] - whole.shift) + offset[e] : A(0);
      whole.count = static_cast<A>(end - begin) * count;
      whole.offset = inverse * pairwise_sum<N>([&](int e) { return mean[e]; });
      whole.var = inverse * pairwise_sum<N>([&](int e) {
                    const A d = mean[e] - whole.offset;
                    return e >= begin && e < end ? var[e] + d * d : A(0);
                  });
      whole.recentre();
      return whole;
    }
  };

  // Adds the elements that the end of the tensor cut from the last vector of columns: fewer than N.
  __device__ __forceinline__ static void add_tail(const BatchNormForwardParams& p, int64_t channel, State& whole) {
    const int64_t numel = p.shape.numel();
#pragma unroll 1
    for (int64_t i = numel & -int64_t{N}; i < numel; ++i) {
      if (i % p.shape.c == channel) whole.merge({A(1), widen(static_cast<const T*>(p.x)[i]), A(0), A(0)});
    }
  }

  // Writes a channel's statistics, and updates its running ones.
  __device__ __forceinline__ static void finish(const BatchNormForwardParams& p, int64_t channel, const State& whole,
                                                const Operands& operands) {
    const A mean = whole.mean();
    if (p.mean) static_cast<A*>(p.mean)[channel] = mean;
    if (p.var) static_cast<A*>(p.var)[channel] = whole.var;
    if (p.mean_rest) static_cast<A*>(p.mean_rest)[channel] = whole.mean_rest(mean);
    if (p.invstd) static_cast<A*>(p.invstd)[channel] = inverse_std(whole.var, p.eps);
    if (!p.running_mean) return;
    // num_batches_tracked goes up only when every channel has read it: see between_passes() and at_kernel_end().
    const auto update = RunningUpdate<A>::of(p, p.shape.per_channel());
    store_parameter<T>(p.running_mean, p.running_dtype, channel, update.mean(operands.running_mean, mean));
    store_parameter<T>(p.running_var, p.running_dtype, channel, update.var(operands.running_var, whole.var));
  }

  // Adds one to num_batches_tracked, where it is given: by the first block of a pass that begins when every block of
  // the reduction has read it.
  __device__ __forceinline__ static void between_passes(const BatchNormForwardParams& p) {
    if (p.num_batches_tracked && blockIdx.x == 0 && threadIdx.x == 0) ++*p.num_batches_tracked;
  }

  // The same at the end of a kernel without such a point. A cumulative average reads it, so that the last block to
  // finish must do it, which takes a counter.
  __device__ __forceinline__ static void at_kernel_end(const BatchNormForwardParams& p, const Scratch& scratch) {
    if (!p.num_batches_tracked) return;
    const bool last = p.cumulative ? arrive_last(scratch.counters, gridDim.x) : blockIdx.x == 0;
    if (last && threadIdx.x == 0) ++*p.num_batches_tracked;
  }

  // ---- from a channel's statistics to its affine step

  // What the elementwise pass needs of a channel's state.
  struct Summary { A mean, invstd; };
  static_assert(sizeof(Summary) == kForwardNumbers.summary * sizeof(A));
  __device__ __forceinline__ static Summary summary(const BatchNormForwardParams& p, const State& whole) {
    return {whole.mean(), inverse_std(whole.var, p.eps)};
  }

  // What finish() wrote.
  __device__ __forceinline__ static Summary load_summary(const BatchNormForwardParams& p, int64_t channel) {
    return {load_parameter<A>(p.mean, dtype_of<A>::value, channel, A(0)), static_cast<const A*>(p.invstd)[channel]};
  }

  // For an elementwise pass on its own: in evaluation mode the running statistics, of which the thread that `saves`
  // writes mean and invstd.
  __device__ __forceinline__ static Summary load_standalone_summary(const BatchNormForwardParams& p, int64_t channel,
                                                                    bool saves) {
    if (p.running_mean == nullptr) return load_summary(p, channel);  // `normalize` by given statistics
    const A var = load_parameter<T>(p.running_var, p.running_dtype, channel, A(1));
    const Summary summary = {load_parameter<T>(p.running_mean, p.running_dtype, channel, A(0)),
                             inverse_std(var, p.eps)};
    if (saves && p.mean) static_cast<A*>(p.mean)[channel] = summary.mean;
    if (saves && p.invstd) static_cast<A*>(p.invstd)[channel] = summary.invstd;
    return summary;
  }

  // weight * invstd is rounded once, here as in the backward, so that both compute the same z.
  using Coefficients = Affine<A>;
  static_assert(sizeof(Coefficients) == kForwardNumbers.coefficients * sizeof(A));
  __device__ __forceinline__ static Coefficients coefficients(const BatchNormForwardParams&,
                                                              const ChannelParams& params, const Summary& summary) {
    return {summary.mean, params.weight * summary.invstd, params.bias};
  }

  // ---- elementwise

  // Vectors of each of x and residual that a thread has in flight.
  template <bool COLUMNS>
  static constexpr int kApplyChunk = vecs_in<T, N>(kGeneral ? 32 : 64);

  // The residual.
  template <int COUNT> struct Added { Vec<T, N> vecs[COUNT]; };
  template <int COUNT, bool WHOLE>
  __device__ __forceinline__ static Added<COUNT> load_apply_extras(const BatchNormForwardParams& p,
                                                                   const Chunk<COUNT, WHOLE>& chunk) {
    Added<COUNT> added;
    if (adds(p)) FromGlobal<T, N, Reuse::last>(p.residual, p.shape).load(chunk, added.vecs);
    return added;
  }

  // affine_at(e) is the affine step of element e of a vector.
  template <int COUNT, bool WHOLE, class AffineAt>
  __device__ __forceinline__ static void apply(const BatchNormForwardParams& p, const Chunk<COUNT, WHOLE>& chunk,
                                               const Vec<T, N> (&vecs)[1][COUNT], const Added<COUNT>& added,
                                               const AffineAt& affine_at) {
    const auto argument = [&](int k, const Vec<T, N>& x, A(&z)[N]) {
      widen_vec<T, N>(x, z);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        z[e] = affine_at(e)(z[e]);
        if (adds(p)) z[e] += added.vecs[k][e];
      }
    };
    const auto store = [&](int k, const A(&y)[N], uint32_t bits) {
      store_at(static_cast<T*>(p.y), chunk, k, narrow_vec<T, N>(y));
      if (kMasks && p.mask) p.mask[chunk.vec[k]] = static_cast<uint8_t>(bits);
    };
    if constexpr (kGeneral) {
      A z[COUNT][N];
      uint32_t bits[COUNT] = {};
#pragma unroll
      for (int k = 0; k < COUNT; ++k) argument(k, vecs[0][k], z[k]);
      // The branch is uniform over the grid, and there is nothing but arithmetic in each of its arms.
      with_general_activation(p.activation, [&](auto act) {
#pragma unroll
        for (int k = 0; k < COUNT; ++k) bits[k] = activate<decltype(act)>(p, chunk, k, z[k]);
      });
#pragma unroll
      for (int k = 0; k < COUNT; ++k) store(k, z[k], bits[k]);
    } else {
      using Act = std::conditional_t<EPILOGUE == Epilogue::none || EPILOGUE == Epilogue::add, Identity, Relu>;
#pragma unroll
      for (int k = 0; k < COUNT; ++k) {
        A z[N];
        argument(k, vecs[0][k], z);
        const uint32_t bits = activate<Act>(p, chunk, k, z);
        store(k, z, bits);
      }
    }
  }

 private:
  static constexpr bool kMasks = masks(EPILOGUE) && N == 8;

  __device__ __forceinline__ static bool adds(const BatchNormForwardParams& p) {
    constexpr bool depends = EPILOGUE == Epilogue::general || EPILOGUE == Epilogue::run_time;
    return depends ? p.residual != nullptr : EPILOGUE == Epilogue::add || EPILOGUE == Epilogue::add_relu;
  }

  // From z to the activation's value. Returns the bits that say where its derivative is 1.
  template <class Act, int COUNT, bool WHOLE>
  __device__ __forceinline__ static uint32_t activate(const BatchNormForwardParams& p, const Chunk<COUNT, WHOLE>& chunk,
                                                      int k, A (&z)[N]) {
    const A param = static_cast<A>(p.activation_param);
    uint32_t bits = 0;
#pragma unroll
    for (int e = 0; e < N; ++e) {
      if constexpr (kMasks && Act::saves == Saves::mask) {
        bits |= static_cast<uint32_t>(chunk.has(k, e) && mask_bit<Act>(z[e]) == A(1)) << e;
      }
      // One instance of the code for both: the selection is uniform.
      const bool passes = EPILOGUE == Epilogue::run_time && p.activation == Activation::none;
      z[e] = passes ? z[e] : Act::value(z[e], param);
    }
    return bits;
  }
};

// ---- see with_op.cuh

template <class F>
cudaError_t with_op(const BatchNormForwardParams& p, F&& f) {
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    switch (epilogue_of(p)) {
      case Epilogue::none: return f(BatchNormForward<T, Epilogue::none>{});
      case Epilogue::relu: return f(BatchNormForward<T, Epilogue::relu>{});
      case Epilogue::add: return f(BatchNormForward<T, Epilogue::add>{});
      case Epilogue::add_relu: return f(BatchNormForward<T, Epilogue::add_relu>{});
      case Epilogue::general: return f(BatchNormForward<T, Epilogue::general>{});
      case Epilogue::run_time: break;  // epilogue_of() knows the rest
    }
    return cudaErrorInvalidValue;
  });
}

// Statistics do not depend on the epilogue.
template <class F>
cudaError_t with_reduction(const BatchNormForwardParams& p, F&& f) {
  return with_element(p.dtype, [&](auto element) { return f(BatchNormForward<decltype(element), Epilogue::none>{}); });
}

template <class T, int N> struct RunTime<BatchNormForwardParams, T, N> {
  using Op = BatchNormForward<T, Epilogue::run_time, N>;
};

}  // namespace bnext::cuda
