// Plan `resident` of interleaved layouts: one launch that reads the inputs from memory once, or most of them.
//
// A tile of channels, 64 to 256 bytes wide, belongs to some blocks, each with a range of rows. Where it fits a cluster,
// these exchange their partial results through its shared memory. Else they are a group, all of whose blocks are on the
// device together, and take several tiles in turn; these exchange through memory. 2e bytes an element forward, 3e
// backward; and where the device has not room for a tile, what it does not hold is read again, as far as it can be from
// the L2 cache.
//
// (To load the next tile before that took more time than it saved, of 884 plans that an H100 ran: tiles are then half
// as large, and rows of less than 128 bytes get a part of the memory's bandwidth.)
#include "block.cuh"
#include "cluster.cuh"
#include "group.cuh"
#include "launch_plan.cuh"

namespace bnext::cuda {
namespace {

// Merges what the cluster's blocks hold of a tile, and shares what follows from it; a thread to each channel. Of each
// channel one block writes what its reduction gives.
template <class Op>
__device__ __forceinline__ void finish_in_cluster(const typename Op::Params& p, const Partition& partition,
                                                  const WorkTile& work, const ColumnPlace<Op::N>& place,
                                                  const typename Op::ColumnReducer& mine, void* memory,
                                                  const CoefficientCache<Op>& cache) {
  const int width = static_cast<int>(partition.tile_width()), column = static_cast<int>(threadIdx.x);
  const int64_t channel = work.tile * width + column;
  const bool has = column < width && channel < p.shape.c;
  const bool finishes = has && column % static_cast<int>(partition.splits) == static_cast<int>(work.split);
  // While the other blocks are still to come.
  typename Op::ChannelParams params = {};
  typename Op::Operands operands = {};
  if (has) params = Op::channel_params(p, channel);
  if (finishes) operands = Op::operands(p, channel);
  const ClusterColumns<Op> columns(partition, mine, place, memory);
  typename Op::Coefficients coefficients = {};
  if (has) {
    const auto whole = columns.merge(column);
    coefficients = Op::coefficients(p, params, Op::summary(p, whole));
    if (finishes) Op::finish(p, channel, whole, operands);
  }
  cache.fill(partition, p.shape, work, [&](const ColumnChannel&) { return coefficients; });
}

// Chunks that a thread keeps in registers.
template <class Op, int CHUNK>
constexpr int kRegisterChunks = Op::kRegisterBytes / (CHUNK * Op::kInputs * sizeof(Vec<typename Op::T, Op::N>));

// REGISTERS: of blocks that have a multiprocessor to themselves, with all of its registers.
template <class Op, bool REGISTERS>
__global__ void __launch_bounds__(kMaxThreads, REGISTERS ? 1
                                                         : resident_blocks_per_sm(sizeof(typename Op::T), Op::kGeneral,
                                                                                  /*columns=*/true))
    resident_interleaved_kernel(const BNEXT_GRID_CONSTANT typename Op::Params p,
                                const BNEXT_GRID_CONSTANT Partition partition, const Scratch scratch) {
  constexpr int N = Op::N, kChunk = resident_chunk<Op, true, false>();
  void* const memory = shared_memory<kColumnBytes<Op>>();
  const SharedTile<Op, kChunk, /*PARTIAL=*/true> shared_tile(partition);
  // The blocks of a cluster or group are adjacent. The two on a multiprocessor, which start one after the other, are
  // then mostly of different groups, and do not wait at the same time.
  const uint32_t splits = static_cast<uint32_t>(partition.splits), group = blockIdx.x / splits;
  GroupColumns<Op> columns(partition, scratch, group);
#pragma unroll 1
  for (int64_t tile = group; tile < partition.tiles; tile += partition.groups) {
    const WorkTile work(tile, blockIdx.x - group * splits);
    const ColumnPlace<N> place(partition, work);
    if (work.split == 0) prefetch_operands<Op>(p, partition, work);
    typename Op::Centre centres[N] = {};
    load_centres<Op>(centres, p, partition, work, place, memory);
    const auto first = load_shift_row<Op>(p, partition, work, place);
    ColumnWalk<N> walk(partition, p.shape.numel(), work, place);
    RegisterTile<Op, kChunk, REGISTERS ? kRegisterChunks<Op, kChunk> : 0> registers;
    const ColumnWalk<N> in_registers = walk.take_last(registers.kVecs);
    auto mine = reduce_columns<Op, kChunk>(p, walk, shared_tile.template fill<false>(p, walk), centres, first);
    registers.fill(p, in_registers, [&](const auto& chunk, const auto& vecs) {
      mine.add(p, chunk, vecs, Op::load_reduce_extras(p, chunk));
    });

    const CoefficientCache<Op> cache(memory, partition);
    if (partition.clustered) finish_in_cluster<Op>(p, partition, work, place, mine, memory, cache);
    else columns.merge(p, partition, work, place, mine, memory, cache);
    if (!place.active) continue;
    typename Op::Coefficients coefficients[N];
    cache.load(coefficients, place);
    registers.replay(in_registers, [&](const auto& chunk, const auto& vecs) {
      Op::apply(p, chunk, vecs, Op::load_apply_extras(p, chunk), [&](int e) { return coefficients[e]; });
    });
    for_each_chunk<kChunk>(walk, elementwise_columns<Op>(p, shared_tile.replay(p), coefficients));
  }
  Op::at_kernel_end(p, scratch);
  if (partition.clustered) leave_cluster(partition);
}

}  // namespace

template <class Params>
cudaError_t launch_resident_interleaved(const Params& p, const Partition& partition, const Scratch& scratch,
                                        cudaStream_t stream) {
  return with_resident_op(p, [&](auto op) {
    using Op = decltype(op);
    if constexpr (Op::kRegisterBytes > 0) {
      if (partition.register_vecs > 0) {
        return launch_partition(resident_interleaved_kernel<Op, true>, partition, stream, p, partition, scratch);
      }
    }
    return launch_partition(resident_interleaved_kernel<Op, false>, partition, stream, p, partition, scratch);
  });
}

BNEXT_INSTANTIATE(launch_resident_interleaved, const Partition&, const Scratch&, cudaStream_t)

}  // namespace bnext::cuda
