// How a block passes numbers to others that are on the device with it and wait for them, without a barrier: each word
// of 32 bits has a flag beside it, in 8 bytes that are stored and loaded as one, so that who sees the flag has the
// word. No fence has to order anything, and what is polled is the number itself, not a counter that says where to look
// next. (NCCL's low-latency protocol does this.)
#pragma once

#include <cstring>

#include "cuda_compat.h"

namespace bnext::cuda {

// A T in global memory, with its flags: of no value while it is all zeros.
template <class T>
class alignas(16) Flagged {
  static constexpr int kWords = sizeof(T) / sizeof(uint32_t);
  static_assert(sizeof(T) % (2 * sizeof(uint32_t)) == 0, "two words and their flags are loaded at a time");

 public:
  // In one thread of the grid. Each value that is stored here has a flag of its own, which is not 0.
  __device__ __forceinline__ void store(const T& value, uint32_t flag) {
    uint32_t words[kWords];
    memcpy(words, &value, sizeof(T));
#pragma unroll
    for (int i = 0; i < kWords; i += 2) {
      store_relaxed(&pairs_[i / 2], {with_flag(words[i], flag), with_flag(words[i + 1], flag)});
    }
  }

  // Waits until the value with that flag is there.
  __device__ __forceinline__ T wait(uint32_t flag) const {
    uint32_t words[kWords];
    while (!load(words, flag)) __nanosleep(20);
    T value;
    memcpy(&value, words, sizeof(T));
    return value;
  }

  __device__ __forceinline__ void clear() { memset(pairs_, 0, sizeof(pairs_)); }

 private:
  __device__ __forceinline__ static uint64_t with_flag(uint32_t word, uint32_t flag) {
    return uint64_t{flag} << 32 | word;
  }

  __device__ __forceinline__ bool load(uint32_t (&words)[kWords], uint32_t flag) const {
    bool there = true;
#pragma unroll
    for (int i = 0; i < kWords; i += 2) {
      const U64x2 pair = load_relaxed(&pairs_[i / 2]);
      words[i] = static_cast<uint32_t>(pair.first);
      words[i + 1] = static_cast<uint32_t>(pair.second);
      there &= pair.first >> 32 == flag && pair.second >> 32 == flag;
    }
    return there;
  }

  U64x2 pairs_[kWords / 2];
};

}  // namespace bnext::cuda
