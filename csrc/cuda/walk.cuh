// How a block walks through its share of a tensor (see Pass in plan.h), in chunks of several units
// whose loads are all in flight at once.
#pragma once

#include "dialect.h"
#include "plan.h"
#include "vec.cuh"

namespace bnext::cuda {

// Some of the tensor's units, by their number in memory. Unless WHOLE, only elements [lo, hi) of a unit are the
// thread's.
template <int COUNT, bool WHOLE>
struct Chunk {
  static constexpr int count = COUNT;
  static constexpr bool whole = WHOLE;
  uint32_t unit[COUNT];
  int32_t lo[COUNT], hi[COUNT];
  bool retained;  // by the L2 cache, for the kernel that follows

  __device__ __forceinline__ bool has(int k, int e) const { return WHOLE || (e >= lo[k] && e < hi[k]); }
};

// Element 0 of a tensor's unit: one instruction, of 32 bits times a constant.
template <int UNIT, class T>
__device__ __forceinline__ T* unit_at(T* p, uint32_t unit) {
  return p + uint64_t{unit} * UNIT;
}

// Unit k of a chunk. Reading may take in what is not the thread's, as long as it is the tensor's.
template <Reuse REUSE, int UNIT, int COUNT, bool WHOLE, class T>
__device__ __forceinline__ Unit<T, UNIT> load_at(const T* p, const Chunk<COUNT, WHOLE>& chunk, int k, int64_t numel) {
  if constexpr (WHOLE) return load_unit<REUSE, T, UNIT>(unit_at<UNIT>(p, chunk.unit[k]), chunk.retained);
  else return load_within<REUSE, UNIT>(p, int64_t{chunk.unit[k]} * UNIT, numel, chunk.retained);
}

template <int UNIT, int COUNT, bool WHOLE, class T>
__device__ __forceinline__ void store_at(T* p, const Chunk<COUNT, WHOLE>& chunk, int k, const Unit<T, UNIT>& unit) {
  T* to = unit_at<UNIT>(p, chunk.unit[k]);
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

  __device__ __forceinline__ explicit Share(const Pass& pass, int64_t block) {
    split = block / pass.tiles;
    tile = block - split * pass.tiles;
  }

  __device__ __forceinline__ static Share forward(const Pass& pass) { return Share(pass, blockIdx.x); }
  __device__ __forceinline__ static Share reverse(const Pass& pass) { return Share(pass, gridDim.x - 1 - blockIdx.x); }
};

// Calls body(Share) on each of a pass's shares that are this block's, in a launch of some other number of blocks.
template <class Body>
__device__ __forceinline__ void for_shares(const Pass& pass, Body&& body) {
  for (int64_t block = blockIdx.x; block < pass.blocks(); block += gridDim.x) body(Share(pass, block));
}

// Calls body(Chunk) on `left` units, which next(chunk, k) puts into a chunk: CHUNK at a time, then what remains in
// smaller and smaller chunks, since one by one each would wait for its loads. The last `retained` are to stay
// in the L2 cache.
template <int CHUNK, bool WHOLE, bool REST = false, class Next, class Body>
__device__ __forceinline__ void in_chunks(int32_t left, int32_t retained, Next& next, Body& body) {
  auto once = [&] {
    Chunk<CHUNK, WHOLE> chunk;
    chunk.retained = left <= retained;
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
  if constexpr (CHUNK > 1) in_chunks<CHUNK / 2, WHOLE, true>(left, retained, next, body);
}

// Calls body(Chunk) on the thread's units of one channel.
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
  // And an aligned unit of it; a stride, within a plane and on to the next.
  uint32_t unit = static_cast<uint32_t>(plane / UNIT) + j;
  const uint32_t stride = static_cast<uint32_t>(pass.stride_planes * (image / UNIT)) + pass.stride_units;
  const uint32_t stride_on = stride + static_cast<uint32_t>((image - shape.s) / UNIT);

  auto next = [&](auto& chunk, int k) {
    if constexpr (ALIGNED) {
      chunk.unit[k] = unit;
      j += pass.stride_units;
      const bool on = j >= plane_units;
      if (on) j -= plane_units;
      unit += on ? stride_on : stride;
    } else {
      const int64_t covering = (plane & -int64_t{UNIT}) + int64_t{j} * UNIT;
      chunk.unit[k] = static_cast<uint32_t>(covering / UNIT);
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

  in_chunks<CHUNK, ALIGNED>(left, static_cast<int32_t>(pass.retained_steps) / threads, next, body);
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
  uint32_t unit = static_cast<uint32_t>(((begin + place.row) * pass.cols + place.col) / UNIT);
  const uint32_t stride = static_cast<uint32_t>(pass.lane_rows * (pass.cols / UNIT));
  auto next = [&](auto& chunk, int k) {
    chunk.unit[k] = unit;
    unit += stride;
  };
  in_chunks<CHUNK, true>(left, static_cast<int32_t>(pass.retained_steps) / pass.lane_rows, next, body);
  if constexpr (PARTIAL) {
    if (short_unit && rows % pass.lane_rows == place.row && last < numel) {
      Chunk<1, false> chunk;
      chunk.retained = true;
      chunk.unit[0] = static_cast<uint32_t>(last / UNIT);
      chunk.lo[0] = 0;
      chunk.hi[0] = static_cast<int32_t>(numel - last);
      body(chunk);
    }
  }
}

}  // namespace bnext::cuda
