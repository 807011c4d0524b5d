#include "cache.h"

#include <algorithm>

#if defined(__linux__)
#include <unistd.h>
#endif

namespace bnext::cpu {
namespace {

// Of a larger cache other cores have most.
constexpr int64_t kMaxCacheBytes = int64_t{64} << 20;

int64_t last_level_cache() {
#if defined(_SC_LEVEL3_CACHE_SIZE)
  const int64_t bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
  if (bytes > 0) return std::min(bytes, kMaxCacheBytes);
#endif
  return kMaxCacheBytes / 2;
}

}  // namespace

bool exceeds_cache(int64_t bytes) {
  static const int64_t cache = last_level_cache();
  return bytes > cache;
}

}  // namespace bnext::cpu
