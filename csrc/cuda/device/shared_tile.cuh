// What a resident block keeps of its inputs, in shared memory and in registers, and how it gets there.
#pragma once

#include <utility>

#include "tile_iterator.cuh"

namespace bnext::cuda {

// A block's copies of its part of a tile of the operation's inputs. Passes over the part go through the same chunks, of
// CHUNK vectors: a thread meets its vectors in the same order in all of them, and reads only what it copied itself, so
// that there is nothing to synchronise but the thread with its own copies.
//
// PARTIAL: there may be room for less than the block's part. It then holds as many of the first chunks as there is room
// for, whole ones (the planner sees to that); the others are loaded once more.
template <class Op, int CHUNK, bool PARTIAL = false>
class SharedTile {
  static_assert(!PARTIAL || resident_strides(Op::kInputs) % CHUNK == 0);
  using T = typename Op::T;
  static constexpr int N = Op::N;
  using Slot = Vec<T, N>;
  template <int COUNT> using Vecs = Vec<T, N>[Op::kInputs][COUNT];

 public:
  // Part `index` of the `parts` that the block's dynamic shared memory is divided into.
  __device__ __forceinline__ SharedTile(const Partition& partition, uint32_t index = 0, uint32_t parts = 1)
      : input_bytes_(static_cast<uint32_t>(partition.resident_bytes) / (parts * Op::kInputs)),
        stride_(blockDim.x * sizeof(Slot)),
        slots_(dynamic_shared() + index * Op::kInputs * input_bytes_ + threadIdx.x * sizeof(Slot)) {}

  // Loads a walk's chunks into registers, and stores them. A chunk for which there is no room is left to the L2 cache:
  // it will be read again.
  class GlobalToShared {
   public:
    __device__ __forceinline__ GlobalToShared(const typename Op::Params& p, const SharedTile& tile)
        : p_(p), tile_(tile) {}

    template <int COUNT>
    __device__ __forceinline__ void load(const Chunk<COUNT, true>& chunk, Vecs<COUNT>& vecs) {
      if (!tile_.holds(to_)) return from_global<Op, Reuse::again>(p_).load(chunk, vecs);
      from_global<Op, Reuse::last>(p_).load(chunk, vecs);
      tile_.store(to_, vecs);
      to_ += COUNT * tile_.stride_;
    }

   private:
    const typename Op::Params& p_;
    const SharedTile& tile_;
    uint32_t to_ = 0;
  };

  // Copies a walk's chunks, some chunks ahead, and loads them when they are there: more is under way than registers
  // would hold. (The whole part at once took an H100 no less.)
  template <class Walk>
  class AsyncGlobalToShared {
   public:
    __device__ __forceinline__ AsyncGlobalToShared(const typename Op::Params& p, const SharedTile& tile,
                                                   const Walk& walk)
        : p_(p), tile_(tile), ahead_(walk) {
      begin();
    }

    template <int COUNT>
    __device__ __forceinline__ void load(const Chunk<COUNT, true>&, Vecs<COUNT>& vecs) {
      // The copies before the waiting: so kAhead chunks are under way while the thread is busy with this one.
      if constexpr (COUNT == CHUNK) copy();
      else commit_copies();  // nothing is left to copy
      wait_for_copies<kAhead>();
      tile_.load(from_, vecs);
      from_ += COUNT * tile_.stride_;
    }

   private:
    // Chunks that copies are ahead: so many bytes of a thread under way.
    static constexpr int kBytes = 192, kChunkBytes = CHUNK * Op::kInputs * sizeof(Slot);
    static constexpr int kAhead = kBytes / kChunkBytes > 2 ? kBytes / kChunkBytes : 2;

    __device__ __forceinline__ void begin() {
#pragma unroll 1
      for (int i = 0; i < kAhead; ++i) copy();
    }

    // The next chunk as a group of its own; or what is left of the walk, even if that is nothing: `kAhead` groups are
    // then always behind that of the chunk that is loaded.
    __device__ __forceinline__ void copy() {
      if (ahead_.remaining >= CHUNK) {
        copy_chunk<CHUNK>();
      } else {
#pragma unroll
        for (int k = 1; k < CHUNK; ++k) {
          if (ahead_.remaining > 0) copy_chunk<1>();
        }
      }
      commit_copies();
    }

    template <int COUNT>
    __device__ __forceinline__ void copy_chunk() {
      Chunk<COUNT, true> chunk;
      next_chunk(ahead_, chunk);
      tile_.copy(p_, to_, chunk);
      to_ += COUNT * tile_.stride_;
    }

    const typename Op::Params& p_;
    const SharedTile& tile_;
    Walk ahead_;
    uint32_t to_ = 0, from_ = 0;
  };

  // Loads from global memory by way of the tile, where the chunks remain.
  template <bool COPIES, class Walk>
  __device__ __forceinline__ auto fill(const typename Op::Params& p, const Walk& walk) const {
    if constexpr (COPIES) return AsyncGlobalToShared<Walk>(p, *this, walk);
    else return GlobalToShared(p, *this);
  }

  // Loads chunks once more, in the same order: from the tile, or from memory where there was no room.
  class FromShared {
   public:
    __device__ __forceinline__ FromShared(const typename Op::Params& p, const SharedTile& tile) : p_(p), tile_(tile) {}

    template <int COUNT>
    __device__ __forceinline__ void load(const Chunk<COUNT, true>& chunk, Vecs<COUNT>& vecs) {
      if (!tile_.holds(from_)) return from_global<Op, Reuse::last>(p_).load(chunk, vecs);
      tile_.load(from_, vecs);
      from_ += COUNT * tile_.stride_;
    }

   private:
    const typename Op::Params& p_;
    const SharedTile& tile_;
    uint32_t from_ = 0;
  };
  __device__ __forceinline__ FromShared replay(const typename Op::Params& p) const { return FromShared(p, *this); }

 private:
  // Whether there is room for the chunk whose first vector's slot is `offset` bytes behind the thread's first.
  __device__ __forceinline__ bool holds(uint32_t offset) const { return !PARTIAL || offset < input_bytes_; }

  // The slot of vector k of a chunk that begins `offset` bytes behind the thread's first slot.
  __device__ __forceinline__ Slot* slot(int input, uint32_t offset, int k) const {
    return reinterpret_cast<Slot*>(slots_ + input * input_bytes_ + offset + k * stride_);
  }

  // Slots of adjacent threads are adjacent, as their vectors are: neither side of a copy conflicts.
  template <int COUNT>
  __device__ __forceinline__ void copy(const typename Op::Params& p, uint32_t offset,
                                       const Chunk<COUNT, true>& chunk) const {
#pragma unroll
    for (int i = 0; i < Op::kInputs; ++i) {
      const T* const input = static_cast<const T*>(Op::input(p, i));
#pragma unroll
      for (int k = 0; k < COUNT; ++k) {
        uint4* const to = reinterpret_cast<uint4*>(slot(i, offset, k));
        const uint4* const from = reinterpret_cast<const uint4*>(vec_at<N>(input, chunk.vec[k]));
#pragma unroll
        for (int part = 0; part < Slot::words / 4; ++part) copy_async(to + part, from + part);
      }
    }
  }

  template <int COUNT>
  __device__ __forceinline__ void store(uint32_t offset, const Vecs<COUNT>& vecs) const {
#pragma unroll
    for (int i = 0; i < Op::kInputs; ++i) {
#pragma unroll
      for (int k = 0; k < COUNT; ++k) *slot(i, offset, k) = vecs[i][k];
    }
  }

  template <int COUNT>
  __device__ __forceinline__ void load(uint32_t offset, Vecs<COUNT>& vecs) const {
#pragma unroll
    for (int i = 0; i < Op::kInputs; ++i) {
#pragma unroll
      for (int k = 0; k < COUNT; ++k) vecs[i][k] = *slot(i, offset, k);
    }
  }

  // 32 bits: shared memory is small, and 64-bit additions take two instructions.
  uint32_t input_bytes_, stride_;  // of an input; from one slot of the thread to the next
  unsigned char* slots_;           // the thread's first
};

// A thread's copies of CHUNKS chunks of the operation's inputs, in registers: of all that a walk has, or of nothing
// where it is empty.
template <class Op, int CHUNK, int CHUNKS>
class RegisterTile {
 public:
  static constexpr int kVecs = CHUNK * CHUNKS;

  // Loads them, and calls body(Chunk, vecs) on each.
  template <class Walk, class Body>
  __device__ __forceinline__ void fill(const typename Op::Params& p, const Walk& walk, const Body& body) {
    replay(walk, [&](const auto& chunk, auto& vecs) {
      from_global<Op, Reuse::last>(p).load(chunk, vecs);
      body(chunk, vecs);
    });
  }

  // Calls body(Chunk, vecs) on each once more.
  template <class Walk, class Body>
  __device__ __forceinline__ void replay(Walk walk, const Body& body) {
    if (walk.remaining == 0) return;
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      Chunk<CHUNK, true> chunk;
      next_chunk(walk, chunk);
      body(chunk, chunks_[i]);
    }
  }

 private:
  Vec<typename Op::T, Op::N> chunks_[CHUNKS > 0 ? CHUNKS : 1][Op::kInputs][CHUNK];
};

}  // namespace bnext::cuda
