// The kernels for NEON, which needs no compiler flags where there is any.
#include "isa.h"

#if BNEXT_ARM64
#include "isa_neon.h"
#include "kernel_table.h"

namespace bnext::cpu {
const KernelSet& neon_kernels() { return table; }
}  // namespace bnext::cpu
#endif
