// When stores should go past the caches.
#pragma once

#include <cstdint>

namespace bnext::cpu {

// Whether a pass that reads and writes so many bytes leaves nothing in the last-level cache for who comes next. What it
// writes had better not push out what others have there, nor be read before it is written.
bool exceeds_cache(int64_t bytes);

}  // namespace bnext::cpu
