// Plans in words.
#pragma once

#include <string>

#include "partition.h"

namespace bnext::cuda {

// "1 block", "2 blocks".
std::string counted(int64_t count, const std::string& what);

// Tiles, blocks, and the shared memory of a resident pass.
std::string describe(const Partition&);

}  // namespace bnext::cuda
