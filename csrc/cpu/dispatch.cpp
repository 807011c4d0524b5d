// Picks the kernels that this machine runs best, once.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "isa.h"

#if BNEXT_X86 && defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#endif

namespace bnext::cpu {
namespace {

enum class Isa { portable, avx2, avx512 };

#if BNEXT_X86 && defined(_MSC_VER) && !defined(__clang__)
// cpuid says what the processor has, xgetbv which registers the system saves.
Isa detect() {
  int leaf1[4], leaf7[4];
  __cpuidex(leaf1, 1, 0);
  __cpuidex(leaf7, 7, 0);
  const auto bit = [](int word, int i) { return (word >> i & 1) != 0; };
  const bool fma = bit(leaf1[2], 12), osxsave = bit(leaf1[2], 27), f16c = bit(leaf1[2], 29);
  if (!osxsave || !fma || !f16c || !bit(leaf7[1], 5)) return Isa::portable;
  const unsigned long long saved = _xgetbv(0);
  if ((saved & 0x6) != 0x6) return Isa::portable;
  const bool avx512 = bit(leaf7[1], 16) && bit(leaf7[1], 17) && bit(leaf7[1], 30) && bit(leaf7[1], 31);
  return avx512 && (saved & 0xe0) == 0xe0 ? Isa::avx512 : Isa::avx2;
}
#elif BNEXT_X86
Isa detect() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
    return Isa::portable;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::avx512 : Isa::avx2;
}
#else
Isa detect() { return Isa::portable; }
#endif

constexpr const char* kIsaNames[] = {"portable", "avx2", "avx512"};  // by Isa

// BNEXT_CPU chooses less than the processor has.
Isa requested(const char* name, Isa most) {
  for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (std::string(name) != kIsaNames[static_cast<int>(isa)]) continue;
    if (isa <= most) return isa;
    throw std::invalid_argument("BNEXT_CPU is " + std::string(name) + ", and this processor has no more than " +
                                kIsaNames[static_cast<int>(most)]);
  }
  throw std::invalid_argument("BNEXT_CPU should be 'portable', 'avx2' or 'avx512', not '" + std::string(name) + "'");
}

const KernelSet& choose() {
  Isa isa = detect();
  if (const char* name = std::getenv("BNEXT_CPU"); name && *name) isa = requested(name, isa);
#if BNEXT_X86
  if (isa == Isa::avx512) return avx512_kernels();
  if (isa == Isa::avx2) return avx2_kernels();
#endif
  return portable_kernels();
}

}  // namespace

const KernelSet& kernel_set() {
  static const KernelSet& set = choose();
  return set;
}

}  // namespace bnext::cpu
