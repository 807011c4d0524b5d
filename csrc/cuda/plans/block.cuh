// What one block does with its work tile, for any operation. The plans' kernels are made of these.
//
// An operation (ops/batch_norm_forward.cuh is the first to read) is a struct of static members:
//   Params, T, N, kInputs, input(p, i)    its parameters; element type and elements of a vector of its input tensors
//   kResident                             whether the plan `resident` is compiled for it
//   State                                 a channel's partial result: empty when zero-initialised, merge(const State&)
//   Known, known(p, channel)              what is known of a channel before it is reduced
//   prefetch(p, channel)                  fetches what is read of it afterwards, besides, into the L2 cache
//   Centre, centre(known)                 what reducing takes of that
//   PlanarReducer(centre)                 a thread's part of a channel: add(p, chunk, vecs), result()
//   ColumnReducer(centres, first)         a thread's N columns: add(p, chunk, vecs); over(begin, end), the state of
//                                         some; and for merge_columns(), store(place, memory), merge(memory, e, lane,
//                                         lanes)
//   kTakesFirst                           whether that takes `first`, a vector of the block's first row
//   kPlanarReduceChunk<ALIGNED>, kColumnReduceChunk, kApplyChunk<COLUMNS>   vectors in flight
//   add_tail(p, channel, state)           adds what the end of the tensor cuts from its last vector
//   finish(p, channel, state)             writes what a channel's reduction gives
//   Summary, summary(p, state)            what the elementwise pass needs of it
//   load_summary(p, channel)              the same, as finish() wrote it
//   load_summary_of_pass(p, channel, saves)   the same for an elementwise pass on its own
//   Coefficients, coefficients(p, known, summary)   what it is made with
//   apply(p, chunk, vecs, coefficients_at)   the elementwise pass on a chunk
//   after_reduction(p), end(p, scratch, counter)   once in each block: between the passes of two_pass and cooperative,
//                                         and at the end of a resident kernel
#pragma once

#include <type_traits>

#include "../device/channels.cuh"
#include "../device/reduce.cuh"

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

// What the thread reduces of the block's part of one channel.
template <class Op, bool ALIGNED, class Source>
__device__ __forceinline__ typename Op::State reduce_planar(const typename Op::Params& p, const Partition& partition,
                                                            const WorkTile& work, Source&& source,
                                                            const typename Op::Centre& centre) {
  typename Op::PlanarReducer reducer(centre);
  iterate_planar<Op::N, ALIGNED, Op::template kPlanarReduceChunk<ALIGNED>>(
      partition, p.shape, work, [&](const auto& chunk) {
        Vec<typename Op::T, Op::N> vecs[Op::kInputs][chunk.count];
        source.load(chunk, vecs);
        reducer.add(p, chunk, vecs);
      });
  return reducer.result();
}

// What the tile's channels will be finished with, while their columns are on the way.
template <class Op>
__device__ __forceinline__ void prefetch_operands(const typename Op::Params& p, const Partition& partition,
                                                  const WorkTile& work) {
  const int64_t width = partition.tile_width(), col = work.tile * width + threadIdx.x;
  if (threadIdx.x >= width || col >= partition.columns.cols) return;
  Op::prefetch(p, ColumnChannel(partition, p.shape, col).channel);
}

// The centres of a thread's columns; through `memory`, see ColumnShare.
template <class Op>
__device__ __forceinline__ void share_centres(typename Op::Centre (&centres)[Op::N], const typename Op::Params& p,
                                              const Partition& partition, const WorkTile& work,
                                              const ColumnPlace<Op::N>& place, void* memory) {
  static_assert(ColumnShare<Op::N, typename Op::Coefficients>::kBytes <= kColumnBytes<Op>);
  if constexpr (!std::is_empty_v<typename Op::Centre>) {
    const ColumnShare<Op::N, typename Op::Centre> share(memory, partition);
    __syncthreads();  // all have what was shared before
    share.fill(partition, p.shape, work, [&](const ColumnChannel& at) { return Op::centre(Op::known(p, at.channel)); });
    if (place.active) share.get(centres, place);
  }
}

// What the thread reduces of the block's part of a tile of columns; nothing where it has no column.
template <class Op, class Source>
__device__ __forceinline__ typename Op::ColumnReducer reduce_columns(const typename Op::Params& p,
                                                                     const Partition& partition, const WorkTile& work,
                                                                     const ColumnPlace<Op::N>& place,
                                                                     const typename Op::Centre (&centres)[Op::N],
                                                                     Source&& source) {
  using T = typename Op::T;
  // Of the block's first row, unless it is not whole: then it is the tensor's last.
  Vec<T, Op::N> first = {};
  const int64_t begin = work.split * partition.steps_per_split * partition.columns.cols + place.col;
  if (Op::kTakesFirst && place.active && begin + Op::N <= p.shape.numel()) {
    first = load_vec<Reuse::last, T, Op::N>(static_cast<const T*>(Op::input(p, 0)) + begin, true);
  }
  typename Op::ColumnReducer reducer(centres, first);
  iterate_columns<Op::N, Op::kColumnReduceChunk, false>(partition, p.shape.numel(), work, place,
                                                        [&](const auto& chunk) {
                                                          Vec<T, Op::N> vecs[Op::kInputs][chunk.count];
                                                          source.load(chunk, vecs);
                                                          reducer.add(p, chunk, vecs);
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

// The elementwise pass over the block's part of one channel.
template <class Op, class Source>
__device__ __forceinline__ void apply_planar(const typename Op::Params& p, const Partition& partition,
                                             const WorkTile& work, Source&& source,
                                             const typename Op::Coefficients& coefficients) {
  iterate_planar<Op::N, true, Op::template kApplyChunk<false>>(partition, p.shape, work, [&](const auto& chunk) {
    Vec<typename Op::T, Op::N> vecs[Op::kInputs][chunk.count];
    source.load(chunk, vecs);
    Op::apply(p, chunk, vecs, [&](int) { return coefficients; });
  });
}

// The elementwise pass over the block's part of a tile of columns. PARTIAL: the last row may end within a vector.
template <class Op, bool PARTIAL, class Source>
__device__ __forceinline__ void apply_columns(const typename Op::Params& p, const Partition& partition,
                                              const WorkTile& work, const ColumnPlace<Op::N>& place, Source&& source,
                                              const typename Op::Coefficients (&coefficients)[Op::N]) {
  iterate_columns<Op::N, Op::template kApplyChunk<true>, PARTIAL>(
      partition, p.shape.numel(), work, place, [&](const auto& chunk) {
        Vec<typename Op::T, Op::N> vecs[Op::kInputs][chunk.count];
        source.load(chunk, vecs);
        Op::apply(p, chunk, vecs, [&](int e) { return coefficients[e]; });
      });
}

}  // namespace bnext::cuda
