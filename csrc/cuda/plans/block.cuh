// What one block does with its work tile, for any operation. The plans' kernels are made of these.
//
// An operation (ops/batch_norm_forward.cuh is the first to read) is a struct of static members:
//   Params, T, N, kInputs, input(p, i)    its parameters; element type and elements of a vector of its input tensors
//   extra_input(p)                        one more, which the elementwise pass alone reads, or null
//   kResident, kRegisterBytes             whether the plan `resident` is compiled for it; what it keeps in registers
//   kReducesMasked                        whether the reduction reads the mask, where there is one
//   kReducesExtras                        whether it reads anything beside its inputs, for which copies of these would
//                                         have to wait: mask or residual
//   State                                 a channel's partial result: empty when zero-initialised, merge(const State&)
//   ChannelParams, channel_params(p, channel)              what is known of a channel before it is reduced
//   Operands, operands(p, channel)        what finishing it takes besides
//   prefetch(p, channel)                  fetches that into the L2 cache
//   Centre, centre(params)                 what reducing takes of that
//   load_reduce_extras(p, chunk), load_apply_extras(p, chunk)   loads what a pass takes of a chunk beside its inputs
//   PlanarReducer(centre)                 a thread's part of a channel: add(p, chunk, vecs, extras), result()
//   ColumnReducer(centres, first)         a thread's N columns: add(p, chunk, vecs, extras); over(begin, end), the
//                                         state of some; and for merge_columns(), store(place, memory), merge(memory,
//                                         e, lane, lanes)
//   kNeedsShiftRow                           whether that takes `first`, a vector of the block's first row
//   kPlanarReduceChunk<ALIGNED>, kColumnReduceChunk, kApplyChunk<COLUMNS>   vectors in flight
//   add_tail(p, channel, state)           adds what the end of the tensor cuts from its last vector
//   finish(p, channel, state, operands)   writes what a channel's reduction gives
//   Summary, summary(p, state)            what the elementwise pass needs of it
//   load_summary(p, channel)              the same, as finish() wrote it
//   load_standalone_summary(p, channel, saves)   the same for an elementwise pass on its own
//   Coefficients, coefficients(p, params, summary)   what it is made with
//   apply(p, chunk, vecs, extras, coefficients_at)   the elementwise pass on a chunk
//   between_passes(p), at_kernel_end(p, scratch)   once in each block: between the passes of two_pass and cooperative,
//                                         and at the end of a resident kernel
#pragma once

#include <algorithm>
#include <type_traits>

#include "../device/channels.cuh"
#include "../device/reduce.cuh"
#include "../device/shared_tile.cuh"

namespace bnext::cuda {

// Shared memory in which a block's threads merge what they hold, and share what belongs to columns, in turn.
template <int64_t BYTES>
__device__ __forceinline__ void* shared_memory() {
  static_assert(BYTES <= 48 * 1024, "static shared memory");
  alignas(16) __shared__ unsigned char bytes[BYTES];
  return bytes;
}
template <class Op>
constexpr int64_t kNumbers = sizeof(typename Op::State) / sizeof(typename Op::A);
template <class Op>
constexpr int64_t kPlanarBytes = planar_merge_bytes(kNumbers<Op>, sizeof(typename Op::A));
template <class Op>
constexpr int64_t kPackedBytes = packed_merge_bytes(kNumbers<Op>, sizeof(typename Op::A));
template <class Op>
constexpr int64_t kColumnBytes = column_merge_bytes(Op::N, kNumbers<Op>, sizeof(typename Op::A));

// Vectors of a chunk of a resident pass, which is the same in the reduction and in the elementwise pass. COPIES: more
// is on the way than the chunk.
template <class Op, bool COLUMNS, bool COPIES>
constexpr int resident_chunk() {
  constexpr int reduced = COLUMNS ? Op::kColumnReduceChunk : Op::template kPlanarReduceChunk<true>;
  return Op::kGeneral || COPIES ? std::min(reduced, Op::template kApplyChunk<COLUMNS>) : reduced;
}

// What the thread reduces of the block's part of one channel.
template <class Op, int CHUNK, class Walk, class Source>
__device__ __forceinline__ typename Op::State reduce_planar(const typename Op::Params& p, Walk walk, Source&& source,
                                                            const typename Op::Centre& centre) {
  typename Op::PlanarReducer reducer(centre);
  for_each_chunk<CHUNK>(walk, [&](const auto& chunk) {
    const auto extras = Op::load_reduce_extras(p, chunk);
    Vec<typename Op::T, Op::N> vecs[Op::kInputs][chunk.count];
    source.load(chunk, vecs);
    reducer.add(p, chunk, vecs, extras);
  });
  return reducer.result();
}

// How a channel is finished: see merge_blocks().
template <class Op>
struct FinishChannel {
  const typename Op::Params& p;

  __device__ __forceinline__ typename Op::Operands operands(int64_t channel) const { return Op::operands(p, channel); }
  __device__ __forceinline__ void operator()(int64_t channel, const typename Op::State& whole,
                                             const typename Op::Operands& operands) const {
    Op::finish(p, channel, whole, operands);
  }
};

// Where the threads of a block find the coefficients of their columns.
template <class Op>
using CoefficientCache = ColumnCache<Op::N, typename Op::Coefficients>;

// What the tile's channels will be finished with, while their columns are on the way.
template <class Op>
__device__ __forceinline__ void prefetch_operands(const typename Op::Params& p, const Partition& partition,
                                                  const WorkTile& work) {
  const int64_t width = partition.tile_width(), col = work.tile * width + threadIdx.x;
  if (threadIdx.x >= width || col >= partition.columns.cols) return;
  Op::prefetch(p, ColumnChannel(partition, p.shape, col).channel);
}

// The centres of a thread's columns; through `memory`, see ColumnCache.
template <class Op>
__device__ __forceinline__ void load_centres(typename Op::Centre (&centres)[Op::N], const typename Op::Params& p,
                                             const Partition& partition, const WorkTile& work,
                                             const ColumnPlace<Op::N>& place, void* memory) {
  static_assert(CoefficientCache<Op>::kBytes <= kColumnBytes<Op>);
  if constexpr (!std::is_empty_v<typename Op::Centre>) {
    const ColumnCache<Op::N, typename Op::Centre> cache(memory, partition);
    __syncthreads();  // all have what was shared before
    cache.fill(partition, p.shape, work,
               [&](const ColumnChannel& at) { return Op::centre(Op::channel_params(p, at.channel)); });
    if (place.active) cache.load(centres, place);
  }
}

// The vector of the thread's columns in the block's first row, for operations that take it, unless that row is not
// whole: then it is the tensor's last.
template <class Op>
__device__ __forceinline__ Vec<typename Op::T, Op::N> load_shift_row(const typename Op::Params& p,
                                                                     const Partition& partition, const WorkTile& work,
                                                                     const ColumnPlace<Op::N>& place) {
  using T = typename Op::T;
  const int64_t begin = work.split * partition.steps_per_split * partition.columns.cols + place.col;
  if (!Op::kNeedsShiftRow || !place.active || begin + Op::N > p.shape.numel()) return {};
  return load_vec<Reuse::last, T, Op::N>(static_cast<const T*>(Op::input(p, 0)) + begin, true);
}

// What the thread reduces of the block's part of a tile of columns; nothing where it has no column.
template <class Op, int CHUNK, class Walk, class Source>
__device__ __forceinline__ typename Op::ColumnReducer reduce_columns(const typename Op::Params& p, Walk walk,
                                                                     Source&& source,
                                                                     const typename Op::Centre (&centres)[Op::N],
                                                                     const Vec<typename Op::T, Op::N>& first) {
  typename Op::ColumnReducer reducer(centres, first);
  for_each_chunk<CHUNK>(walk, [&](const auto& chunk) {
    const auto extras = Op::load_reduce_extras(p, chunk);
    Vec<typename Op::T, Op::N> vecs[Op::kInputs][chunk.count];
    source.load(chunk, vecs);
    reducer.add(p, chunk, vecs, extras);
  });
  return reducer;
}

// Merges what the threads of a block have reduced of a tile of columns: see merge_rows().
template <class Op, class Each>
__device__ __forceinline__ void merge_columns(const typename Op::ColumnReducer& reducer,
                                              const ColumnPlace<Op::N>& place, int lanes, void* memory,
                                              const Each& each) {
  merge_rows<Op::N>(
      lanes, [&] { reducer.store(place, memory); },
      [&](int e, int lane) { return Op::ColumnReducer::merge(memory, e, lane, lanes); }, each);
}

// The elementwise pass over the chunks of a walk; at(e) is the coefficients of element e of a vector.
template <class Op, class Source, class CoefficientsAt>
struct Elementwise {
  const typename Op::Params& p;
  Source source;
  CoefficientsAt at;

  template <int COUNT, bool WHOLE>
  __device__ __forceinline__ void operator()(const Chunk<COUNT, WHOLE>& chunk) {
    const auto extras = Op::load_apply_extras(p, chunk);
    Vec<typename Op::T, Op::N> vecs[Op::kInputs][COUNT];
    source.load(chunk, vecs);
    Op::apply(p, chunk, vecs, extras, at);
  }
};

template <class Op, class Source, class CoefficientsAt>
__device__ __forceinline__ Elementwise<Op, std::decay_t<Source>, CoefficientsAt> elementwise(
    const typename Op::Params& p, Source&& source, const CoefficientsAt& at) {
  return {p, source, at};
}

// Of the block's part of one channel.
template <class Op, int CHUNK, class Walk, class Source>
__device__ __forceinline__ void apply_planar(const typename Op::Params& p, Walk walk, Source&& source,
                                             const typename Op::Coefficients& coefficients) {
  for_each_chunk<CHUNK>(walk, elementwise<Op>(p, source, [&](int) { return coefficients; }));
}

// Of the block's part of a tile of columns.
template <class Op, class Source>
__device__ __forceinline__ auto elementwise_columns(const typename Op::Params& p, Source&& source,
                                                    const typename Op::Coefficients (&coefficients)[Op::N]) {
  return elementwise<Op>(p, source, [&](int e) { return coefficients[e]; });
}

}  // namespace bnext::cuda
