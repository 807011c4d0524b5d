// Counters by which the blocks of a launch count each other: 0 before the launch, and 0 again once it is over. Or, in a
// pool of its own, memory of flagged numbers, whose flags never come twice (cuda/device/flagged.cuh).
//
// So launches that run one after the other may share some, and no others may.
// - The launches in a stream share a block of counters. A stream is known by its id: its handle may come again, once it
//   was destroyed, while its launches still run. cudaStreamPerThread, by which every thread means a stream of its own,
//   counts as a stream of that thread. What a destroyed stream had is not used again: 4 KiB, where no launch of it took
//   more.
// - A launch that is captured gets a block of its own, which the graph keeps (as a CUDA user object), since it may be
//   replayed at any time beside anything. The block is free again when the graph, and what was instantiated from it,
//   have been destroyed and their last replay is over. Two instances of a graph share its counters, and its tensors.
// All come from slabs that are zeroed once, before they are used, outside of any stream that is captured: neither
// an eager call nor a replay fills anything. Slabs are never freed; there are as many as were in use at a time.
//
// This is the bookkeeping of one device; it knows neither torch nor CUDA. counters.cpp does the rest.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

namespace bnext {

class CounterPool {
 public:
  struct Stream {
    uint64_t id;
    uint64_t thread;  // 0 where all threads mean the same stream by its handle
    bool operator<(const Stream& other) const { return std::tie(id, thread) < std::tie(other.id, other.thread); }
  };

  struct Block {
    uint32_t* data = nullptr;
    int64_t count = 0;
  };

  // At least `count` counters for the launches of a stream. allocate(n) returns n counters that are 0 now, or
  // throws. It is called without the lock, because what it calls may wait for a thread that gives a block back.
  template <class Allocate>
  uint32_t* of_stream(const Stream& stream, int64_t count, Allocate&& allocate) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = streams_.find(stream);
      if (found != streams_.end() && found->second.count >= count) return found->second.data;
    }
    const Block fresh = take(std::max(count, kLeastOfStream), allocate);
    const std::lock_guard<std::mutex> lock(mutex_);
    Block& block = streams_[stream];
    if (block.count >= fresh.count) {  // another thread was here in between
      free_[fresh.count].push_back(fresh.data);
    } else {
      block = fresh;  // launches that are under way may be using the smaller one: it is not free
    }
    return block.data;
  }

  // At least `count` counters that nobody else has until they are given back.
  template <class Allocate>
  Block take(int64_t count, Allocate&& allocate) {
    Block block = {nullptr, kMinBlock};
    while (block.count < std::min(count, kSlab)) block.count *= 2;
    while (block.count < count) block.count += kSlab;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (take_free(block)) return block;
    }
    const int64_t size = std::max(block.count, kSlab);
    uint32_t* data = allocate(size);
    const std::lock_guard<std::mutex> lock(mutex_);
    block.data = data;
    if (size - block.count > slab_.count) slab_ = {data + block.count, size - block.count};
    return block;
  }

  void give_back(const Block& block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_[block.count].push_back(block.data);
  }

 private:
  // Blocks are powers of two, of 256 bytes at least: counters of different launches share no cache line. Above a slab
  // they are multiples of it.
  static constexpr int64_t kMinBlock = 64, kLeastOfStream = 1024, kSlab = 64 * 1024;

  bool take_free(Block& block) {
    std::vector<uint32_t*>& free = free_[block.count];
    if (!free.empty()) {
      block.data = free.back();
      free.pop_back();
    } else if (block.count <= slab_.count) {
      block.data = slab_.data;
      slab_ = {slab_.data + block.count, slab_.count - block.count};
    }
    return block.data != nullptr;
  }

  std::mutex mutex_;
  std::map<Stream, Block> streams_;
  std::map<int64_t, std::vector<uint32_t*>> free_;  // by size
  Block slab_;                                      // what no block was made of yet
};

}  // namespace bnext
