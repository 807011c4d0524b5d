// Who runs when: blocks on OS threads, their threads on fibers, one of them at a time.
#include <pthread.h>
#include <semaphore.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <numeric>
#include <thread>

#include "internal.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {

Thread* current = nullptr;
const Launch* launched = nullptr;

// ---- Order ---------------------------------------------------------------------------------------

// Who holds it runs; everybody else waits for theirs.
class Baton {
 public:
  Baton() { sem_init(&given_, 0, 0); }
  void give() { sem_post(&given_); }
  void wait() {
    while (sem_wait(&given_) != 0) {
    }
  }

 private:
  sem_t given_;
};

// A resident block with the OS thread that runs its fibers.
struct Slot : Block {
  enum class Order { oldest, newest, any };
  Baton baton;
  Context own;                      // the OS thread's stack
  std::vector<const char*> stacks;  // of its fibers
  bool fresh;                       // has a block to begin
  Order order;                      // in which threads take turns
};

static std::vector<Slot*> slots;  // of all launches so far
static size_t resident;           // how many of them this one uses
static std::vector<Gang> gangs;   // resident ones
static std::vector<uint64_t> gang_order;
static uint64_t gangs_begun, gangs_done;
static Baton host_baton;
static uint64_t spins;                // turns that found a block all asleep, since a rendezvous or an exit
constexpr uint64_t kMostSpins = 200;  // for each block

static uint64_t seed = [] {
  const char* value = getenv("SIMT_SEED");
  return value ? strtoull(value, nullptr, 10) : 0;
}();
static uint64_t random_state;

void set_seed(uint64_t value) { seed = value; }

static uint64_t random_below(uint64_t bound) {  // splitmix64
  uint64_t z = random_state += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return (z ^ z >> 31) % bound;
}

static bool runnable(const Slot& slot) { return slot.fresh || !slot.ready.empty() || !slot.asleep.empty(); }

static Slot* another_runnable(const Slot& self) {
  const size_t at = std::find(slots.begin(), slots.end(), &self) - slots.begin();
  const size_t skip = seed ? random_below(resident) : 0;
  for (size_t i = 0; i < resident; ++i) {
    Slot* other = slots[(at + 1 + skip + i) % resident];
    if (other != &self && runnable(*other)) return other;
  }
  return nullptr;
}

static void hand_to(Slot& other, Slot& self) {
  other.baton.give();
  self.baton.wait();
}

static Slot& slot_of(const Thread& thread) { return static_cast<Slot&>(*thread.block); }

static Thread* take_ready(Slot& slot) {
  auto& ready = slot.ready;
  if (ready.empty()) return nullptr;
  if (slot.order == Slot::Order::oldest) {
    Thread* thread = ready.front();
    ready.pop_front();
    return thread;
  }
  if (slot.order == Slot::Order::any) std::swap(ready[random_below(ready.size())], ready.back());
  Thread* thread = ready.back();
  ready.pop_back();
  return thread;
}

// What every live thread waits for, one line for each call.
[[noreturn]] static void deadlock(const char* why) {
  std::map<const void*, std::vector<const Thread*>> waits;  // by the call's address
  for (size_t i = 0; i < resident; ++i) {
    for (const Thread& t : slots[i]->threads) {
      if (t.state != Thread::State::exited) waits[t.pc].push_back(&t);
    }
  }
  std::string message = why;
  for (const auto& [pc, threads] : waits) {
    message += text("\n  %zu thread%s, as %s, in %s\n    ", threads.size(), threads.size() == 1 ? "" : "s",
                    describe(*threads[0]).c_str(), threads[0]->call.name);
    message += describe_code(pc);
  }
  current = nullptr;  // nobody's fault in particular
  fail("deadlock", message);
}

void wake(Thread& thread) {
  thread.state = Thread::State::ready;
  thread.block->ready.push_back(&thread);
}

// Nobody in the block is ready: lets the others run, then wakes whoever sleeps.
static void idle(Slot& slot) {
  Slot* other = another_runnable(slot);
  if (!slot.asleep.empty() && ++spins > kMostSpins * resident) {
    deadlock("nothing happens but spinning in __nanosleep");
  }
  if (slot.asleep.empty() && !other) deadlock("every thread waits");
  if (other) hand_to(*other, slot);
  for (Thread* thread : slot.asleep) wake(*thread);
  slot.asleep.clear();
}

static Thread& next_of(Slot& slot) {
  if (seed && resident > 1 && random_below(64) == 0) {
    if (Slot* other = another_runnable(slot)) hand_to(*other, slot);
  }
  Thread* next;
  while (!(next = take_ready(slot))) idle(slot);
  current = next;
  threadIdx = next->index;
  blockIdx = slot.index;
  return *next;
}

void schedule() {
  Thread& self = *current;
  Thread& next = next_of(slot_of(self));
  if (&next != &self) switch_context(self.context, next.context);
}

static void yield() {
  wake(*current);
  schedule();
}

void preempt() {
  if (seed && random_below(4) == 0) yield();
}

// Waiting costs nothing: the kernel before is over.
void wait_on_dependent_grids() {
  if (!launched->overlapping) return;
  current->pc = __builtin_return_address(0);
  require_capability(90, "waits for the kernel that its launch overlaps");
  current->may_access = true;
}

void sleep() {
  current->state = Thread::State::asleep;
  current->call = {"__nanosleep", "", 0};
  current->pc = __builtin_return_address(0);
  slot_of(*current).asleep.push_back(current);
  schedule();
}

void note_progress() { spins = 0; }

// ---- Blocks and launches -------------------------------------------------------------------------

static uint3 index_in(dim3 extent, uint64_t i) {
  return {static_cast<unsigned>(i % extent.x), static_cast<unsigned>(i / extent.x % extent.y),
          static_cast<unsigned>(i / extent.x / extent.y)};
}

// The first and only function of a fiber.
static void thread_main() {
  enter_context();
  launched->bound.invoke(launched->bound.data);
  Thread& self = *current;
  Slot& slot = slot_of(self);
  check_copies();
  self.pc = nullptr;
  auto leaves = [&](const Thread& waiting) { fail("exited thread", "exits, but " + waits(waiting)); };
  if (slot.barrier.arrived > 0) leaves(*slot.barrier.first);
  if (slot.gang->barrier.arrived > 0) leaves(*slot.gang->barrier.first);
  for (unsigned i = self.id - self.lane; i < slot.threads.size() && i < self.id - self.lane + kWarp; ++i) {
    const Thread& other = slot.threads[i];
    if (other.state == Thread::State::in_warp_call && other.mask >> self.lane & 1) leaves(other);
  }
  self.state = Thread::State::exited;
  spins = 0;
  if (++slot.exited == slot.threads.size()) {
    switch_context(self.context, slot.own, true);
  } else {
    switch_context(self.context, next_of(slot).context, true);
  }
}

// On the OS thread of the slot.
static void run_block(Slot& slot) {
  if (static_shared_bytes > 0) memset(slot.static_shared, 0xff, static_shared_bytes);  // else it is null
  memset(slot.dynamic_shared, 0xff, launched->dynamic_shared);
  if constexpr (race::enabled) race::begin_block(slot);
  switch_context(slot.own, next_of(slot).context);
}

static void begin_gang(Gang& gang) {
  const uint64_t id = seed ? gang_order[gangs_begun] : gangs_begun;
  ++gangs_begun;
  gang.exited = 0;
  gang.barrier = {};
  for (size_t rank = 0; rank < gang.blocks.size(); ++rank) {
    Slot& slot = static_cast<Slot&>(*gang.blocks[rank]);
    slot.linear = id * gang.blocks.size() + rank;
    slot.index = index_in(launched->grid, slot.linear);
    slot.gang = &gang;
    slot.exited = 0;
    slot.barrier = {};
    slot.order = seed ? static_cast<Slot::Order>(random_below(3)) : Slot::Order::oldest;
    slot.fresh = true;
    slot.threads.resize(launched->block.count());
    for (size_t i = slot.stacks.size(); i < slot.threads.size(); ++i) slot.stacks.push_back(new_stack());
    for (size_t i = 0; i < slot.threads.size(); ++i) {
      Thread& thread = slot.threads[i];
      thread = {};
      thread.context.stack = slot.stacks[i];
      thread.context.bytes = kStackBytes;
      prepare(thread.context, thread_main);
      thread.block = &slot;
      thread.may_access = !launched->overlapping;
      thread.index = index_in(launched->block, i);
      thread.id = static_cast<unsigned>(i);
      thread.lane = thread.id % kWarp;
      wake(thread);
    }
  }
}

// An OS thread: runs the blocks that come to its slot.
static void work(Slot& slot) {
  slot.static_shared = own_static_shared();
  pthread_attr_t attributes;
  void* stack;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &slot.own.bytes);
  pthread_attr_destroy(&attributes);
  slot.own.stack = static_cast<char*>(stack);
  host_baton.give();
  for (;;) {
    slot.baton.wait();
    while (slot.fresh) {
      slot.fresh = false;
      run_block(slot);
      current = nullptr;
      if (++slot.gang->exited < slot.gang->blocks.size()) continue;
      ++gangs_done;
      if (gangs_begun < gang_order.size()) begin_gang(*slot.gang);
      if (!seed && another_runnable(slot)) break;  // the next in order
    }
    Slot* other = another_runnable(slot);
    if (!other && gangs_done < gang_order.size()) deadlock("every thread waits");
    (other ? other->baton : host_baton).give();
  }
}

void run(const Launch& launch) {
  static uint64_t launches = 0;
  random_state = seed * 1000003 + launches++;
  launched = &launch;
  blockDim = launch.block;
  gridDim = launch.grid;

  gang_order.resize(launch.grid.count() / launch.gang);
  std::iota(gang_order.begin(), gang_order.end(), 0);
  if (seed) {
    for (size_t i = gang_order.size(); i > 1; --i) std::swap(gang_order[i - 1], gang_order[random_below(i)]);
  }
  gangs_begun = gangs_done = 0;
  spins = 0;

  gangs.assign(std::clamp<uint64_t>(launch.room / launch.gang, 1, gang_order.size()), {});
  resident = gangs.size() * launch.gang;
  while (slots.size() < resident) {
    slots.push_back(new Slot());
    std::thread(work, std::ref(*slots.back())).detach();
    host_baton.wait();
  }
  std::vector<Block*> blocks(slots.begin(), slots.begin() + resident);
  for (Block* block : blocks) {
    block->dynamic_shared = static_cast<char*>(allocate(launch.dynamic_shared, "dynamic shared memory"));
  }
  if constexpr (race::enabled) race::begin_launch(blocks);
  for (size_t i = 0; i < gangs.size(); ++i) {
    gangs[i].blocks.assign(blocks.begin() + i * launch.gang, blocks.begin() + (i + 1) * launch.gang);
    begin_gang(gangs[i]);
  }
  slots[0]->baton.give();
  host_baton.wait();

  check_guards();
  for (Block* block : blocks) release(block->dynamic_shared);
  launched = nullptr;
}

}  // namespace simt
