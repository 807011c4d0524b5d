// The instruction sets that kernels are compiled for.
#pragma once

#include "kernels.h"

#if defined(__x86_64__)
#define BNEXT_X86 1
#else
#define BNEXT_X86 0
#endif
#if defined(__aarch64__)
#define BNEXT_ARM64 1
#else
#define BNEXT_ARM64 0
#endif

// By the names that BNEXT_CPU has for them. A processor that runs one runs all before it.
#if BNEXT_X86
#define BNEXT_INSTRUCTION_SETS(X) X(portable) X(avx2) X(avx512) X(avx512_bf16)
#elif BNEXT_ARM64
#define BNEXT_INSTRUCTION_SETS(X) X(portable) X(neon)
#else
#define BNEXT_INSTRUCTION_SETS(X) X(portable)
#endif

namespace bnext::cpu {

BNEXT_NAMED_ENUM(InstructionSet, int32_t, BNEXT_INSTRUCTION_SETS)

// const KernelSet& avx2_kernels(), and so on, each in a source of its own.
#define BNEXT_DECLARATION(name) const KernelSet& name##_kernels();
BNEXT_INSTRUCTION_SETS(BNEXT_DECLARATION)
#undef BNEXT_DECLARATION

}  // namespace bnext::cpu
