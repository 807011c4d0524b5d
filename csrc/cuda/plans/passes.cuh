// The two passes of the plans `two_pass` and `cooperative`, for the block that takes a work tile: both read global
// memory.
#pragma once

#include "block.cuh"

namespace bnext::cuda {

// Blocks of one pass that a multiprocessor's registers must hold; the code of all activations takes more of them.
template <class Op>
constexpr int pass_blocks_per_sm(bool columns, bool aligned) {
  const int blocks = blocks_per_sm(columns, aligned), general = sizeof(typename Op::T) == 8 ? 1 : 2;
  return Op::kGeneral && general < blocks ? general : blocks;
}

// Of planar layouts. What it reads may stay in the L2 cache for the second pass.
template <class Op, bool ALIGNED>
__device__ __forceinline__ void planar_reduce_pass(const typename Op::Params& p, const Partition& partition,
                                                   const Scratch& scratch, const WorkTile& work) {
  using State = typename Op::State;
  State state[1] = {reduce_planar<Op, ALIGNED>(p, partition, work, from_global<Op, Reuse::again>(p))};
  merge_blocks(state, 1, p.shape.c, partition, scratch, work,
               [&](int64_t channel, const State& whole) { Op::finish(p, channel, whole); });
}

// Of interleaved layouts. The end of the tensor may cut its last vector short, which the block that finishes a channel
// adds by itself: a test in the hot loop would cost every vector.
template <class Op>
__device__ __forceinline__ void column_reduce_pass(const typename Op::Params& p, const Partition& partition,
                                                   const Scratch& scratch, const WorkTile& work) {
  using State = typename Op::State;
  const ColumnPlace<Op::N> place(partition, work);
  State state[Op::N];
  reduce_columns<Op>(state, p, partition, work, place, Channels<Op::N>(partition, p.shape, place.col),
                     from_global<Op, Reuse::again>(p));
  merge_blocks(state, partition.columns.lanes, p.shape.c, partition, scratch, work, [&](int64_t channel, State whole) {
    Op::add_tail(p, channel, whole);
    Op::finish(p, channel, whole);
  });
}

// Only a pass on its own may find running statistics instead of the batch's.
template <class Op, bool OF_PASS, int WIDTH>
__device__ __forceinline__ void load_coefficients(typename Op::Coefficients (&coefficients)[WIDTH],
                                                  const typename Op::Params& p, const Channels<WIDTH>& channels,
                                                  bool save) {
  if constexpr (OF_PASS) Op::load_coefficients_of_pass(coefficients, p, channels, save);
  else Op::load_coefficients(coefficients, p, channels);
}

// OF_PASS: the launch does nothing else, and may be the only one.
template <class Op, bool OF_PASS>
__device__ __forceinline__ void planar_apply_pass(const typename Op::Params& p, const Partition& partition,
                                                  const WorkTile& work) {
  typename Op::Coefficients coefficients[1];
  load_coefficients<Op, OF_PASS>(coefficients, p, Channels<1>(work.tile), work.split == 0 && threadIdx.x == 0);
  apply_planar<Op>(p, partition, work, from_global<Op, Reuse::last>(p), coefficients[0]);
}

// Threads without a column leave: there is no barrier behind.
template <class Op, bool OF_PASS>
__device__ __forceinline__ void column_apply_pass(const typename Op::Params& p, const Partition& partition,
                                                  const WorkTile& work) {
  const ColumnPlace<Op::N> place(partition, work);
  if (!place.active) return;
  typename Op::Coefficients coefficients[Op::N];
  load_coefficients<Op, OF_PASS>(coefficients, p, Channels<Op::N>(partition, p.shape, place.col),
                                 work.split == 0 && place.row == 0);
  apply_columns<Op, true>(p, partition, work, place, from_global<Op, Reuse::last>(p), coefficients);
}

}  // namespace bnext::cuda
