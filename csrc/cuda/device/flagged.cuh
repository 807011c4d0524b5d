// How a block passes numbers to others that are on the device with it and wait for them, without a barrier: each 8
// bytes have a flag beside them, in 16 bytes that are stored and loaded as one, so that who sees the flag has the
// numbers. No fence has to order anything, and what is polled is the number itself, not a counter that says where to
// look next. (NCCL's low-latency protocol does this.)
#pragma once

#include <cstring>

#include "cuda_compat.h"

namespace bnext::cuda {

// A T in global memory, with its flags. Memory that was all zeros at first and has been Flagged ever since, of whatever
// T, may be used as such: a value is there once its flag is, which is not 0 and was never used before.
template <class T>
class Flagged {
  static constexpr int kParts = sizeof(T) / sizeof(uint64_t);
  static_assert(sizeof(T) % sizeof(uint64_t) == 0);

 public:
  // In one thread of the grid.
  __device__ __forceinline__ void store(const T& value, uint64_t flag) {
    uint64_t words[kParts];
    memcpy(words, &value, sizeof(T));
#pragma unroll
    for (int i = 0; i < kParts; ++i) store_whole(&parts_[i], {words[i], flag});
  }

  // Waits until the value with that flag is there.
  __device__ __forceinline__ T wait(uint64_t flag) const {
    uint64_t words[kParts];
    while (!load(words, flag)) __nanosleep(20);
    T value;
    memcpy(&value, words, sizeof(T));
    return value;
  }

 private:
  __device__ __forceinline__ bool load(uint64_t (&words)[kParts], uint64_t flag) const {
    bool there = true;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const U64x2 part = load_whole(&parts_[i]);
      words[i] = part.first;
      there &= part.second == flag;
    }
    return there;
  }

  U64x2 parts_[kParts];
};

}  // namespace bnext::cuda
