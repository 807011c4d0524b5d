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

// The last that this processor runs.
#if BNEXT_X86 && defined(_MSC_VER) && !defined(__clang__)
// cpuid says what the processor has, xgetbv which registers the system saves.
InstructionSet detect() {
  int leaf1[4], leaf7[4];
  __cpuidex(leaf1, 1, 0);
  __cpuidex(leaf7, 7, 0);
  const auto bit = [](int word, int i) { return (word >> i & 1) != 0; };
  const bool fma = bit(leaf1[2], 12), osxsave = bit(leaf1[2], 27), f16c = bit(leaf1[2], 29);
  if (!osxsave || !fma || !f16c || !bit(leaf7[1], 5)) return InstructionSet::portable;
  const unsigned long long saved = _xgetbv(0);
  if ((saved & 0x6) != 0x6) return InstructionSet::portable;
  const bool avx512 = bit(leaf7[1], 16) && bit(leaf7[1], 17) && bit(leaf7[1], 30) && bit(leaf7[1], 31);
  if (!avx512 || (saved & 0xe0) != 0xe0) return InstructionSet::avx2;
  int leaf7_1[4];
  __cpuidex(leaf7_1, 7, 1);
  const bool bf16 = bit(leaf7_1[0], 5) && bit(leaf7[2], 1);
  return bf16 ? InstructionSet::avx512_bf16 : InstructionSet::avx512;
}
#elif BNEXT_X86
InstructionSet detect() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
    return InstructionSet::portable;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return InstructionSet::avx2;
  const bool bf16 = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  return bf16 ? InstructionSet::avx512_bf16 : InstructionSet::avx512;
}
#else
// The last of all.
InstructionSet detect() { return static_cast<InstructionSet>(std::size(kInstructionSetNames) - 1); }
#endif

const KernelSet& kernels_for(InstructionSet set) {
  switch (set) {
#define BNEXT_CASE(name) \
  case InstructionSet::name: return name##_kernels();
    BNEXT_INSTRUCTION_SETS(BNEXT_CASE)
#undef BNEXT_CASE
  }
  BNEXT_UNREACHABLE();
}

const KernelSet& choose() {
  const InstructionSet best = detect();
  const char* const name = std::getenv("BNEXT_CPU");
  if (name == nullptr || *name == 0) return kernels_for(best);

  InstructionSet set;
  if (!find_name(kInstructionSetNames, name, &set)) {
    const std::string names = alternatives(kInstructionSetNames, in_quotes);
    throw std::invalid_argument("BNEXT_CPU should be " + names + ", not " + in_quotes(name));
  }
  if (set > best) {
    throw std::invalid_argument("BNEXT_CPU is " + std::string(name) + ", and this processor has no more than " +
                                name_of(best));
  }
  return kernels_for(set);
}

}  // namespace

const KernelSet& kernel_set() {
  static const KernelSet& set = choose();
  return set;
}

}  // namespace bnext::cpu
