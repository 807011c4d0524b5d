// The kernels for AVX-512. The target is set here, for the code below the pragma only, so that
// the file needs no compiler flags of its own and shared headers above stay runnable anywhere.
#include "isa.h"

#if BNEXT_X86
#include <immintrin.h>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#endif

#include "isa_avx512.h"
#include "kernel_table.h"

namespace bnext::cpu {
const KernelSet& avx512_kernels() { return table; }
}  // namespace bnext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
