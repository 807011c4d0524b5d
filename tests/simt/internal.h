// What the sources of this folder share, and kernels and tests do not see.
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "context.h"
#include "cuda_runtime.h"
#include "simt.h"

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN 1
#endif
#endif

namespace simt {

constexpr unsigned kWarp = 32;

// ---- State of the race checker; see race.cpp -----------------------------------------------------

// What somebody knows to have happened: of a thread or a whole block, everything up to a clock.
using Knowledge = std::unordered_map<uint64_t, uint32_t>;

// A release that a relaxed read has seen, for the next fence to acquire.
struct Seen {
  std::shared_ptr<const Knowledge> knowledge;
  bool in_shared;
};

struct ThreadClocks {
  uint32_t now;           // stamps accesses; goes up with every synchronisation
  uint32_t lanes[kWarp];  // the clock up to which each lane of the warp is known
  Knowledge known;        // since the last barrier of the block
  std::vector<Seen> seen;
  std::shared_ptr<const Knowledge> released[2];  // by the last fence, for each Scope
};

struct ShadowByte;

struct BlockClocks {
  ShadowByte* static_shadow;  // of its slot's static shared memory
  uint32_t birth;             // shared memory stamped before this was written by an earlier block
  uint32_t barrier;           // everything in this block before this clock is known to all its threads
  Knowledge known;
  std::vector<Seen> seen;
};

// ---- State of execution --------------------------------------------------------------------------

// A launch that the device has accepted.
struct Launch {
  dim3 grid, block;
  uint64_t gang;  // blocks that are resident together: 1, a cluster, or the whole grid
  uint64_t room;  // blocks that are resident at a time in any case, if there are so many and a gang is not larger
  size_t dynamic_shared;
  bool overlapping;  // the kernel before
  int code_capability;
  Bound bound;
};

struct Block;

// A copy to shared memory that the thread has not waited for.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  unsigned group;
  const void* pc;
};

struct Thread {
  enum class State { ready, at_barrier, in_warp_call, asleep, exited };

  Context context;
  Block* block;
  uint3 index;
  unsigned id, lane;  // in the block, in the warp
  State state;
  Call call;  // that it waits in
  const void* pc;
  unsigned mask, source;  // of a warp's call
  uint64_t brings, gets;
  std::vector<Copy> copies;  // under way, of groups up to `copy_groups`, which is not complete
  unsigned copy_groups;
  bool may_access;  // memory: in a launch that overlaps the one before, once it has waited
  ThreadClocks clocks;
};

// A barrier of a block, or of a cluster.
struct Barrier {
  const Thread* first;  // to arrive
  uint64_t arrived;
  unsigned votes, result;
};

struct Gang;

// A place for a resident block.
struct Block {
  uint64_t linear;  // in the grid
  uint3 index;
  Gang* gang;
  std::vector<Thread> threads;
  unsigned exited;
  Barrier barrier;
  std::deque<Thread*> ready;
  std::vector<Thread*> asleep;  // in __nanosleep, until everybody else has had a turn
  char* static_shared;
  char* dynamic_shared;
  BlockClocks clocks;
};

// Blocks that are resident together: one, a cluster, or a cooperative grid.
struct Gang {
  std::vector<Block*> blocks;
  unsigned exited;  // blocks
  Barrier barrier;
};

extern Thread* current;  // null on the host
extern const Launch* launched;

// schedule.cpp: executes all of a launch.
void run(const Launch&);
// Puts a thread among those that may run.
void wake(Thread&);
// Runs whoever is next, and returns when the current thread, which the caller has put where it waits, is next again.
void schedule();
// Somebody got somewhere: whoever spins does not spin in vain.
void note_progress();

// rendezvous.cpp
std::string waits(const Thread&);
// Ends the process unless the code that runs has what came with that compute capability.
void require_capability(int capability, const std::string& does);

// memory.cpp
// Bytes of the executable's thread storage, which holds every __shared__ variable.
extern const size_t static_shared_bytes;
// That of the calling OS thread.
char* own_static_shared();
// Which allocation an address is in or next to; empty if there is none.
std::string describe_global(const char* address);
// Writes outside an allocation, which without a sanitizer are found after the kernel.
void check_guards();

// kernel.cpp: what is known of a kernel from its code.
struct Kernel {
  size_t static_shared;      // bytes of a block
  unsigned threads, blocks;  // of __launch_bounds__
};
// Null where there is no such function.
const Kernel* find_kernel(const void* function);

// report.cpp
std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string describe(const Thread&);
// What is at a code address: function, file and line, and the calls it was inlined into.
std::string describe_code(const void* pc);
// Reports on stderr, naming the current thread and the kernel, and ends the process.
[[noreturn]] void fail(const char* kind, const std::string& message);

// copies.cpp
// Ends the process if the current thread, which exits, has copies under way.
void check_copies();

namespace race {

#if defined(SIMT_RACE)
constexpr bool enabled = true;
#else
constexpr bool enabled = false;
#endif

char* reserve(size_t bytes);  // in place of malloc; all is given back together, by reset
void reset();
void allocated(const char* p, size_t bytes);
void released(const char* p, size_t bytes);
void written(const char* p, size_t bytes);
size_t count_unwritten(const char* p, size_t bytes);
void begin_launch(const std::vector<Block*>& resident);
void begin_block(Block&);
void sync_blocks(const std::vector<Block*>&);  // a barrier of all their threads
void sync_lanes(Thread& lane0, unsigned mask);
// Memory whose content is lost until it is written.
void lost(const void* p, size_t bytes, const void* pc);
void copied(const Copy&);
void fence(Scope);

}  // namespace race
}  // namespace simt
