// Picks the kernels that this machine runs best, once.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "isa.h"

namespace bnext::cpu {
namespace {

// The last that this processor runs.
#if BNEXT_X86
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
