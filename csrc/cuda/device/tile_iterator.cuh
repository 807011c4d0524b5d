// How a block goes through its work tile (see Partition in plan.h): in chunks of several vectors, whose loads are all
// in flight at once.
#pragma once

#include "loaders.cuh"

namespace bnext::cuda {

// Which tile and split a block takes. A pass over data that the previous kernel has just read starts
// at the end, which is still in the L2 cache.
struct WorkTile {
  int64_t tile, split;

  __device__ __forceinline__ WorkTile(int64_t tile, int64_t split) : tile(tile), split(split) {}

  // Blocks have numbers of 32 bits, see Partition::fits(); a division of 64 takes about 100 instructions.
  __device__ __forceinline__ explicit WorkTile(const Partition& partition, uint32_t block) {
    const uint32_t tiles = static_cast<uint32_t>(partition.tiles), number = block / tiles;
    split = number;
    tile = block - number * tiles;
  }

  __device__ __forceinline__ static WorkTile forward(const Partition& partition) {
    return WorkTile(partition, blockIdx.x);
  }
  __device__ __forceinline__ static WorkTile reverse(const Partition& partition) {
    return WorkTile(partition, gridDim.x - 1 - blockIdx.x);
  }
};

// Calls body(WorkTile) on each of a partition's work tiles that are this block's, in a launch of any number of blocks.
template <class Body>
__device__ __forceinline__ void for_work_tiles(const Partition& partition, Body&& body) {
  const uint32_t blocks = static_cast<uint32_t>(partition.blocks());
#pragma unroll 1
  for (uint32_t block = blockIdx.x; block < blocks; block += gridDim.x) body(WorkTile(partition, block));
}

// Calls body(Chunk) on `left` vectors, which next(chunk, k) puts into a chunk: CHUNK at a time, then what remains in
// smaller and smaller chunks, since one by one each would wait for its loads. The last `keep_in_l2` are to stay
// in the L2 cache.
template <int CHUNK, bool WHOLE, bool REST = false, class Next, class Body>
__device__ __forceinline__ void for_each_chunk(int32_t left, int32_t keep_in_l2, Next& next, Body& body) {
  auto once = [&] {
    Chunk<CHUNK, WHOLE> chunk;
    chunk.keep_in_l2 = left <= keep_in_l2;
#pragma unroll
    for (int k = 0; k < CHUNK; ++k) next(chunk, k);
    body(chunk);
    left -= CHUNK;
  };
  if constexpr (REST) {
    if (left >= CHUNK) once();
  } else {
    while (left >= CHUNK) once();
  }
  if constexpr (CHUNK > 1) for_each_chunk<CHUNK / 2, WHOLE, true>(left, keep_in_l2, next, body);
}

// Calls body(Chunk) on the thread's vectors of one channel.
template <int N, bool ALIGNED, int CHUNK, class Body>
__device__ __forceinline__ void iterate_planar(const Partition& partition, const Shape& shape, const WorkTile& work,
                                               Body&& body) {
  const int64_t begin = work.split * partition.steps_per_split;
  const int32_t steps = static_cast<int32_t>(min(partition.steps - begin, partition.steps_per_split));
  // How many vectors are this thread's: the strides of the block, of which the last may not reach it.
  const int32_t threads = blockDim.x;
  int32_t left = (steps - static_cast<int32_t>(threadIdx.x) + threads - 1) / threads;
  if (left <= 0) return;

  // The first of them: image n, vector j of the plane.
  const int32_t plane_vecs = static_cast<int32_t>(partition.planar.plane_vecs);
  // Of vectors that cover planes there may be more than the tensor has.
  int64_t n = ALIGNED ? static_cast<uint32_t>(begin) / static_cast<uint32_t>(plane_vecs) : begin / plane_vecs;
  int32_t j = static_cast<int32_t>(begin - n * plane_vecs);
  const uint32_t ahead = static_cast<uint32_t>(j) + threadIdx.x;
  const uint32_t planes = ahead / static_cast<uint32_t>(plane_vecs);
  n += planes;
  j = static_cast<int32_t>(ahead - planes * static_cast<uint32_t>(plane_vecs));

  const int64_t image = shape.c * shape.s;
  int64_t plane = n * image + work.tile * shape.s;  // element offset of the plane
  // And an aligned vector of it; a stride, within a plane and on to the next.
  uint32_t vec = static_cast<uint32_t>(plane / N) + j;
  const uint32_t stride =
      static_cast<uint32_t>(partition.planar.stride_planes * (image / N)) + partition.planar.stride_vecs;
  const uint32_t stride_on = stride + static_cast<uint32_t>((image - shape.s) / N);

  // Additions alone: a division for each vector would be most of the loop's instructions.
  auto next = [&](auto& chunk, int k) {
    if constexpr (ALIGNED) {
      chunk.vec[k] = vec;
      j += partition.planar.stride_vecs;
      const bool on = j >= plane_vecs;
      if (on) j -= plane_vecs;
      vec += on ? stride_on : stride;
    } else {
      const int64_t covering = (plane & -int64_t{N}) + int64_t{j} * N;
      chunk.vec[k] = static_cast<uint32_t>(covering / N);
      chunk.lo[k] = static_cast<int32_t>(max(plane - covering, int64_t{0}));
      chunk.hi[k] = static_cast<int32_t>(min(plane + shape.s - covering, int64_t{N}));
      plane += partition.planar.stride_planes * image;
      j += partition.planar.stride_vecs;
      if (j >= plane_vecs) {
        j -= plane_vecs;
        plane += image;
      }
    }
  };

  for_each_chunk<CHUNK, ALIGNED>(left, static_cast<int32_t>(partition.l2_steps) / threads, next, body);
}

// A thread's place in a column tile.
template <int N>
struct ColumnPlace {
  int32_t vec_col, row;
  int64_t col;
  bool active;  // some threads have no row, or no vector in it, and the last tile may have tile_vecs to spare

  __device__ __forceinline__ ColumnPlace(const Partition& partition, const WorkTile& work) {
    const auto& columns = partition.columns;
    row = static_cast<int32_t>(threadIdx.x) / columns.lanes;
    vec_col = static_cast<int32_t>(threadIdx.x) - row * columns.lanes;
    col = (work.tile * columns.tile_vecs + vec_col) * N;
    active = row < columns.thread_rows && vec_col < columns.tile_vecs && col < columns.cols;
  }
};

// Calls body(Chunk) on the thread's whole vectors of its columns; then, with PARTIAL, on the vector that
// the end of the tensor cuts short, if it is the thread's.
template <int N, int CHUNK, bool PARTIAL, class Body>
__device__ __forceinline__ void iterate_columns(const Partition& partition, int64_t numel, const WorkTile& work,
                                                const ColumnPlace<N>& place, Body&& body) {
  if (!place.active) return;
  const int64_t begin = work.split * partition.steps_per_split;
  int32_t rows = static_cast<int32_t>(min(partition.steps - begin, partition.steps_per_split));
  const int64_t last = (partition.steps - 1) * partition.columns.cols + place.col;  // in the row that may be short
  const bool short_vec = begin + rows == partition.steps && last + N > numel;
  if (short_vec) --rows;  // it is not whole, and comes last, or not at all

  int32_t left = (rows - place.row + partition.columns.thread_rows - 1) / partition.columns.thread_rows;
  uint32_t vec = static_cast<uint32_t>(((begin + place.row) * partition.columns.cols + place.col) / N);
  const uint32_t stride = static_cast<uint32_t>(partition.columns.thread_rows * (partition.columns.cols / N));
  auto next = [&](auto& chunk, int k) {
    chunk.vec[k] = vec;
    vec += stride;
  };
  for_each_chunk<CHUNK, true>(left, static_cast<int32_t>(partition.l2_steps) / partition.columns.thread_rows, next,
                              body);
  if constexpr (PARTIAL) {
    if (short_vec && rows % partition.columns.thread_rows == place.row && last < numel) {
      Chunk<1, false> chunk;
      chunk.keep_in_l2 = true;
      chunk.vec[0] = static_cast<uint32_t>(last / N);
      chunk.lo[0] = 0;
      chunk.hi[0] = static_cast<int32_t>(numel - last);
      body(chunk);
    }
  }
}

}  // namespace bnext::cuda
