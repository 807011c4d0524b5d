// How partitions are made: work tiles of planes or of columns, the threads of a block, and the blocks that share a
// tile.
#pragma once

#include "partition.h"

namespace bnext::cuda {

// Vectors that a thread of a reduction should have before a block gets more threads, or a tile more blocks.
constexpr int64_t kVecsPerThread = 4;

// Threads for so much work: powers of two, up to kMaxThreads.
int32_t threads_for(int64_t work);

// Splits that fill whole waves of `slots` resident blocks: the fewest waves that leave at most a
// tenth of the slots idle, else the best of four.
int64_t splits_for(int64_t tiles, int64_t slots, int64_t max_splits);

// So many blocks to a tile or fewer, each with whole strides.
void set_splits(Partition&, int64_t splits, int64_t stride);

// A channel to a tile, in planes of whole vectors or in vectors that cover them.
Partition planar(const Shape&, int32_t vec);
void set_planar_threads(Partition&, int32_t threads);

// Tiles of `tile_vecs` vectors of a matrix' row. `period` is the number of elements after which channels recur: c, or
// c * s for planes. `merges`: the threads of a block will merge what they have.
Partition columns(const Shape&, int32_t vec, int64_t period, int64_t channel_stride, int64_t tile_vecs, bool merges);
void set_tile_vecs(Partition&, int64_t tile_vecs, bool merges);
// Rows that a block of `columns.row_threads` to a row takes in one stride, of `steps` that it has.
void set_thread_rows(Partition&, int64_t steps);

// Planes that are not whole vectors, side by side; without tiles where the channels do not come out even, or a row has
// more vectors than a block has room for, and no parts to go through it in.
Partition packed_planes(const Shape&, int32_t vec);

}  // namespace bnext::cuda
