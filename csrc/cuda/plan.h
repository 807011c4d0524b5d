// Which kernels a shape gets, with what grids: a pure function of the problem and the device, so
// that a table test on any machine can check it. Nothing here touches CUDA.
#pragma once

#include "../core/params.h"

namespace bnext::cuda {

struct DeviceProperties {
  int32_t compute_capability;  // 10 * major + minor
  int32_t multiprocessors;
  int32_t threads_per_multiprocessor;
  int64_t shared_per_multiprocessor;  // bytes
  int64_t shared_per_block;           // with opt-in
};

// What launch bounds and plans have to agree on: threads of a block, and how many such blocks the
// registers of a multiprocessor must hold. 3 allow 80 registers a thread, 2 allow 128: for threads that
// keep the state of several columns or the masked ends of planes.
constexpr int32_t kMaxThreads = 256;
constexpr int32_t blocks_per_sm(bool columns, bool aligned) { return !columns && aligned ? 3 : 2; }

// The small and the resident kernels hold the registers of both passes.
template <class T> constexpr int32_t kWholeBlocksPerSM = sizeof(T) == 8 ? 1 : 2;

// Blocks of a cluster, at most: what every GPU that has clusters grants without asking.
constexpr int32_t kMaxCluster = 8;

constexpr int64_t kMaxCount = INT32_MAX - 2 * kMaxThreads;

// How the blocks of one pass share out a tensor. A *unit* is what a thread moves at once: 16 bytes,
// or 8 elements where a byte of sign mask goes with them, or 1 element in the plan `small`.
//
// planar:  a block takes one channel (its tile) and a range of that channel's units, plane after
//          plane. Where planes are not whole units, `aligned` is false: the units are those that
//          cover a plane, and elements of the neighbouring channels are masked out.
// columns: the tensor as a matrix of `rows` x `cols`, with as many matrix rows to an image (or as many
//          pixels to a matrix row) as it takes to make cols a whole number of units. A thread keeps
//          to one unit of columns, so that it meets UNIT channels, always the same. A block takes
//          `lanes` adjacent units (its tile) and a range of rows. Column k belongs to channel
//          (k / channel_stride) % c. The last matrix row may be short, by `numel`.
//
// Block b has tile b % tiles and split b / tiles: blocks that run together read adjacent memory. In a
// resident planar pass the splits of a tile are a cluster, hence adjacent: tile b / splits and split b % splits.
struct Pass {
  bool columns;
  bool aligned;
  int32_t unit;
  int32_t threads;
  int64_t tiles;
  int64_t splits;           // blocks that share a tile
  int64_t steps;            // planar: units of a channel; columns: rows
  int64_t steps_per_split;  // a multiple of what a block takes in one stride
  int64_t shared_bytes;     // that the merge of a block's threads takes; 0 in an elementwise pass
  int64_t kept_bytes;       // dynamic shared memory: the share of a block in a resident pass

  // planar
  int64_t plane_units;
  int32_t stride_planes;  // one stride of a block, `threads` units, as whole planes
  int32_t stride_units;   // and the units left over

  // columns
  int64_t cols;
  int64_t channel_stride;
  int32_t lanes;
  int32_t lane_rows;  // rows a block takes in one stride: threads / lanes
  int32_t repeat;     // columns of a matrix row that belong to one channel, in a reduction

  constexpr int64_t blocks() const { return tiles * splits; }
  // Kernels count blocks, the units of a plane and the steps of a split in 32 bits, offsets in 64. A
  // tensor beyond that has 2^31 channels, or a plane of 2^31 units (32 GiB).
  constexpr bool fits() const { return blocks() < kMaxCount && plane_units < kMaxCount && steps_per_split < kMaxCount; }
  // Columns of a tile: so many partial results a block of a reduction has.
  constexpr int64_t tile_width() const { return columns ? int64_t{lanes} * unit : 1; }
};

enum class PlanKind : int32_t {
  resident,  // one launch: blocks keep their shares in shared memory between the two passes
  small,     // one launch, for few rows of an odd number of channels: a block owns whole channels, and reads
             // them a second time from the caches
  two_pass,  // two launches: a split reduction with a fixed-order merge, then an elementwise pass
};

struct Plan {
  PlanKind kind;          // of the whole; the stages on their own always use the passes of two_pass
  Pass whole;             // of the kinds with one launch; small has splits and repeat 1
  Pass reduce;            // stats, backward_reduce
  Pass apply;             // normalize, backward_input, and eval mode
  int64_t partial_bytes;  // scratch that any of these needs
  int64_t counters;       // 32-bit counters likewise; the last is count_batch's, if the forward needs it
};

enum class PlanChoice : int32_t { automatic, small, two_pass, resident };

// The plans of a forward (with its stages stats and normalize) and of a backward. They look at shape,
// dtype, activation, whether there are a residual (forward) or a mask (backward), and whether the forward
// averages cumulatively and counts. A choice that the shape does not allow falls back to two_pass.
Plan plan_forward(const ForwardParams&, const DeviceProperties&, PlanChoice = PlanChoice::automatic);
Plan plan_backward(const BackwardParams&, const DeviceProperties&, PlanChoice = PlanChoice::automatic);

}  // namespace bnext::cuda
