// Picks the kernels that this machine runs best, once.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "isa.h"

#if BNEXT_X86 && defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#endif

namespace bnext::cpu {
namespace {

#if BNEXT_X86
enum class X86 { less, avx2, avx512 };

#if defined(_MSC_VER) && !defined(__clang__)
// cpuid says what the processor has, xgetbv which registers the system saves.
X86 detect() {
  int leaf1[4], leaf7[4];
  __cpuidex(leaf1, 1, 0);
  __cpuidex(leaf7, 7, 0);
  const auto bit = [](int word, int i) { return (word >> i & 1) != 0; };
  const bool fma = bit(leaf1[2], 12), osxsave = bit(leaf1[2], 27), f16c = bit(leaf1[2], 29);
  if (!osxsave || !fma || !f16c || !bit(leaf7[1], 5)) return X86::less;
  const unsigned long long saved = _xgetbv(0);
  if ((saved & 0x6) != 0x6) return X86::less;
  const bool avx512 = bit(leaf7[1], 16) && bit(leaf7[1], 17) && bit(leaf7[1], 30) && bit(leaf7[1], 31);
  return avx512 && (saved & 0xe0) == 0xe0 ? X86::avx512 : X86::avx2;
}
#else
X86 detect() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
    return X86::less;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? X86::avx512 : X86::avx2;
}
#endif
#endif

struct Choice {
  const char* name;  // for BNEXT_CPU
  const KernelSet& (*kernels)();
  bool runs;
};

// What there are kernels for, the best last.
std::vector<Choice> choices() {
  std::vector<Choice> all = {{"portable", portable_kernels, true}};
#if BNEXT_X86
  const X86 best = detect();
  all.push_back({"avx2", avx2_kernels, best >= X86::avx2});
  all.push_back({"avx512", avx512_kernels, best >= X86::avx512});
#elif BNEXT_ARM64
  all.push_back({"neon", neon_kernels, true});
#endif
  return all;
}

const KernelSet& choose() {
  const std::vector<Choice> all = choices();
  const Choice* best = nullptr;
  for (const Choice& choice : all)
    if (choice.runs) best = &choice;
  const char* const name = std::getenv("BNEXT_CPU");
  if (name == nullptr || *name == 0) return best->kernels();

  for (const Choice& choice : all) {
    if (std::string(name) != choice.name) continue;
    if (choice.runs) return choice.kernels();
    throw std::invalid_argument("BNEXT_CPU is " + std::string(name) + ", and this processor has no more than " +
                                best->name);
  }
  const std::string names = alternatives(all, [](const Choice& choice) { return in_quotes(choice.name); });
  throw std::invalid_argument("BNEXT_CPU should be " + names + ", not " + in_quotes(name));
}

}  // namespace

const KernelSet& kernel_set() {
  static const KernelSet& set = choose();
  return set;
}

}  // namespace bnext::cpu
