// How a block walks through its share of a tensor (see Pass in plan.h), in chunks of several units
// whose loads are all in flight at once.
#pragma once

#include "dialect.h"
#include "plan.h"
#include "vec.cuh"

namespace bnext::cuda {

// Units at these element offsets. Unless WHOLE, only elements [lo, hi) of a unit are the thread's.
template <int COUNT, bool WHOLE>
struct Chunk {
  static constexpr int count = COUNT;
  static constexpr bool whole = WHOLE;
  int64_t offset[COUNT];
  int32_t lo[COUNT], hi[COUNT];

  __device__ __forceinline__ bool has(int k, int e) const { return WHOLE || (e >= lo[k] && e < hi[k]); }
};

// Unit k of a chunk. Reading may take in what is not the thread's, as long as it is the tensor's.
template <Reuse REUSE, int UNIT, int COUNT, bool WHOLE, class T>
__device__ __forceinline__ Unit<T, UNIT> load_at(const T* p, const Chunk<COUNT, WHOLE>& chunk, int k, int64_t numel) {
  if constexpr (WHOLE) return load_unit<REUSE, T, UNIT>(p + chunk.offset[k]);
  else return load_within<REUSE, UNIT>(p, chunk.offset[k], numel);
}

template <int UNIT, int COUNT, bool WHOLE, class T>
__device__ __forceinline__ void store_at(T* p, const Chunk<COUNT, WHOLE>& chunk, int k, const Unit<T, UNIT>& unit) {
  T* to = p + chunk.offset[k];
  if (WHOLE || (chunk.lo[k] == 0 && chunk.hi[k] == UNIT)) {
    store_unit<T, UNIT>(to, unit);
  } else {
#pragma unroll
    for (int e = 0; e < UNIT; ++e) {
      if (chunk.has(k, e)) to[e] = narrow<T>(unit[e]);
    }
  }
}

// Which tile and split a block takes. A pass over data that the previous kernel has just read starts
// at the end, which is still in the L2 cache.
struct Share {
  int64_t tile, split;

  __device__ __forceinline__ Share(int64_t tile, int64_t split) : tile(tile), split(split) {}

  __device__ __forceinline__ explicit Share(const Pass& pass, bool reverse = false) {
    int64_t block = reverse ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    split = block / pass.tiles;
    tile = block - split * pass.tiles;
  }
};

// Calls body(Chunk) on the thread's units of one channel, CHUNK at a time, then one by one.
template <int UNIT, bool ALIGNED, int CHUNK, class Body>
__device__ __forceinline__ void walk_planar(const Pass& pass, const Shape& shape, const Share& share, Body&& body) {
  const int64_t begin = share.split * pass.steps_per_split;
  const int32_t steps = static_cast<int32_t>(min(pass.steps - begin, pass.steps_per_split));
  // How many units are this thread's: the strides of the block, of which the last may not reach it.
  const int32_t threads = blockDim.x;
  int32_t left = (steps - static_cast<int32_t>(threadIdx.x) + threads - 1) / threads;
  if (left <= 0) return;

  // The first of them: image n, unit j of the plane.
  const int32_t plane_units = static_cast<int32_t>(pass.plane_units);
  int64_t n = begin / plane_units;
  int32_t j = static_cast<int32_t>(begin - n * plane_units);
  const uint32_t ahead = static_cast<uint32_t>(j) + threadIdx.x;
  const uint32_t planes = ahead / static_cast<uint32_t>(plane_units);
  n += planes;
  j = static_cast<int32_t>(ahead - planes * static_cast<uint32_t>(plane_units));

  const int64_t image = shape.c * shape.s;
  int64_t plane = n * image + share.tile * shape.s;  // element offset of the plane
  int64_t offset = plane + int64_t{j} * UNIT;        // and of an aligned unit in it
  const int64_t stride = pass.stride_planes * image + pass.stride_units * int64_t{UNIT};

  auto next = [&](auto& chunk, int k) {
    if constexpr (ALIGNED) {
      chunk.offset[k] = offset;
      offset += stride;
      j += pass.stride_units;
      if (j >= plane_units) {
        j -= plane_units;
        offset += image - shape.s;
      }
    } else {
      const int64_t covering = (plane & -int64_t{UNIT}) + int64_t{j} * UNIT;
      chunk.offset[k] = covering;
      chunk.lo[k] = static_cast<int32_t>(max(plane - covering, int64_t{0}));
      chunk.hi[k] = static_cast<int32_t>(min(plane + shape.s - covering, int64_t{UNIT}));
      plane += pass.stride_planes * image;
      j += pass.stride_units;
      if (j >= plane_units) {
        j -= plane_units;
        plane += image;
      }
    }
  };

  for (; left >= CHUNK; left -= CHUNK) {
    Chunk<CHUNK, ALIGNED> chunk;
#pragma unroll
    for (int k = 0; k < CHUNK; ++k) next(chunk, k);
    body(chunk);
  }
  for (; left > 0; --left) {
    Chunk<1, ALIGNED> chunk;
    next(chunk, 0);
    body(chunk);
  }
}

// A thread's place in a column tile.
template <int UNIT>
struct ColumnPlace {
  int32_t lane, row;
  int64_t col;
  bool active;  // some threads have no row, and the last tile may have lanes to spare

  __device__ __forceinline__ ColumnPlace(const Pass& pass, const Share& share) {
    row = static_cast<int32_t>(threadIdx.x) / pass.lanes;
    lane = static_cast<int32_t>(threadIdx.x) - row * pass.lanes;
    col = (share.tile * pass.lanes + lane) * UNIT;
    active = row < pass.lane_rows && col < pass.cols;
  }
};

// The channel of a column, and whether it is the channel's first.
struct ChannelColumn {
  int64_t channel;
  bool first;

  __device__ __forceinline__ ChannelColumn(const Pass& pass, const Shape& shape, int64_t col) {
    const int64_t plane = col / pass.channel_stride;
    channel = plane % shape.c;
    first = plane < shape.c && plane * pass.channel_stride == col;
  }
};

// Calls body(Chunk) on the thread's whole units of its columns; then, with PARTIAL, on the unit that
// the end of the tensor cuts short, if it is the thread's.
template <int UNIT, int CHUNK, bool PARTIAL, class Body>
__device__ __forceinline__ void walk_columns(const Pass& pass, int64_t numel, const Share& share,
                                             const ColumnPlace<UNIT>& place, Body&& body) {
  if (!place.active) return;
  const int64_t begin = share.split * pass.steps_per_split;
  int32_t rows = static_cast<int32_t>(min(pass.steps - begin, pass.steps_per_split));
  const int64_t last = (pass.steps - 1) * pass.cols + place.col;  // in the row that may be short
  const bool short_unit = begin + rows == pass.steps && last + UNIT > numel;
  if (short_unit) --rows;

  int32_t left = (rows - place.row + pass.lane_rows - 1) / pass.lane_rows;
  int64_t offset = (begin + place.row) * pass.cols + place.col;
  const int64_t stride = pass.lane_rows * pass.cols;
  for (; left >= CHUNK; left -= CHUNK) {
    Chunk<CHUNK, true> chunk;
#pragma unroll
    for (int k = 0; k < CHUNK; ++k, offset += stride) chunk.offset[k] = offset;
    body(chunk);
  }
  for (; left > 0; --left, offset += stride) {
    Chunk<1, true> chunk;
    chunk.offset[0] = offset;
    body(chunk);
  }
  if constexpr (PARTIAL && UNIT > 1) {
    if (short_unit && rows % pass.lane_rows == place.row && last < numel) {
      Chunk<1, false> chunk;
      chunk.offset[0] = last;
      chunk.lo[0] = 0;
      chunk.hi[0] = static_cast<int32_t>(numel - last);
      body(chunk);
    }
  }
}

}  // namespace bnext::cuda
