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
  const typename Op::Centre centre = Op::centre(Op::channel_params(p, work.tile));
  // The block that finishes the channel, whichever that will be, finds what it needs in the L2 cache.
  if (work.split == 0 && threadIdx.x == 0) Op::prefetch(p, work.tile);
  const State mine = reduce_planar<Op, Op::template kPlanarReduceChunk<ALIGNED>>(
      p, PlanarWalk<Op::N, ALIGNED>(partition, p.shape, work), from_global<Op, Reuse::again>(p), centre);
  void* const memory = shared_memory<kPlanarBytes<Op>>();
  merge_blocks<1, State>(
      p.shape.c, partition, scratch, work, memory, [&](const auto& each) { merge_states(mine, 1, memory, each); },
      FinishChannel<Op>{p});
}

// Adds what the end of the tensor cut from its last vector, before it finishes a channel.
template <class Op>
struct FinishChannelWithTail : FinishChannel<Op> {
  __device__ __forceinline__ void operator()(int64_t channel, typename Op::State whole,
                                             const typename Op::Operands& operands) const {
    Op::add_tail(this->p, channel, whole);
    Op::finish(this->p, channel, whole, operands);
  }
};

// Of interleaved layouts. The end of the tensor may cut its last vector short, which the block that finishes a channel
// adds by itself: a test in the hot loop would cost every vector.
template <class Op>
__device__ __forceinline__ void column_reduce_pass(const typename Op::Params& p, const Partition& partition,
                                                   const Scratch& scratch, const WorkTile& work) {
  using State = typename Op::State;
  const ColumnPlace<Op::N> place(partition, work);
  // First the channels' centres, then the threads' states, in the same memory: see shared_memory().
  void* const memory = shared_memory<kColumnBytes<Op>>();
  if (work.split == 0) prefetch_operands<Op>(p, partition, work);
  typename Op::Centre centres[Op::N] = {};
  load_centres<Op>(centres, p, partition, work, place, memory);
  const auto mine = reduce_columns<Op, Op::kColumnReduceChunk>(
      p, ColumnWalk<Op::N>(partition, p.shape.numel(), work, place), from_global<Op, Reuse::again>(p), centres,
      load_shift_row<Op>(p, partition, work, place));
  merge_blocks<Op::N, State>(
      p.shape.c, partition, scratch, work, memory,
      [&](const auto& each) { merge_columns<Op>(mine, place, partition.columns.row_threads, memory, each); },
      FinishChannelWithTail<Op>{p});
}

// Only a pass on its own may find running statistics instead of the batch's.
template <class Op, bool STANDALONE>
__device__ __forceinline__ typename Op::Coefficients load_coefficients(const typename Op::Params& p, int64_t channel,
                                                                       bool saves) {
  const typename Op::ChannelParams params = Op::channel_params(p, channel);
  if constexpr (STANDALONE) return Op::coefficients(p, params, Op::load_standalone_summary(p, channel, saves));
  else return Op::coefficients(p, params, Op::load_summary(p, channel));
}

// STANDALONE: the launch does nothing else, and may be the only one.
template <class Op, bool STANDALONE>
__device__ __forceinline__ void planar_apply_pass(const typename Op::Params& p, const Partition& partition,
                                                  const WorkTile& work) {
  // One thread of one block of each channel writes what evaluation mode saves.
  const bool saves = work.split == 0 && threadIdx.x == 0;
  apply_planar<Op, Op::template kApplyChunk<false>>(p, PlanarWalk<Op::N, true>(partition, p.shape, work),
                                                    from_global<Op, Reuse::last>(p),
                                                    load_coefficients<Op, STANDALONE>(p, work.tile, saves));
}

template <class Op, bool STANDALONE>
__device__ __forceinline__ void column_apply_pass(const typename Op::Params& p, const Partition& partition,
                                                  const WorkTile& work) {
  // A tile's channels are loaded once a block, by as many threads, and not by each thread for its N columns.
  using Cache = CoefficientCache<Op>;
  __shared__ uint4 memory[Cache::kBytes / sizeof(uint4)];
  const ColumnPlace<Op::N> place(partition, work);
  const Cache cache(memory, partition);
  if constexpr (!STANDALONE) __syncthreads();  // of the work tile before
  cache.fill(partition, p.shape, work, [&](const ColumnChannel& at) {
    return load_coefficients<Op, STANDALONE>(p, at.channel, work.split == 0 && at.first);
  });
  if (!place.active) return;
  typename Op::Coefficients coefficients[Op::N];
  cache.load(coefficients, place);
  auto apply = elementwise_columns<Op>(p, from_global<Op, Reuse::last>(p), coefficients);
  ColumnWalk<Op::N> walk(partition, p.shape.numel(), work, place);
  for_each_chunk<Op::template kApplyChunk<true>>(walk, apply);
  walk.cut(partition, p.shape.numel(), place, apply);  // the last row may end within a vector
}

}  // namespace bnext::cuda
