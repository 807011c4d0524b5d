// Barriers, shuffles and votes: exactly the right threads meet in the same call, or the process ends with a report.
#include <algorithm>
#include <cstring>

#include "internal.h"

namespace simt {

static bool operator==(const Call& a, const Call& b) {
  return a.line == b.line && strcmp(a.name, b.name) == 0 && strcmp(a.file, b.file) == 0;
}

static std::string describe(const Call& call) { return text("%s at %s:%d", call.name, call.file, call.line); }

std::string waits(const Thread& t) { return describe(t) + " waits in " + describe(t.call); }

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
  note_progress();
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
  current->pc = __builtin_return_address(0);
  require_capability(90, "calls " + describe(call) + ", a barrier of its cluster");
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
  note_progress();
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

void require_capability(int capability, const std::string& does) {
  const int code = launched->code_capability;
  if (code >= capability) return;
  fail("trap", does + text(", but its code is for compute capability %d.%d, which has none", code / 10, code % 10));
}

void fence(Scope scope) {
  if constexpr (race::enabled) race::fence(scope);
  else (void)scope;
}

}  // namespace simt
