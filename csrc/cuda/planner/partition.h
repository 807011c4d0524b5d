// How the blocks of one pass share out a tensor, and what kernels and plans have to agree on. Nothing here touches
// CUDA.
#pragma once

#include "../../core/params.h"

namespace bnext::cuda {

// What launch bounds and plans have to agree on: threads of a block, and how many such blocks the
// registers of a multiprocessor must hold. 3 allow 80 registers a thread, 2 allow 128: for threads that
// keep the state of several columns or the masked ends of planes.
constexpr int32_t kMaxThreads = 256;
constexpr int32_t blocks_per_sm(bool columns, bool aligned) { return !columns && aligned ? 3 : 2; }

// The resident kernels hold the registers of both passes; `general`, of the code of all activations besides; and
// `columns`, the coefficients of a vector of them.
constexpr int32_t resident_blocks_per_sm(int64_t element_bytes, bool general, bool columns) {
  return element_bytes == 8 || (general && (columns || element_bytes == 4)) ? 1 : 2;
}

// Which of its kernels an operation has no resident ones of: exp of a float64 takes so much code that the general
// kernels of that type would be a fifth of the build.
constexpr bool has_resident_kernels(int64_t element_bytes, bool general) { return !(general && element_bytes == 8); }

// Bytes of its inputs that a thread of an interleaved pass keeps in registers, where the shared memory of lone blocks
// has not room for all: as many as no kernel spills. 0 where there is no such kernel.
constexpr int32_t register_bytes(DType dtype, bool general, bool reduces_masked) {
  if (general || size_of(dtype) == 8) return 0;
  return dtype == DType::f16 && reduces_masked ? 384 : 512;
}

// Elements of a vector: 16 bytes, or 8 elements where a byte of the mask goes with them.
constexpr int32_t vec_elements(int64_t element_bytes, bool masked) {
  return masked ? 8 : 16 / static_cast<int32_t>(element_bytes);
}

// Numbers of the accumulation type that an operation has of a channel: its State, which blocks exchange; its Summary,
// which is what follows from all of these; and its Coefficients, which the elementwise pass takes. The structs in ops/
// are held to it.
struct NumbersPerChannel { int32_t state, summary, coefficients; };
constexpr NumbersPerChannel kForwardNumbers = {4, 2, 3};
constexpr NumbersPerChannel kBackwardNumbers = {2, 2, 7};

// Threads of a warp.
constexpr int32_t kWarp = 32;

// Vectors of a tile of columns, at most. Wider rows than these 256 bytes, or 512 of float64 with a mask, gain nothing.
constexpr int32_t kMaxTileVecs = 16;

// Shared memory in which the threads of a block merge their states, of so many numbers of `acc_bytes`: see
// device/reduce.cuh. In planar layouts each thread has one state, in packed planes two (plans/resident_packed.cu). In
// columns it has two numbers (offset and var, or both sums) for each of its `width` columns; statistics also take a
// count for each thread, and a shift for each column of the tile.
constexpr int64_t planar_merge_bytes(int64_t numbers, int64_t acc_bytes) { return numbers * acc_bytes * kMaxThreads; }
constexpr int64_t packed_merge_bytes(int64_t numbers, int64_t acc_bytes) {
  return 2 * numbers * acc_bytes * kMaxThreads;
}
constexpr int64_t column_merge_bytes(int64_t width, int64_t numbers, int64_t acc_bytes) {
  return acc_bytes * (2 * width * kMaxThreads + (numbers > 2 ? kMaxThreads + width * kMaxTileVecs : 0));
}

// States of so many bytes that a thread merges at a time: their loads are all in flight before the first is needed.
// Those of columns are as many for each channel as there are blocks to a tile, those of one channel rarely more than 8.
constexpr int merge_batch(int64_t state_bytes, bool columns) {
  return state_bytes > 16 ? 4 : state_bytes > 8 || !columns ? 8 : 16;
}

// Blocks of a cluster, at most: what every GPU that has clusters grants without asking, and what some grant
// on request, to as many clusters as their layout has room for.
constexpr int32_t kMaxCluster = 8;
constexpr int32_t kLargeCluster = 16;

// What a block keeps of its slice of a tile, if not all of it, is a multiple of this many strides, so that the chunks
// of every kernel of so many inputs are kept whole.
constexpr int32_t resident_strides(int64_t inputs) { return inputs > 1 ? 2 : 8; }

constexpr int64_t kMaxCount = INT32_MAX - 2 * kMaxThreads;

// How the blocks of one pass share out a tensor. A *vector* is what a thread moves at once: 16 bytes,
// or 8 elements where a byte of sign mask goes with them.
//
// planar:  a block takes one channel (its tile) and a range of that channel's vectors, plane after
//          plane. Where planes are not whole vectors, `aligned` is false: the vectors are those that
//          cover a plane, and elements of the neighbouring channels are masked out.
// columns: the tensor as a matrix of `rows` x `cols`, with as many matrix rows to an image (or as many
//          pixels to a matrix row) as it takes to make cols a whole number of vectors. A thread keeps
//          to one vector of columns, so that it meets `vec` channels, always the same. A block takes
//          `tile_vecs` adjacent vectors (its tile) and a range of rows. Column k belongs to channel
//          (k / channel_stride) % c. The last matrix row may be short, by `numel`.
//          A resident pass takes planes that are not whole vectors so, with an image to a row: a tile is then as many
//          channels as make whole vectors, `tile_channels`, in `packs` of `tile_vecs` vectors that come one after the
//          other.
//
// Block b has tile b % tiles and split b / tiles: blocks that run together read adjacent memory. Where the
// splits of a tile are a cluster, they are adjacent: tile b / splits and split b % splits.
// In other resident passes, groups of `splits` blocks take the tiles in turn: block b is of group
// b / splits, whose tiles are that one, and every `groups`-th from there.
struct Partition {
  bool by_columns;  // and `columns` says how; otherwise `planar`
  int32_t vec;
  int64_t vecs;  // of the tensor
  int32_t threads;
  int64_t tiles;
  int64_t groups;           // tiles that there are blocks for; all of them, except in an interleaved resident pass
  int64_t splits;           // blocks that share a tile
  int32_t merge_section;    // splits whose partial results are merged before those of the tile are: merge_blocks()
  int64_t steps;            // planar: vectors of a channel; columns: rows
  int64_t steps_per_split;  // a multiple of what a block takes in one stride
  int64_t shared_bytes;     // that the threads of a block merge their states in, or share coefficients of columns
  int64_t resident_bytes;   // dynamic shared memory: what a resident pass keeps of a block's slice of a tile;
  int32_t register_vecs;    // vectors of each input that a thread keeps in registers, if any;
  int64_t reread_bytes;     // the rest of that slice, which is read again;
  int64_t exchange_bytes;   // shared memory behind the first: what blocks of a cluster read of each other's columns
  int64_t l2_steps;         // of a split, its last: what the L2 cache should keep, as it will be read again
  uint32_t first_wave;      // clusters that begin together, where there are more,
  uint32_t stagger_cycles;  // and how much later their second half does: stagger_start()
  int32_t prefetch_vecs;    // of a pack that a thread fetches into L2 while clusters exchange: prefetch_next()
  bool clustered;           // the blocks of a tile are a cluster, and exchange through its shared memory
  bool pdl;                 // the launch may begin while the kernel before, of the same plan, is running
  bool starts_next;         // the next launch does so: only the caller of both knows that

  // Columns of a matrix row that belong to one channel, in a reduction; 1 where a tile is one channel.
  int32_t repeat;

  struct Planar {
    bool aligned;
    int64_t plane_vecs;
    int32_t stride_planes;  // one stride of a block, `threads` vectors, as whole planes
    int32_t stride_vecs;    // and the vectors left over
  } planar;

  struct Columns {
    int64_t cols;
    int64_t channel_stride;
    int32_t tile_vecs;
    int32_t row_threads;  // threads to a row: tile_vecs or, where they are to merge what they have, a power of two
    int32_t thread_rows;  // rows a block takes in one stride: threads / lanes
    int32_t packs;
    int32_t tile_channels;  // 0 where that is not how tiles are made
  } columns;

  constexpr int64_t blocks() const { return groups * splits; }
  // Sections of a tile's splits; where none are merged before, each split is one.
  constexpr int32_t merge_sections() const {
    return static_cast<int32_t>((splits + merge_section - 1) / merge_section);
  }
  // Blocks of a cluster of the launch, and whether all of its blocks have to be there together.
  constexpr uint32_t cluster() const { return clustered ? static_cast<uint32_t>(splits) : 1; }
  constexpr bool cooperative() const { return resident_bytes > 0 && splits > 1 && !clustered; }
  constexpr bool packed() const { return columns.tile_channels > 0; }
  constexpr bool interleaved() const { return by_columns && !packed(); }
  // Kernels count blocks, the vectors of a plane and the steps of a split in 32 bits, and so they do all vectors. A
  // tensor beyond that has 2^31 channels, a plane of 2^31 vectors (32 GiB), or 2^32 vectors (64 GiB).
  constexpr bool fits() const {
    return blocks() < kMaxCount && planar.plane_vecs < kMaxCount && steps_per_split < kMaxCount && vecs <= UINT32_MAX;
  }
  // Columns of a tile: so many partial results a block of a reduction has.
  constexpr int64_t tile_width() const { return by_columns ? int64_t{columns.tile_vecs} * vec : 1; }
};

// Memory of the device in which the blocks of a launch exchange partial results, 16-byte aligned.
struct Scratch {
  void* partials;      // plan.partial_bytes, need not be initialised
  uint32_t* counters;  // plan.counters, all 0 before the call; 0 again once the call has run
  void* flagged;       // plan.flagged_bytes, all 0 before the first call; for such calls alone, one at a time
};

// What flagged memory begins with, before the Flagged numbers of device/flagged.cuh: so many tiles each group has gone
// through, in all launches so far.
constexpr int64_t kMaxGroups = 256;
struct alignas(16) FlaggedHeader { uint64_t tiles[kMaxGroups]; };

// The flagged memory of a resident pass in groups: for each column of a group's tile the state of each block, and then
// the summary of all.
constexpr int64_t flagged_bytes(const Partition& partition, int64_t state_bytes, int64_t summary_bytes) {
  return static_cast<int64_t>(sizeof(FlaggedHeader)) +
         2 * partition.groups * partition.tile_width() * (partition.splits * state_bytes + summary_bytes);
}

}  // namespace bnext::cuda
