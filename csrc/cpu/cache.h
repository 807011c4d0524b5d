// When stores should go past the caches.
#pragma once

#include <cstdint>

namespace bnext::cpu {

// Whether passes that read and write so many bytes, some of them twice, leave nothing in the last-level cache for who
// comes next. What they write had better not push out what others have there, nor be read before it is written.
bool exceeds_cache(int64_t bytes);

}  // namespace bnext::cpu
