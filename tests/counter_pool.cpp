// Checks csrc/bindings/counter_pool.h with memory of the host in place of a device's. Exits with 1, and says which, at
// the first check that fails.
#include "../csrc/bindings/counter_pool.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <set>
#include <stdexcept>
#include <thread>

using bnext::CounterPool;

#define BNEXT_CHECK(condition)                                     \
  do {                                                             \
    if (!(condition)) {                                            \
      std::fprintf(stderr, "line %d: %s\n", __LINE__, #condition); \
      std::exit(1);                                                \
    }                                                              \
  } while (false)

// Slabs of zeros; freed with the memory, so that a sanitizer sees what lies outside of them.
struct Memory {
  std::vector<std::unique_ptr<uint32_t[]>> slabs;
  std::mutex mutex;

  auto allocate() {
    return [this](int64_t count) {
      const std::lock_guard<std::mutex> lock(mutex);
      slabs.push_back(std::make_unique<uint32_t[]>(count));
      return slabs.back().get();
    };
  }
};

void launches_of_a_stream_share() {
  Memory memory;
  CounterPool pool;
  const auto allocate = memory.allocate();
  uint32_t* first = pool.of_stream({7, 0}, 10, allocate);
  BNEXT_CHECK(pool.of_stream({7, 0}, 1000, allocate) == first);
  BNEXT_CHECK(memory.slabs.size() == 1);
  // Larger than it has: another block, which then serves the small launches too; and the small one is nobody's.
  uint32_t* larger = pool.of_stream({7, 0}, 5000, allocate);
  BNEXT_CHECK(larger != first && pool.of_stream({7, 0}, 10, allocate) == larger);
  std::set<uint32_t*> others;
  for (int i = 0; i < 200; ++i) others.insert(pool.take(1000, allocate).data);
  BNEXT_CHECK(others.size() == 200 && others.count(first) == 0 && others.count(larger) == 0);
}

void streams_and_threads_do_not() {
  Memory memory;
  CounterPool pool;
  const auto allocate = memory.allocate();
  std::set<uint32_t*> blocks;
  for (uint64_t id : {1, 2, 3}) {
    for (uint64_t thread : {0, 1, 2}) blocks.insert(pool.of_stream({id, thread}, 64, allocate));
  }
  BNEXT_CHECK(blocks.size() == 9);
}

// Every counter of a block in use belongs to it alone, and is 0 when it is lent.
void blocks_do_not_overlap() {
  Memory memory;
  CounterPool pool;
  const auto allocate = memory.allocate();
  std::vector<CounterPool::Block> blocks;
  for (int64_t count : {1, 64, 65, 3000, 100000, 7, 70000, 65536, 1, 40000}) {
    const CounterPool::Block block = pool.take(count, allocate);
    BNEXT_CHECK(block.count >= count && block.count < 2 * std::max<int64_t>(64, count));
    for (int64_t i = 0; i < block.count; ++i) BNEXT_CHECK(block.data[i]++ == 0);
    blocks.push_back(block);
  }
  for (const CounterPool::Block& block : blocks) {
    for (int64_t i = 0; i < block.count; ++i) BNEXT_CHECK(--block.data[i] == 0);
    pool.give_back(block);
  }
  // What was given back is lent again before anything is allocated.
  const size_t slabs = memory.slabs.size();
  for (int64_t count : {100000, 70000, 65536, 40000, 3000}) {
    const CounterPool::Block block = pool.take(count, allocate);
    for (int64_t i = 0; i < block.count; ++i) BNEXT_CHECK(block.data[i]++ == 0);
  }
  BNEXT_CHECK(memory.slabs.size() == slabs);
}

void captures_do_not_pile_up() {
  Memory memory;
  CounterPool pool;
  const auto allocate = memory.allocate();
  for (int graph = 0; graph < 10000; ++graph) {
    std::vector<CounterPool::Block> blocks;
    for (int call = 0; call < 100; ++call) blocks.push_back(pool.take(1 + call, allocate));
    for (const CounterPool::Block& block : blocks) pool.give_back(block);
  }
  BNEXT_CHECK(memory.slabs.size() == 1);
}

void a_failed_allocation_changes_nothing() {
  Memory memory;
  CounterPool pool;
  const auto fail = [](int64_t) -> uint32_t* { throw std::runtime_error("out of memory"); };
  for (int i = 0; i < 2; ++i) {
    bool thrown = false;
    try {
      pool.of_stream({1, 0}, 64, fail);
    } catch (const std::runtime_error&) {
      thrown = true;
    }
    BNEXT_CHECK(thrown);
  }
  BNEXT_CHECK(pool.of_stream({1, 0}, 64, memory.allocate()) != nullptr);
}

// CUDA may wait, in an allocation, for the thread on which it destroys a graph.
void a_block_comes_back_during_an_allocation() {
  Memory memory;
  CounterPool pool;
  const CounterPool::Block block = pool.take(64, memory.allocate());
  const auto waits = [&](int64_t count) {
    std::thread([&] { pool.give_back(block); }).join();
    return memory.allocate()(count);
  };
  BNEXT_CHECK(pool.take(100000, waits).data != nullptr);
  BNEXT_CHECK(pool.take(64, memory.allocate()).data == block.data);
}

// Each takes, marks, checks and gives back; and all ask for the same stream, which has one block in the end.
void threads_at_once() {
  Memory memory;
  CounterPool pool;
  std::vector<std::thread> threads;
  std::vector<uint32_t*> of_stream(8);
  for (uint32_t id = 1; id <= 8; ++id) {
    threads.emplace_back([&, id] {
      for (int i = 0; i < 2000; ++i) {
        const CounterPool::Block block = pool.take(1 + i % 300, memory.allocate());
        for (int64_t k = 0; k < block.count; ++k) block.data[k] += id;
        for (int64_t k = 0; k < block.count; ++k) {
          BNEXT_CHECK(block.data[k] == id);
          block.data[k] = 0;
        }
        pool.give_back(block);
        of_stream[id - 1] = pool.of_stream({1, 0}, 1 + i, memory.allocate());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (uint32_t* block : of_stream) BNEXT_CHECK(block == of_stream[0]);
}

int main() {
  launches_of_a_stream_share();
  streams_and_threads_do_not();
  blocks_do_not_overlap();
  captures_do_not_pile_up();
  a_failed_allocation_changes_nothing();
  a_block_comes_back_during_an_allocation();
  threads_at_once();
}
