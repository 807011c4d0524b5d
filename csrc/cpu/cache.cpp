#include "cache.h"

#include <algorithm>
#include <fstream>

#if defined(__linux__)
#include <unistd.h>
#endif

namespace bnext::cpu {
namespace {

// Of a larger cache other cores have most.
constexpr int64_t kMaxCacheBytes = int64_t{64} << 20;

// What Linux says of the third level, in bytes, or 0. sysconf() asks the processor, which in a virtual machine tells of
// all that the host has.
int64_t size_in_sysfs() {
  std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");
  int64_t size = 0;
  char unit = 0;
  if (!(file >> size)) return 0;
  file >> unit;
  return unit == 'K' ? size << 10 : unit == 'M' ? size << 20 : size;
}

int64_t last_level_cache() {
  int64_t bytes = size_in_sysfs();
#if defined(_SC_LEVEL3_CACHE_SIZE)
  if (bytes <= 0) bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
  return bytes > 0 ? std::min(bytes, kMaxCacheBytes) : kMaxCacheBytes / 2;
}

}  // namespace

bool exceeds_cache(int64_t bytes) {
  static const int64_t cache = last_level_cache();
  return bytes > cache;
}

}  // namespace bnext::cpu
