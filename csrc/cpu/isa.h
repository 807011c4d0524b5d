// The instruction sets that kernels are compiled for.
#pragma once

#include "kernels.h"

#if defined(__x86_64__) || defined(_M_X64)
#define BNEXT_X86 1
#else
#define BNEXT_X86 0
#endif
#if defined(__aarch64__)
#define BNEXT_ARM64 1
#else
#define BNEXT_ARM64 0
#endif

namespace bnext::cpu {

const KernelSet& portable_kernels();
const KernelSet& avx2_kernels();    // x86 only
const KernelSet& avx512_kernels();  // x86 only
const KernelSet& neon_kernels();    // 64-bit ARM only

}  // namespace bnext::cpu
