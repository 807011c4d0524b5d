// How a block goes through its work tile (see Partition in planner/partition.h): in chunks of several vectors, whose
// loads are all in flight at once. A walk gives one vector after the other: next(chunk, k).
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

// Goes on by so many of a walk's vectors, in one chunk.
template <class Walk, int COUNT, bool WHOLE>
__device__ __forceinline__ void next_chunk(Walk& walk, Chunk<COUNT, WHOLE>& chunk) {
  chunk.keep_in_l2 = walk.remaining <= walk.keep_in_l2;
#pragma unroll
  for (int k = 0; k < COUNT; ++k) walk.next(chunk, k);
  walk.remaining -= COUNT;
}

// Calls body(Chunk) on what is left of a walk: CHUNK vectors at a time, then what remains in smaller and smaller
// chunks, since one by one each would wait for its loads.
template <int CHUNK, bool REST = false, class Walk, class Body>
__device__ __forceinline__ void for_each_chunk(Walk& walk, Body&& body) {
  auto once = [&] {
    Chunk<CHUNK, Walk::kWhole> chunk;
    next_chunk(walk, chunk);
    body(chunk);
  };
  if constexpr (REST) {
    if (walk.remaining >= CHUNK) once();
  } else {
    while (walk.remaining >= CHUNK) once();
  }
  if constexpr (CHUNK > 1) for_each_chunk<CHUNK / 2, true>(walk, body);
}

// The thread's vectors of one channel.
template <int N, bool ALIGNED>
class PlanarWalk {
 public:
  static constexpr bool kWhole = ALIGNED;
  int32_t remaining;   // vectors
  int32_t keep_in_l2;  // so many of the last

  __device__ __forceinline__ PlanarWalk(const Partition& partition, const Shape& shape, const WorkTile& work)
      : keep_in_l2(static_cast<int32_t>(partition.l2_steps) / static_cast<int32_t>(blockDim.x)),
        shape_(shape),
        planar_(partition.planar) {
    const int64_t begin = work.split * partition.steps_per_split;
    const int32_t steps = static_cast<int32_t>(min(partition.steps - begin, partition.steps_per_split));
    // How many vectors are this thread's: the strides of the block, of which the last may not reach it.
    const int32_t threads = blockDim.x;
    remaining = max((steps - static_cast<int32_t>(threadIdx.x) + threads - 1) / threads, 0);
    if (remaining == 0) return;

    // The first of them: image n, vector j of the plane.
    const int32_t plane_vecs = static_cast<int32_t>(partition.planar.plane_vecs);
    // Of vectors that cover planes there may be more than the tensor has.
    int64_t n = ALIGNED ? static_cast<uint32_t>(begin) / static_cast<uint32_t>(plane_vecs) : begin / plane_vecs;
    j_ = static_cast<int32_t>(begin - n * plane_vecs);
    const uint32_t ahead = static_cast<uint32_t>(j_) + threadIdx.x;
    const uint32_t planes = ahead / static_cast<uint32_t>(plane_vecs);
    n += planes;
    j_ = static_cast<int32_t>(ahead - planes * static_cast<uint32_t>(plane_vecs));

    image_ = shape.c * shape.s;
    plane_ = n * image_ + work.tile * shape.s;
    vec_ = static_cast<uint32_t>(plane_ / N) + j_;
    stride_ = static_cast<uint32_t>(partition.planar.stride_planes * (image_ / N)) + partition.planar.stride_vecs;
    plane_stride_ = stride_ + static_cast<uint32_t>((image_ - shape.s) / N);
  }

  // Additions alone: a division for each vector would be most of a loop's instructions.
  template <int COUNT>
  __device__ __forceinline__ void next(Chunk<COUNT, ALIGNED>& chunk, int k) {
    const int32_t plane_vecs = static_cast<int32_t>(planar_.plane_vecs);
    if constexpr (ALIGNED) {
      chunk.vec[k] = vec_;
      j_ += planar_.stride_vecs;
      const bool crosses_plane = j_ >= plane_vecs;
      if (crosses_plane) j_ -= plane_vecs;
      vec_ += crosses_plane ? plane_stride_ : stride_;
    } else {
      const int64_t covering = (plane_ & -int64_t{N}) + int64_t{j_} * N;
      chunk.vec[k] = static_cast<uint32_t>(covering / N);
      chunk.lo[k] = static_cast<int32_t>(max(plane_ - covering, int64_t{0}));
      chunk.hi[k] = static_cast<int32_t>(min(plane_ + shape_.s - covering, int64_t{N}));
      plane_ += planar_.stride_planes * image_;
      j_ += planar_.stride_vecs;
      if (j_ >= plane_vecs) {
        j_ -= plane_vecs;
        plane_ += image_;
      }
    }
  }

 private:
  const Shape& shape_;
  const Partition::Planar& planar_;
  int64_t image_ = 0, plane_ = 0;  // element offset of the plane
  int32_t j_ = 0;
  uint32_t vec_ = 0;                        // an aligned vector of it
  uint32_t stride_ = 0, plane_stride_ = 0;  // within a plane, and on to the next
};

// A thread's place in a column tile.
template <int N>
struct ColumnPlace {
  int32_t vec_col, row;
  int64_t col;
  bool active;  // some threads have no row or no vector in it, and the last tile may be narrower

  __device__ __forceinline__ ColumnPlace(const Partition& partition, const WorkTile& work) {
    const auto& columns = partition.columns;
    row = static_cast<int32_t>(threadIdx.x) / columns.row_threads;
    vec_col = static_cast<int32_t>(threadIdx.x) - row * columns.row_threads;
    col = (work.tile * columns.tile_vecs + vec_col) * N;
    active = row < columns.thread_rows && vec_col < columns.tile_vecs && col < columns.cols;
  }
};

// The thread's whole vectors of its columns; none where it has no column.
template <int N>
class ColumnWalk {
 public:
  static constexpr bool kWhole = true;
  int32_t remaining;   // vectors
  int32_t keep_in_l2;  // so many of the last

  __device__ __forceinline__ ColumnWalk(const Partition& partition, int64_t numel, const WorkTile& work,
                                        const ColumnPlace<N>& place)
      : keep_in_l2(static_cast<int32_t>(partition.l2_steps) / partition.columns.thread_rows) {
    const auto& columns = partition.columns;
    const int64_t begin = work.split * partition.steps_per_split;
    rows_ = static_cast<int32_t>(min(partition.steps - begin, partition.steps_per_split));
    last_ = (partition.steps - 1) * columns.cols + place.col;  // in the row that may be short
    cut_ = place.active && begin + rows_ == partition.steps && last_ + N > numel;
    if (cut_) --rows_;  // it is not whole, and comes last, or not at all
    remaining = place.active ? (rows_ - place.row + columns.thread_rows - 1) / columns.thread_rows : 0;
    vec_ = static_cast<uint32_t>(((begin + place.row) * columns.cols + place.col) / N);
    stride_ = static_cast<uint32_t>(columns.thread_rows * (columns.cols / N));
  }

  template <int COUNT>
  __device__ __forceinline__ void next(Chunk<COUNT, true>& chunk, int k) {
    chunk.vec[k] = vec_;
    vec_ += stride_;
  }

  // Takes the last `count` vectors off, as a walk of their own; none where there are fewer.
  __device__ __forceinline__ ColumnWalk take_last(int32_t count) {
    ColumnWalk last = *this;
    last.remaining = remaining < count ? 0 : count;
    remaining -= last.remaining;
    last.vec_ += remaining * stride_;
    return last;
  }

  // Calls body(Chunk) on the vector that the end of the tensor cuts short, if it is the thread's.
  template <class Body>
  __device__ __forceinline__ void cut(const Partition& partition, int64_t numel, const ColumnPlace<N>& place,
                                      Body&& body) const {
    if (!cut_ || rows_ % partition.columns.thread_rows != place.row || last_ >= numel) return;
    Chunk<1, false> chunk;
    chunk.keep_in_l2 = true;
    chunk.vec[0] = static_cast<uint32_t>(last_ / N);
    chunk.lo[0] = 0;
    chunk.hi[0] = static_cast<int32_t>(numel - last_);
    body(chunk);
  }

 private:
  int32_t rows_;
  bool cut_;
  int64_t last_;
  uint32_t vec_, stride_;
};

}  // namespace bnext::cuda
