// Shared memory of blocks, and "global memory" for tests.
#include <link.h>

#include <cstdlib>
#include <cstring>
#include <map>

#include "internal.h"

#if defined(SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace simt {

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

char* own_static_shared() { return thread_storage().begin; }

void* dynamic_shared() { return current->block->dynamic_shared; }

unsigned cluster_rank() {
  current->pc = __builtin_return_address(0);
  require_capability(90, "asks for its rank in the cluster");
  return static_cast<unsigned>(current->block->linear % launched->gang);
}

void* map_shared(const void* address, unsigned rank) {
  current->pc = __builtin_return_address(0);
  require_capability(90, "maps shared memory of its cluster");
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

// ---- Global memory -------------------------------------------------------------------------------

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
void check_guards() {
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

}  // namespace simt
