// Execution: fibers, rendezvous, launches, memory for tests, reports.
#include <limits.h>
#include <link.h>
#include <pthread.h>
#include <semaphore.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <numeric>
#include <thread>

#include "runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN 1
#endif
#endif

#if defined(SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
// Fibers and parked OS threads never end, and what they hold is no leak.
extern "C" const char* __asan_default_options() { return "detect_leaks=0"; }
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {

Thread* current = nullptr;
const Launch* launched = nullptr;

// ---- Switching stacks ----------------------------------------------------------------------------

#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)

// Saves what a callee must preserve, swaps stacks, restores. ucontext would make a system call.
extern "C" void simt_switch(void** from, void* to);
asm(R"(
.text
.globl simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, . - simt_switch
)");

static void prepare(Context& context, void (*entry)()) {
  // Six registers, the entry's address, and a null return address that aligns its stack.
  void** top = reinterpret_cast<void**>(const_cast<char*>(context.stack) + context.bytes) - 8;
  std::fill(top, top + 8, nullptr);
  top[6] = reinterpret_cast<void*>(entry);
  context.position = top;
}

#else
#include <ucontext.h>

// A ucontext lies at the top of its stack; an OS thread's own is in the frame that switches away.
static void simt_switch(void** from, void* to) {
  ucontext_t here;
  *from = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to));
}

static void prepare(Context& context, void (*entry)()) {
  char* top = const_cast<char*>(context.stack) + context.bytes - 2 * sizeof(ucontext_t);
  auto* start = reinterpret_cast<ucontext_t*>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{63});
  getcontext(start);
  start->uc_stack.ss_sp = const_cast<char*>(context.stack);
  start->uc_stack.ss_size = reinterpret_cast<char*>(start) - context.stack;
  start->uc_link = nullptr;
  makecontext(start, entry, 0);
  context.position = start;
}

#endif

// `last`: nobody will come back to `from`.
static void switch_context(Context& from, const Context& to, bool last = false) {
#if defined(SIMT_ASAN)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.sanitizer, to.stack, to.bytes);
#else
  (void)last;
#endif
  simt_switch(&from.position, to.position);
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(from.sanitizer, nullptr, nullptr);
#endif
}

static const char* new_stack() {
  constexpr size_t guard = 4096;
  void* p =
      mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED || mprotect(p, guard, PROT_NONE) != 0) fail("out of memory", "cannot map another stack");
  return static_cast<char*>(p) + guard;
}

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

static void wake(Thread& thread) {
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

// Runs whoever is next, and returns when the current thread, which the caller has put where it waits,
// is next again.
static void schedule() {
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

void sleep() {
  current->state = Thread::State::asleep;
  current->call = {"__nanosleep", "", 0};
  current->pc = __builtin_return_address(0);
  slot_of(*current).asleep.push_back(current);
  schedule();
}

// ---- Rendezvous ----------------------------------------------------------------------------------

static bool operator==(const Call& a, const Call& b) {
  return a.line == b.line && strcmp(a.name, b.name) == 0 && strcmp(a.file, b.file) == 0;
}

static std::string describe(const Call& call) { return text("%s at %s:%d", call.name, call.file, call.line); }

static std::string waits(const Thread& t) { return describe(t) + " waits in " + describe(t.call); }

// The current thread arrives at a barrier of `count` blocks; returns how many came with a vote.
static unsigned arrive(Barrier& barrier, Block* const* blocks, size_t count, Call call, bool vote, const void* pc) {
  Thread& self = *current;
  self.pc = pc;
  for (size_t i = 0; i < count; ++i) {
    if (blocks[i]->exited == 0) continue;
    for (const Thread& t : blocks[i]->threads) {
      if (t.state != Thread::State::exited) continue;
      fail("exited thread", "calls " + describe(call) + ", but " + describe(t) + " has exited");
    }
  }
  if (barrier.arrived == 0) {
    barrier.first = &self;
    barrier.votes = 0;
  } else if (!(call == barrier.first->call)) {
    fail("divergence", "calls " + describe(call) + ", but " + waits(*barrier.first));
  }
  barrier.votes += vote;
  self.state = Thread::State::at_barrier;
  self.call = call;
  if (++barrier.arrived < count * launched->block.count()) {
    schedule();
    return barrier.result;
  }
  barrier.arrived = 0;
  barrier.result = barrier.votes;
  spins = 0;
  if constexpr (race::enabled) race::sync_blocks({blocks, blocks + count});
  for (size_t i = 0; i < count; ++i) {
    for (Thread& t : blocks[i]->threads) wake(t);
  }
  schedule();
  return barrier.result;
}

unsigned sync_block(Call call, bool predicate) {
  Block* block = current->block;
  return arrive(block->barrier, &block, 1, call, predicate, __builtin_return_address(0));
}

void sync_cluster(Call call) {
  Gang& gang = *current->block->gang;
  arrive(gang.barrier, gang.blocks.data(), gang.blocks.size(), call, false, __builtin_return_address(0));
}

enum class WarpCall { order, ballot, shuffle };

// The current lane arrives at a call of the lanes of `mask`. The last of them settles it for all.
static uint64_t arrive(WarpCall kind, Call call, unsigned mask, uint64_t brings, unsigned source, const void* pc) {
  Thread& self = *current;
  self.pc = pc;
  std::vector<Thread>& threads = self.block->threads;
  Thread* lanes = &threads[self.id - self.lane];
  const unsigned width = std::min<size_t>(kWarp, threads.size() - (self.id - self.lane));
  auto wrong = [&](const std::string& what) {
    fail("wrong mask", text("calls %s with mask 0x%08x, ", describe(call).c_str(), mask) + what);
  };

  if (!(mask >> self.lane & 1)) wrong("which does not name the calling lane");
  if (width < kWarp && mask >> width) wrong("which names lanes that the block does not have");
  if (kind == WarpCall::shuffle && !(mask >> source & 1)) {
    wrong(text("and reads lane %u, which the mask does not name", source));
  }
  self.call = call;
  self.mask = mask;
  self.brings = brings;
  self.source = source;
  self.state = Thread::State::in_warp_call;
  bool complete = true;
  for (unsigned i = 0; i < width; ++i) {
    if (!(mask >> i & 1)) continue;
    const Thread& other = lanes[i];
    if (other.state == Thread::State::exited) {
      fail("exited thread",
           text("calls %s with mask 0x%08x, but ", describe(call).c_str(), mask) + describe(other) + " has exited");
    }
    const bool meets = other.state == Thread::State::in_warp_call;
    if (meets && other.mask != mask && other.mask >> self.lane & 1) {
      wrong("but " + waits(other) + text(" with mask 0x%08x", other.mask));
    }
    if (other.state == Thread::State::at_barrier || (meets && other.mask == mask && !(other.call == call))) {
      fail("divergence", "calls " + describe(call) + ", but " + waits(other));
    }
    // A lane that waits with other lanes, not with this one, may still come.
    complete = complete && meets && other.mask == mask;
  }
  if (!complete) {
    schedule();
    return self.gets;
  }
  spins = 0;
  unsigned votes = 0;
  for (unsigned i = 0; i < width; ++i) {
    if ((mask >> i & 1) && lanes[i].brings) votes |= 1u << i;
  }
  for (unsigned i = 0; i < width; ++i) {
    if (mask >> i & 1) lanes[i].gets = kind == WarpCall::shuffle ? lanes[lanes[i].source].brings : votes;
  }
  if constexpr (race::enabled) {
    if (kind == WarpCall::order) race::sync_lanes(*lanes, mask);
  }
  for (unsigned i = 0; i < width; ++i) {
    if (mask >> i & 1) wake(lanes[i]);
  }
  schedule();
  return self.gets;
}

void sync_warp(Call call, unsigned mask) { arrive(WarpCall::order, call, mask, 0, 0, __builtin_return_address(0)); }

unsigned ballot(Call call, unsigned mask, bool predicate) {
  return static_cast<unsigned>(arrive(WarpCall::ballot, call, mask, predicate, 0, __builtin_return_address(0)));
}

uint64_t shuffle(Call call, unsigned mask, uint64_t value, unsigned source) {
  return arrive(WarpCall::shuffle, call, mask, value, source, __builtin_return_address(0));
}

unsigned shuffle_source(Call call, Shuffle mode, unsigned operand, int width) {
  if (width <= 0 || width > 32 || (width & (width - 1))) {
    fail("wrong width",
         "calls " + describe(call) + text(" with width %d, which is not a power of two up to 32", width));
  }
  const unsigned lane = current->lane, group = lane & ~(width - 1u), last = group + width - 1;
  switch (mode) {
    case Shuffle::index: return group + (operand & (width - 1));
    case Shuffle::up: return lane - group >= operand ? lane - operand : lane;
    case Shuffle::down: return operand <= last - lane ? lane + operand : lane;
    case Shuffle::exclusive: return (lane ^ operand) <= last ? lane ^ operand : lane;
  }
  return lane;
}

void fence(Scope scope) {
  if constexpr (race::enabled) race::fence(scope);
  else (void)scope;
}

// ---- Shared memory -------------------------------------------------------------------------------

// The executable's thread storage in the calling OS thread.
struct Storage {
  char* begin;
  size_t bytes;
};

static Storage thread_storage() {
  Storage storage = {};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          if (info->dlpi_phdr[i].p_type == PT_TLS) {
            *static_cast<Storage*>(out) = {static_cast<char*>(info->dlpi_tls_data), info->dlpi_phdr[i].p_memsz};
          }
        }
        return 1;  // the executable itself comes first
      },
      &storage);
  return storage;
}

const size_t static_shared_bytes = thread_storage().bytes;

void wait_on_dependent_grids() { current->may_access = true; }

void* dynamic_shared() { return current->block->dynamic_shared; }

unsigned cluster_rank() { return static_cast<unsigned>(current->block->linear % launched->gang); }

void* map_shared(const void* address, unsigned rank) {
  const Block& self = *current->block;
  const char* p = static_cast<const char*>(address);
  if (rank >= self.gang->blocks.size()) {
    fail("wrong rank", text("maps shared memory of rank %u in a cluster of %zu", rank, self.gang->blocks.size()));
  }
  const Block& other = *self.gang->blocks[rank];
  if (p >= self.static_shared && p < self.static_shared + static_shared_bytes) {
    return other.static_shared + (p - self.static_shared);
  }
  if (p >= self.dynamic_shared && p < self.dynamic_shared + launched->dynamic_shared) {
    return other.dynamic_shared + (p - self.dynamic_shared);
  }
  fail("wrong address", "maps an address that is not in its shared memory");
}

// ---- Blocks and launches -------------------------------------------------------------------------

static uint3 index_in(dim3 extent, uint64_t i) {
  return {static_cast<unsigned>(i % extent.x), static_cast<unsigned>(i / extent.x % extent.y),
          static_cast<unsigned>(i / extent.x / extent.y)};
}

// The first and only function of a fiber.
static void thread_main() {
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  launched->invoke(launched->bound);
  Thread& self = *current;
  Slot& slot = slot_of(self);
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
  memset(slot.static_shared, 0xff, static_shared_bytes);
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
      thread.may_access = launched->start == Start::in_order;
      thread.index = index_in(launched->block, i);
      thread.id = static_cast<unsigned>(i);
      thread.lane = thread.id % kWarp;
      wake(thread);
    }
  }
}

// An OS thread: runs the blocks that come to its slot.
static void work(Slot& slot) {
  slot.static_shared = thread_storage().begin;
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
    }
    Slot* other = another_runnable(slot);
    if (!other && gangs_done < gang_order.size()) deadlock("every thread waits");
    (other ? other->baton : host_baton).give();
  }
}

static int check(const Launch&);
static void check_guards();

int run(const Launch& launch) {
  if (int error = check(launch)) return error;
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

  // In a random order, several blocks are resident even where they need not be.
  gangs.assign(std::min<uint64_t>(gang_order.size(), seed && launch.gang < 4 ? 4 / launch.gang : 1), {});
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
  return cudaSuccess;
}

// ---- The device ----------------------------------------------------------------------------------

static int multiprocessors = 4;
constexpr int kThreadsPerMultiprocessor = 2048, kBlocksPerMultiprocessor = 32;
constexpr int kSharedPerMultiprocessor = 228 * 1024, kSharedPerBlock = 227 * 1024, kSharedWithoutOptIn = 48 * 1024;

constexpr int kL2Bytes = 50 << 20;
constexpr int kSharedReserved = 1024;  // of each block

static std::unordered_map<const void*, size_t> shared_opt_in;
static std::unordered_map<const void*, bool> large_clusters;

bool allows_large_clusters(const void* kernel) { return large_clusters[kernel]; }

void set_multiprocessors(int count) { multiprocessors = count; }

static int check(const Launch& l) {
  if (current) fail("nested launch", "launches a kernel from a kernel");
  const dim3 g = l.grid, b = l.block;
  if (g.count() == 0 || g.x > 0x7fffffff || g.y > 65535 || g.z > 65535) return cudaErrorInvalidConfiguration;
  if (b.count() == 0 || b.count() > 1024 || b.z > 64) return cudaErrorInvalidConfiguration;
  const auto opted = shared_opt_in.find(l.kernel);
  const size_t shared = opted == shared_opt_in.end() ? kSharedWithoutOptIn : opted->second;
  if (l.dynamic_shared > shared) return cudaErrorInvalidValue;
  // Static shared memory and registers take their part too, but are not known here.
  const uint64_t warps = (b.count() + kWarp - 1) / kWarp;
  const uint64_t fit = std::min<uint64_t>({kBlocksPerMultiprocessor, kThreadsPerMultiprocessor / (warps * kWarp),
                                           kSharedPerMultiprocessor / (l.dynamic_shared + kSharedReserved)});
  if (l.gang > fit * multiprocessors) return cudaErrorCooperativeLaunchTooLarge;
  return cudaSuccess;
}

}  // namespace simt

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorCooperativeLaunchTooLarge: return "too many blocks in cooperative launch";
  }
  return "unrecognized error code";
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = simt::multiprocessors; break;
    case cudaDevAttrL2CacheSize: *value = simt::kL2Bytes; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = simt::kSharedPerMultiprocessor; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = simt::kSharedPerBlock; break;
  }
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    simt::large_clusters[kernel] = value != 0;
    return cudaSuccess;
  }
  if (value < 0 || value > simt::kSharedPerBlock) return cudaErrorInvalidValue;
  simt::shared_opt_in[kernel] = value;
  return cudaSuccess;
}

namespace simt {

// ---- Memory --------------------------------------------------------------------------------------

struct Allocation {
  std::string name;
  size_t bytes;
};

constexpr size_t kGuard = 64;
constexpr unsigned char kGuardByte = 0xa5;
static std::map<const char*, Allocation> allocations;

void* allocate(size_t bytes, const char* name) {
  const size_t all = bytes + 2 * kGuard;
  char* base = race::enabled ? race::reserve(all) : static_cast<char*>(malloc(all));
  if (!base) fail("out of memory", text("cannot allocate %zu bytes for %s", bytes, name));
  char* p = base + kGuard;
  memset(base, kGuardByte, all);
  memset(p, 0xff, bytes);
  allocations[p] = {name, bytes};
#if defined(SIMT_ASAN)
  ASAN_POISON_MEMORY_REGION(base, kGuard);
  ASAN_POISON_MEMORY_REGION(p + bytes, kGuard);
#endif
  if constexpr (race::enabled) race::allocated(p, bytes);
  return p;
}

void release(void* address) {
  char* p = static_cast<char*>(address);
  const size_t bytes = allocations.at(p).bytes;
  allocations.erase(p);
#if defined(SIMT_ASAN)
  ASAN_UNPOISON_MEMORY_REGION(p - kGuard, bytes + 2 * kGuard);
#endif
  if constexpr (race::enabled) {
    race::released(p, bytes);
    if (allocations.empty()) race::reset();
  } else {
    free(p - kGuard);
  }
}

// Without a sanitizer, writes outside an allocation are found after the kernel.
static void check_guards() {
#if !defined(SIMT_ASAN)
  for (const auto& [p, allocation] : allocations) {
    for (size_t i = 0; i < 2 * kGuard; ++i) {
      const char* guard = i < kGuard ? p - kGuard + i : p + allocation.bytes + (i - kGuard);
      if (static_cast<unsigned char>(*guard) != kGuardByte) {
        fail("out of bounds", "the kernel wrote " + describe_global(guard));
      }
    }
  }
#endif
}

void written(const void* address, size_t bytes) {
  if constexpr (race::enabled) race::written(static_cast<const char*>(address), bytes);
  else (void)address, (void)bytes;
}

size_t count_unwritten(const void* address, size_t bytes) {
  if constexpr (race::enabled) return race::count_unwritten(static_cast<const char*>(address), bytes);
  (void)address, (void)bytes;
  return 0;
}

// ---- Reports -------------------------------------------------------------------------------------

std::string text(const char* format, ...) {
  char buffer[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(buffer, sizeof(buffer), format, arguments);
  va_end(arguments);
  return buffer;
}

std::string describe(const Thread& t) {
  return text("thread (%u,%u,%u) of block (%u,%u,%u)", t.index.x, t.index.y, t.index.z, t.block->index.x,
              t.block->index.y, t.block->index.z);
}

std::string describe_code(const void* pc) {
  char path[PATH_MAX + 1] = {};
  if (readlink("/proc/self/exe", path, PATH_MAX) < 0) return "?";
  // The byte before a return address is part of the call.
  const std::string address = text("%p", static_cast<const void*>(static_cast<const char*>(pc) - 1));
  const std::string command = std::string("addr2line -Cfipe '") + path + "' " + address;
  std::string out;
  char line[4096];
  FILE* pipe = popen(command.c_str(), "r");
  while (pipe && fgets(line, sizeof(line), pipe)) {
    if (strstr(line, "/simt.h:")) continue;  // the intrinsic itself
    const char* inlined = strstr(line, "(inlined by) ");
    if (char* end = strpbrk(line, "\n")) *end = 0;
    if (char* end = strstr(line, " (discriminator")) *end = 0;
    out += (out.empty() ? "" : "\n    in ") + std::string(inlined ? inlined + strlen("(inlined by) ") : line);
  }
  if (pipe) pclose(pipe);
  return out.empty() ? text("%p", pc) : out;
}

std::string describe_global(const char* address) {
  auto say = [](long long offset, const char* where, const Allocation& a) {
    return text("%lld bytes %s '%s' of %zu bytes", offset, where, a.name.c_str(), a.bytes);
  };
  auto next = allocations.upper_bound(address);
  if (next != allocations.begin()) {
    const auto& [p, allocation] = *std::prev(next);
    if (address < p + allocation.bytes) return say(address - p, "into", allocation);
    if (address < p + allocation.bytes + kGuard)
      return say(address - p - allocation.bytes, "past the end of", allocation);
  }
  if (next != allocations.end() && address >= next->first - kGuard) {
    return say(next->first - address, "before", next->second);
  }
  return "";
}

void fail(const char* kind, const std::string& message) {
  fflush(stdout);
  const std::string who = current ? describe(*current) + " " : "";
  fprintf(stderr, "simt: %s: %s%s\n", kind, who.c_str(), message.c_str());
  if (current && current->pc) fprintf(stderr, "  at %s\n", describe_code(current->pc).c_str());
  if (launched) {
    const char* entry = static_cast<const char*>(launched->kernel) + 1;  // as a return address would be
    fprintf(stderr, "  in kernel %s\n", describe_code(entry).c_str());
  }
  fflush(stderr);
  _exit(66);
}

}  // namespace simt
