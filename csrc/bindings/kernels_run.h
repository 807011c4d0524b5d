// How many operator calls this process has handed to a backend's kernels: what shows that they ran.
#pragma once

#include <atomic>
#include <cstdint>

namespace bnext {

inline std::atomic<int64_t> kernels_run{0};

}  // namespace bnext
