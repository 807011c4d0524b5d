// The race build: kernels are compiled with -fsanitize=thread, but the calls that this puts before
// every memory access come here instead of to libtsan, because a GPU orders accesses differently from
// pthreads. Nothing in this file is itself instrumented.
//
// Each byte of device memory has a shadow: who wrote it last and who has read it since, each with the
// clock of that thread. Clocks go up at synchronisation, and a thread knows up to which clock the
// others' accesses happened before its own:
//   - of its block, everything before the last barrier; of its warp, what __syncwarp ordered. Shuffles
//     and votes order no memory (CUDA C++ Programming Guide, "Warp Shuffle Functions");
//   - of other blocks, what it acquired: a relaxed atomic or volatile write after a fence releases what
//     the writer knew at the fence, its block's accesses before a barrier included (fences are
//     cumulative); a relaxed read that sees it, followed by a fence, acquires that. Barriers and
//     __syncwarp pass on what was acquired, and what a fence has yet to acquire;
//   - everything before the launch, and before a cluster barrier in the cluster.
// An access that conflicts with one not known is a race, unless both are atomic. Block-scope fences
// order through flags in shared memory only.
//
// Limits: an access outside one __shared__ variable but inside another is an error only where the
// array's type shows it (-fsanitize=bounds); of the warps that read a byte since it was written, about
// kMostReaders are remembered; volatile data counts as atomic, even where no fence publishes it.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>

#include "internal.h"

extern "C" char __executable_start, _end;

namespace simt {

// Code addresses fit: the executable is linked at a fixed low address. The top bit says "atomic".
constexpr uint32_t kAtomic = 0x80000000;
constexpr uint32_t kUnallocated = 0, kUnwritten = 1, kByHost = 2;  // in place of a writer's code

struct Writer {
  uint32_t thread, clock, pc;  // the thread's number in the grid
};

// Lanes of one warp that read at the same clock.
struct Readers { uint32_t warp, clock, pc, lanes; };

struct ShadowByte {
  Writer writer;
  Readers readers;
  uint32_t more;  // index into more_readers, or 0
};

namespace race {
namespace {

constexpr size_t kArenaBytes = size_t{8} << 30;
constexpr size_t kMostReaders = 64;
constexpr uint64_t kWholeBlock = uint64_t{1} << 32;  // key of a block in Knowledge; others are threads

char* arena;
ShadowByte* shadow;
size_t arena_used;
const char *dynamic_begin, *dynamic_end;  // within the arena
std::vector<Block*> residents;
uint32_t top;           // the highest clock so far
uint32_t launch_floor;  // everything before it happened before the launch
std::vector<std::vector<Readers>> more_readers;
std::unordered_map<uintptr_t, std::shared_ptr<const Knowledge>> releases;  // by the address of the flag

uint32_t threads_per_block() { return static_cast<uint32_t>(launched->block.count()); }
uint32_t warps_per_block() { return (threads_per_block() + kWarp - 1) / kWarp; }
uint32_t number_of(const Thread& t) { return static_cast<uint32_t>(t.block->linear * threads_per_block() + t.id); }

template <class T>
T* map_zeros(size_t count) {
  void* p =
      mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) fail("out of memory", "cannot map the shadow memory");
  return static_cast<T*>(p);
}

// ---- What happened before the current thread's present -------------------------------------------

void learn(Knowledge& into, const Knowledge& from) {
  for (const auto& [who, clock] : from) {
    uint32_t& known = into[who];
    known = std::max(known, clock);
  }
}

void add_seen(std::vector<Seen>& into, const Seen& seen) {
  for (const Seen& s : into) {
    if (s.knowledge == seen.knowledge) return;
  }
  into.push_back(seen);
}

bool knows(const Knowledge& known, uint64_t who, uint32_t clock) {
  if (known.empty()) return false;
  auto found = known.find(who);
  return found != known.end() && clock <= found->second;
}

bool happened_before(uint32_t block, uint32_t id, uint32_t clock) {
  const Thread& self = *current;
  const Block& own = *self.block;
  if (block == own.linear) {
    if (clock < own.clocks.barrier || id == self.id) return true;
    if (id / kWarp == self.id / kWarp && clock <= self.clocks.lanes[id % kWarp]) return true;
  }
  const uint64_t thread = uint64_t{block} * threads_per_block() + id;
  return knows(own.clocks.known, kWholeBlock | block, clock) || knows(own.clocks.known, thread, clock) ||
         knows(self.clocks.known, kWholeBlock | block, clock) || knows(self.clocks.known, thread, clock);
}

bool happened_before(const Writer& w) {
  if (w.clock < launch_floor) return true;
  return happened_before(w.thread / threads_per_block(), w.thread % threads_per_block(), w.clock);
}

bool happened_before(const Readers& r) {
  if (r.clock < launch_floor) return true;
  const uint32_t block = r.warp / warps_per_block(), first = r.warp % warps_per_block() * kWarp;
  for (uint32_t lanes = r.lanes; lanes; lanes &= lanes - 1) {
    if (!happened_before(block, first + __builtin_ctz(lanes), r.clock)) return false;
  }
  return true;
}

void tick(Thread& t) { top = std::max(top, ++t.clocks.now); }

// All that the current thread knows, itself included.
std::shared_ptr<const Knowledge> snapshot() {
  const Thread& self = *current;
  const Block& block = *self.block;
  auto all = std::make_shared<Knowledge>(block.clocks.known);
  learn(*all, self.clocks.known);
  const uint32_t first = number_of(self) - self.lane;
  for (uint32_t i = 0; i < kWarp; ++i) {
    const uint32_t clock = i == self.lane ? self.clocks.now : self.clocks.lanes[i];
    if (clock >= block.clocks.barrier) learn(*all, {{first + i, clock}});
  }
  learn(*all, {{kWholeBlock | block.linear, block.clocks.barrier - 1}});
  return all;
}

// ---- Reports -------------------------------------------------------------------------------------

struct Access {
  const char* address;
  size_t bytes;
  bool reads, writes;
  uint32_t pc;  // with kAtomic
};

const void* code(uint32_t pc) { return reinterpret_cast<const void*>(uintptr_t{pc & ~kAtomic}); }

std::string verb(bool reads, bool writes, uint32_t pc) {
  return std::string(pc & kAtomic ? "atomically " : "") + (reads && writes ? "updates" : writes ? "writes" : "reads");
}

std::string place(const Access& a, const char* at) {
  std::string where = describe_global(at);
  if (where.empty()) where = text("%p, which is in no allocation", static_cast<const void*>(at));
  for (const Block* block : residents) {
    const size_t offset = at - block->static_shared;
    if (at >= block->static_shared && offset < static_shared_bytes) {
      where = text("%zu bytes into the static shared memory of block (%u,%u,%u)", offset, block->index.x,
                   block->index.y, block->index.z);
    }
  }
  return verb(a.reads, a.writes, a.pc) + text(" %zu bytes, ", a.bytes) + where;
}

[[noreturn]] void report(const char* kind, const Access& a, const std::string& message) {
  current->pc = code(a.pc);
  fail(kind, message);
}

[[noreturn]] void report_race(const Access& a, const char* at, uint32_t thread, const char* did, uint32_t pc) {
  Block block = {};
  Thread other = {};
  block.linear = thread / threads_per_block();
  const dim3 grid = launched->grid, threads = launched->block;
  other.block = &block;
  other.id = thread % threads_per_block();
  block.index = {static_cast<unsigned>(block.linear % grid.x), static_cast<unsigned>(block.linear / grid.x % grid.y),
                 static_cast<unsigned>(block.linear / grid.x / grid.y)};
  other.index = {other.id % threads.x, other.id / threads.x % threads.y, other.id / threads.x / threads.y};
  report("race", a,
         place(a, at) + "; " + describe(other) + (pc & kAtomic ? " atomically " : " ") + did +
             " it, and nothing orders the two\n  the other at " + describe_code(code(pc)));
}

// ---- Accesses ------------------------------------------------------------------------------------

// The shadow of an address; `birth` is the clock before which the byte belonged to an earlier block.
struct Shadow {
  ShadowByte* bytes;
  uint32_t birth;
};

Shadow shared_of(const Block& block, ShadowByte* bytes, const Access& a) {
  if (block.exited == block.threads.size()) {
    report("exited block", a, verb(a.reads, a.writes, a.pc) + " shared memory of a block that has exited");
  }
  return {bytes, block.clocks.birth};
}

// Memory that needs no checking has no shadow: the thread's own stack, the kernel's arguments, and
// the variables and constants of the program, threadIdx and its like among them.
Shadow find_shadow(const Access& a) {
  const char* p = a.address;
  const Thread& self = *current;
  if (static_cast<size_t>(p - self.context.stack) < self.context.bytes) return {};
  if (static_cast<size_t>(p - arena) < kArenaBytes) {
    ShadowByte* bytes = shadow + (p - arena);
    if (p < dynamic_begin || p >= dynamic_end) return {bytes, 0};
    for (const Block* block : residents) {
      if (static_cast<size_t>(p - block->dynamic_shared) < launched->dynamic_shared) return shared_of(*block, bytes, a);
    }
    return {bytes, 0};
  }
  if (p >= &__executable_start && p < &_end) return {};
  const Block& own = *self.block;
  if (static_cast<size_t>(p - own.static_shared) < static_shared_bytes) {
    return {own.clocks.static_shadow + (p - own.static_shared), own.clocks.birth};
  }
  for (const Block* block : residents) {
    const size_t offset = p - block->static_shared;
    if (offset < static_shared_bytes) return shared_of(*block, block->clocks.static_shadow + offset, a);
  }
  if (static_cast<size_t>(p - static_cast<const char*>(launched->bound.data)) < launched->bound.bytes) return {};
  report("out of bounds", a, verb(a.reads, a.writes, a.pc) + text(" %zu bytes that are not device memory", a.bytes));
}

void add_reader(ShadowByte& byte, const Readers& mine) {
  // Joins the entry of its warp, or takes its place if all that is in it happened before.
  auto takes = [&](Readers& r) {
    if (r.warp != mine.warp) return false;
    if (r.clock == mine.clock && (r.pc & kAtomic) == (mine.pc & kAtomic)) {
      r.lanes |= mine.lanes;
      return true;
    }
    if (!happened_before(r)) return false;
    r = mine;
    return true;
  };
  Readers& first = byte.readers;
  if (first.lanes && takes(first)) return;
  if (!first.lanes || happened_before(first)) {
    first = mine;
    return;
  }
  if (!byte.more) {
    byte.more = static_cast<uint32_t>(more_readers.size());
    more_readers.emplace_back();
  }
  auto& list = more_readers[byte.more];
  for (size_t i = list.size(); i-- > 0;) {
    if (takes(list[i])) return;
  }
  if (list.size() < kMostReaders) list.push_back(mine);
  else list[mine.warp % kMostReaders] = mine;
}

void check_readers(const Access& a, const char* at, const Readers& r) {
  if (!r.lanes || (a.pc & r.pc & kAtomic) || happened_before(r)) return;
  const uint32_t block = r.warp / warps_per_block(), first = r.warp % warps_per_block() * kWarp;
  for (uint32_t lanes = r.lanes; lanes; lanes &= lanes - 1) {
    const uint32_t id = first + __builtin_ctz(lanes);
    if (!happened_before(block, id, r.clock)) report_race(a, at, block * threads_per_block() + id, "reads", r.pc);
  }
}

void check(const Access& a) {
  const Shadow found = find_shadow(a);
  if (!found.bytes) return;
  if (!current->may_access) {
    report("overlap", a,
           place(a, a.address) + ", before wait_on_dependent_grids() in a launch that overlaps the one before");
  }
  const Thread& self = *current;
  const uint32_t thread = number_of(self), clock = self.clocks.now;
  const uint32_t warp = static_cast<uint32_t>(self.block->linear * warps_per_block() + self.id / kWarp);
  Writer ordered = {};  // the last byte's writer: the others' is mostly the same
  for (size_t i = 0; i < a.bytes; ++i) {
    ShadowByte& byte = found.bytes[i];
    Writer& w = byte.writer;
    const char* at = a.address + i;
    if (w.pc == kUnallocated) report("out of bounds", a, place(a, at));
    const bool was_written = w.pc != kUnwritten && w.clock >= found.birth;
    if (a.reads && !was_written) report("uninitialised read", a, place(a, at));
    if (was_written && !(a.pc & w.pc & kAtomic) && memcmp(&w, &ordered, sizeof(w)) != 0) {
      if (!happened_before(w)) report_race(a, at, w.thread, "writes", w.pc);
      ordered = w;
    }
    if (byte.readers.lanes && byte.readers.clock < std::max(launch_floor, found.birth)) {
      byte.readers.lanes = 0;
      byte.more = 0;
    }
    if (!a.writes) {
      add_reader(byte, {warp, clock, a.pc, 1u << self.lane});
      continue;
    }
    check_readers(a, at, byte.readers);
    if (byte.more) {
      for (const Readers& r : more_readers[byte.more]) check_readers(a, at, r);
    }
    w = {thread, clock, a.pc};
    byte.readers.lanes = 0;
    byte.more = 0;
  }
}

bool is_shared(const char* p) {
  return !(p >= arena && p < arena + kArenaBytes) || (p >= dynamic_begin && p < dynamic_end);
}

void synchronise(const char* p, bool reads, bool writes, int order) {
  Thread& self = *current;
  const bool shared = is_shared(p);
  auto& flag = releases[reinterpret_cast<uintptr_t>(p)];
  if (reads && flag) {
    if (order == __ATOMIC_RELAXED || order == __ATOMIC_RELEASE) add_seen(self.clocks.seen, {flag, shared});
    else learn(self.clocks.known, *flag);
  }
  if (!writes) return;
  const bool release = order == __ATOMIC_RELEASE || order == __ATOMIC_ACQ_REL || order == __ATOMIC_SEQ_CST;
  auto released = release ? snapshot() : self.clocks.released[static_cast<int>(shared ? Scope::block : Scope::device)];
  if (release) tick(self);
  if (reads && flag && released) {  // an update continues what the flag released before
    auto both = std::make_shared<Knowledge>(*flag);
    learn(*both, *released);
    flag = both;
  } else if (!reads || released) {
    flag = released;
  }
}

void access(const volatile void* p, size_t bytes, bool reads, bool writes, bool aligned, const void* pc) {
  if (!current) return;
  const Access a = {static_cast<const char*>(const_cast<const void*>(p)), bytes, reads, writes,
                    static_cast<uint32_t>(reinterpret_cast<uintptr_t>(pc))};
  // Of the device's memory: a compiler may clear several members of a local variable by one wide store.
  const bool misaligned = aligned && reinterpret_cast<uintptr_t>(p) % bytes != 0;
  if (misaligned && find_shadow(a).bytes) report("misaligned access", a, place(a, a.address));
  check(a);
}

void atomic_access(const volatile void* p, size_t bytes, bool reads, bool writes, int order, const void* pc) {
  if (!current) return;
  const char* address = static_cast<const char*>(const_cast<const void*>(p));
  check({address, bytes, reads, writes, static_cast<uint32_t>(reinterpret_cast<uintptr_t>(pc)) | kAtomic});
  synchronise(address, reads, writes, order);
}

}  // namespace

// ---- What the other sources tell ---------------------------------------------------------------------------

char* reserve(size_t bytes) {
  if (!arena) {
    arena = map_zeros<char>(kArenaBytes);
    shadow = map_zeros<ShadowByte>(kArenaBytes);
  }
  char* p = arena + arena_used;
  arena_used += (bytes + 255) & ~size_t{255};
  return arena_used <= kArenaBytes ? p : nullptr;
}

void reset() {
  madvise(shadow, arena_used * sizeof(ShadowByte), MADV_DONTNEED);
  arena_used = 0;
}

static void set_all(const char* p, size_t bytes, const ShadowByte& value) {
  std::fill_n(shadow + (p - arena), bytes, value);
}

void allocated(const char* p, size_t bytes) { set_all(p, bytes, {{0, 0, kUnwritten}, {}, 0}); }
void released(const char* p, size_t bytes) { set_all(p, bytes, {}); }
void written(const char* p, size_t bytes) { set_all(p, bytes, {{0, 0, kByHost}, {}, 0}); }

size_t count_unwritten(const char* p, size_t bytes) {
  const ShadowByte* s = shadow + (p - arena);
  return std::count_if(s, s + bytes, [](const ShadowByte& b) { return b.writer.pc == kUnwritten; });
}

void begin_launch(const std::vector<Block*>& resident) {
  if (launched->grid.count() * threads_per_block() >= kWholeBlock) fail("too large", "a grid of 2^32 threads");
  residents = resident;
  launch_floor = ++top;
  releases.clear();
  more_readers.assign(1, {});
  dynamic_begin = resident.front()->dynamic_shared;
  dynamic_end = resident.back()->dynamic_shared + launched->dynamic_shared;
  for (Block* block : resident) {
    if (block->clocks.static_shadow) continue;
    block->clocks.static_shadow = map_zeros<ShadowByte>(static_shared_bytes + 1);
    std::fill_n(block->clocks.static_shadow, static_shared_bytes, ShadowByte{{0, 0, kUnwritten}, {}, 0});
  }
}

void begin_block(Block& block) {
  const uint32_t now = ++top;
  block.clocks = {block.clocks.static_shadow, now, now, {}, {}};
  for (Thread& t : block.threads) t.clocks.now = now;
}

void sync_blocks(const std::vector<Block*>& blocks) {
  for (Block* block : blocks) {
    BlockClocks& clocks = block->clocks;
    for (Thread& t : block->threads) clocks.barrier = std::max(clocks.barrier, t.clocks.now + 1);
    top = std::max(top, clocks.barrier);
    for (Thread& t : block->threads) {
      t.clocks.now = clocks.barrier;
      learn(clocks.known, t.clocks.known);
      t.clocks.known.clear();
      for (const Seen& s : t.clocks.seen) add_seen(clocks.seen, s);
      t.clocks.seen.clear();
    }
  }
  if (blocks.size() == 1) return;
  Knowledge all;
  for (const Block* block : blocks) {
    learn(all, block->clocks.known);
    learn(all, {{kWholeBlock | block->linear, block->clocks.barrier - 1}});
  }
  for (Block* block : blocks) learn(block->clocks.known, all);
}

void sync_lanes(Thread& lane0, unsigned mask) {
  Thread* lanes = &lane0;
  ThreadClocks all = {};
  for (unsigned i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1)) continue;
    ThreadClocks& c = lanes[i].clocks;
    c.lanes[i] = c.now;
    all.now = std::max(all.now, c.now + 1);
    for (unsigned k = 0; k < kWarp; ++k) all.lanes[k] = std::max(all.lanes[k], c.lanes[k]);
    learn(all.known, c.known);
    for (const Seen& s : c.seen) add_seen(all.seen, s);
  }
  top = std::max(top, all.now);
  for (unsigned i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1)) continue;
    ThreadClocks& c = lanes[i].clocks;
    c.now = all.now;
    std::copy_n(all.lanes, kWarp, c.lanes);
    c.known = all.known;
    c.seen = all.seen;
  }
}

void lost(const void* p, size_t bytes, const void* pc) {
  // As a write, after all reads of what was there.
  const Access a = {static_cast<const char*>(p), bytes, false, true,
                    static_cast<uint32_t>(reinterpret_cast<uintptr_t>(pc))};
  check(a);
  const Shadow found = find_shadow(a);
  for (size_t i = 0; found.bytes && i < bytes; ++i) found.bytes[i].writer.pc = kUnwritten;
}

void copied(const Copy& copy) {
  const auto pc = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(copy.pc));
  check({static_cast<const char*>(copy.from), copy.bytes, true, false, pc});
  check({static_cast<const char*>(copy.to), copy.bytes, false, true, pc});
}

void fence(Scope scope) {
  Thread& self = *current;
  auto acquire = [&](std::vector<Seen>& seen) {
    for (const Seen& s : seen) {
      if (s.in_shared || scope == Scope::device) learn(self.clocks.known, *s.knowledge);
    }
  };
  acquire(self.clocks.seen);
  acquire(self.block->clocks.seen);
  if (scope == Scope::device) self.clocks.seen.clear();
  auto all = snapshot();
  self.clocks.released[static_cast<int>(Scope::block)] = all;
  if (scope == Scope::device) self.clocks.released[static_cast<int>(Scope::device)] = all;
  tick(self);
}

}  // namespace race
}  // namespace simt

// ---- What the compiler calls -----------------------------------------------------------------------

#define HERE __builtin_return_address(0)

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}

using simt::race::access;
using simt::race::atomic_access;

#define SIMT_ACCESSES(bytes)                                                                                  \
  void __tsan_read##bytes(void* p) { access(p, bytes, true, false, true, HERE); }                             \
  void __tsan_write##bytes(void* p) { access(p, bytes, false, true, true, HERE); }                            \
  void __tsan_unaligned_read##bytes(void* p) { access(p, bytes, true, false, false, HERE); }                  \
  void __tsan_unaligned_write##bytes(void* p) { access(p, bytes, false, true, false, HERE); }                 \
  void __tsan_volatile_read##bytes(void* p) { atomic_access(p, bytes, true, false, __ATOMIC_RELAXED, HERE); } \
  void __tsan_volatile_write##bytes(void* p) { atomic_access(p, bytes, false, true, __ATOMIC_RELAXED, HERE); }

SIMT_ACCESSES(1)
SIMT_ACCESSES(2)
SIMT_ACCESSES(4)
SIMT_ACCESSES(8)
SIMT_ACCESSES(16)

void __tsan_read_range(void* p, size_t bytes) { access(p, bytes, true, false, false, HERE); }
void __tsan_write_range(void* p, size_t bytes) { access(p, bytes, false, true, false, HERE); }

// The build renames these in the kernels' objects: compilers do not instrument them.
void* simt_memcpy(void* to, const void* from, size_t bytes) {
  access(from, bytes, true, false, false, HERE);
  access(to, bytes, false, true, false, HERE);
  return memcpy(to, from, bytes);
}
void* simt_memmove(void* to, const void* from, size_t bytes) {
  access(from, bytes, true, false, false, HERE);
  access(to, bytes, false, true, false, HERE);
  return memmove(to, from, bytes);
}
void* simt_memset(void* to, int value, size_t bytes) {
  access(to, bytes, false, true, false, HERE);
  return memset(to, value, bytes);
}

#define SIMT_UPDATE(bits, name)                                                                \
  uint##bits##_t __tsan_atomic##bits##_##name(volatile void* p, uint##bits##_t v, int order) { \
    atomic_access(p, bits / 8, true, true, order, HERE);                                       \
    return __atomic_##name(static_cast<volatile uint##bits##_t*>(p), v, __ATOMIC_SEQ_CST);     \
  }
#define SIMT_EXCHANGE(bits, name)                                                                                  \
  int __tsan_atomic##bits##_compare_exchange_##name(volatile void* p, void* expected, uint##bits##_t v, int order, \
                                                    int) {                                                         \
    atomic_access(p, bits / 8, true, true, order, HERE);                                                           \
    return __atomic_compare_exchange_n(static_cast<volatile uint##bits##_t*>(p),                                   \
                                       static_cast<uint##bits##_t*>(expected), v, false, __ATOMIC_SEQ_CST,         \
                                       __ATOMIC_SEQ_CST);                                                          \
  }
#define SIMT_ATOMICS(bits)                                                                       \
  uint##bits##_t __tsan_atomic##bits##_load(const volatile void* p, int order) {                 \
    atomic_access(p, bits / 8, true, false, order, HERE);                                        \
    return *static_cast<const volatile uint##bits##_t*>(p);                                      \
  }                                                                                              \
  void __tsan_atomic##bits##_store(volatile void* p, uint##bits##_t v, int order) {              \
    atomic_access(p, bits / 8, false, true, order, HERE);                                        \
    *static_cast<volatile uint##bits##_t*>(p) = v;                                               \
  }                                                                                              \
  uint##bits##_t __tsan_atomic##bits##_exchange(volatile void* p, uint##bits##_t v, int order) { \
    atomic_access(p, bits / 8, true, true, order, HERE);                                         \
    return __atomic_exchange_n(static_cast<volatile uint##bits##_t*>(p), v, __ATOMIC_SEQ_CST);   \
  }                                                                                              \
  SIMT_UPDATE(bits, fetch_add)                                                                   \
  SIMT_UPDATE(bits, fetch_sub)                                                                   \
  SIMT_UPDATE(bits, fetch_and)                                                                   \
  SIMT_UPDATE(bits, fetch_or)                                                                    \
  SIMT_UPDATE(bits, fetch_xor)                                                                   \
  SIMT_EXCHANGE(bits, strong)                                                                    \
  SIMT_EXCHANGE(bits, weak)

SIMT_ATOMICS(32)
SIMT_ATOMICS(64)

// What -fsanitize=alignment,bounds calls; the first field of each record is where in the source.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

[[noreturn]] void __ubsan_handle_type_mismatch_v1_abort(const SourceLocation* at, uintptr_t address) {
  if (simt::current) simt::current->pc = HERE;
  simt::fail("misaligned access", simt::text("uses address %#zx as a type that it is not aligned for, at %s:%u",
                                             static_cast<size_t>(address), at->file, at->line));
}

[[noreturn]] void __ubsan_handle_out_of_bounds_abort(const SourceLocation* at, uintptr_t index) {
  if (simt::current) simt::current->pc = HERE;
  simt::fail("out of bounds", simt::text("uses index %zd of an array that ends before it, at %s:%u",
                                         static_cast<ssize_t>(index), at->file, at->line));
}

}  // extern "C"
