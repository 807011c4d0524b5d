// How large the last-level cache is.
#pragma once

#include <cstdint>

namespace bnext::cpu {

// Whether this is more than the last-level cache.
bool exceeds_cache(int64_t bytes);

}  // namespace bnext::cpu
