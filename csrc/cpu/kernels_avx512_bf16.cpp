// The kernels of bfloat16 for AVX-512 with its instructions for that; all others are those for AVX-512. The target is
// set as in kernels_avx512.cpp.
#include "isa.h"

#if BNEXT_X86
#include <immintrin.h>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi"))), \
                             apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,fma,f16c")
#endif

#include "isa_avx512_bf16.h"
#include "kernel_table.h"

namespace bnext::cpu {

const KernelSet& avx512_bf16_kernels() {
  static const KernelSet set = [] {
    KernelSet kernels = avx512_kernels();
    kernels.of_bf16 = kernels_of<bf16>();
    return kernels;
  }();
  return set;
}

}  // namespace bnext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
