// What one block does with its work tile, for any operation. The plans' kernels are made of these.
//
// An operation (ops/batch_norm_forward.cuh is the first to read) is a struct of static members:
//   Params, T, N, kInputs, input(p, i)    its parameters; element type and elements of a vector of its input tensors
//   kResident                             whether the plan `resident` is compiled for it
//   State                                 a channel's partial result: empty when zero-initialised, merge(const State&)
//   PlanarReducer(p, channel)             a thread's part of a channel: add(p, chunk, vecs), result()
//   ColumnReducer(p, channels, active)    a thread's N columns: add(p, chunk, vecs), result(state)
//   kPlanarReduceChunk<ALIGNED>, kColumnReduceChunk, kApplyChunk<COLUMNS>   vectors in flight
//   add_tail(p, channel, state)           adds what the end of the tensor cuts from its last vector
//   finish(p, channel, state)             writes what a channel's reduction gives
//   Summary, summary(p, state)            what the elementwise pass needs of it
//   Coefficients, coefficients(out, p, channels, summaries), load_coefficients(out, p, channels)   for some channels,
//                                         from their summaries or from what finish() wrote
//   load_coefficients_of_pass(out, p, channels, save)   the same for an elementwise pass on its own
//   apply(p, chunk, vecs, coefficients_at)   the elementwise pass on a chunk
//   after_reduction(p), end(p, scratch, counter)   once in each block: between the passes of two_pass and cooperative,
//   and
//                                         at the end of a resident kernel
#pragma once

#include "../device/channels.cuh"
#include "../device/reduce.cuh"

namespace bnext::cuda {

// What the thread reduces of the block's part of one channel.
template <class Op, bool ALIGNED, class Source>
__device__ __forceinline__ typename Op::State reduce_planar(const typename Op::Params& p, const Partition& partition,
                                                            const WorkTile& work, Source&& source) {
  typename Op::PlanarReducer reducer(p, work.tile);
  iterate_planar<Op::N, ALIGNED, Op::template kPlanarReduceChunk<ALIGNED>>(
      partition, p.shape, work, [&](const auto& chunk) {
        Vec<typename Op::T, Op::N> vecs[Op::kInputs][chunk.count];
        source.load(chunk, vecs);
        reducer.add(p, chunk, vecs);
      });
  return reducer.result();
}

// What the thread reduces of the block's part of a tile of columns; nothing where it has no column.
template <class Op, class Source>
__device__ __forceinline__ void reduce_columns(typename Op::State (&state)[Op::N], const typename Op::Params& p,
                                               const Partition& partition, const WorkTile& work,
                                               const ColumnPlace<Op::N>& place, const Channels<Op::N>& channels,
                                               Source&& source) {
  typename Op::ColumnReducer reducer(p, channels, place.active);
  iterate_columns<Op::N, Op::kColumnReduceChunk, false>(partition, p.shape.numel(), work, place,
                                                        [&](const auto& chunk) {
                                                          Vec<typename Op::T, Op::N> vecs[Op::kInputs][chunk.count];
                                                          source.load(chunk, vecs);
                                                          reducer.add(p, chunk, vecs);
                                                        });
  reducer.result(state);
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
