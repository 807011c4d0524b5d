// The kernels as plain C++, for whatever the compiler targets by default.
#include "isa_portable.h"
#include "kernel_table.h"

namespace bnext::cpu {
const KernelSet& portable_kernels() { return table; }
}  // namespace bnext::cpu
