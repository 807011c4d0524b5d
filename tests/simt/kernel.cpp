// What is known of a kernel before it runs, from the executable that it is in: the shared memory of its own variables,
// and the promise of its launch bounds.
//
// The executable is linked with --emit-relocs, which keeps where each instruction refers to. A kernel has the
// __shared__ variables, which are thread storage here, that its code refers to, or the code of a function that it
// refers to, and so on; but for the device's own functions.
#include <elf.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstring>
#include <set>

#include "internal.h"

// Of all functions with launch bounds, where their no-ops begin. The linker defines these, if there are any.
extern "C" __attribute__((weak)) const uintptr_t __start___patchable_function_entries[];
extern "C" __attribute__((weak)) const uintptr_t __stop___patchable_function_entries[];

namespace simt {
namespace {

struct Function {
  uintptr_t begin, end;
  bool is_device;  // of this folder, or of a sanitizer
};

// A variable in thread storage, or an address in some function.
struct Reference {
  uintptr_t from;
  bool is_variable;
  uintptr_t to;  // offset or address
  size_t bytes;  // of the variable
};

class Executable {
 public:
  Executable() {
    const int file = open("/proc/self/exe", O_RDONLY);
    struct stat status = {};
    if (file < 0 || fstat(file, &status) != 0) fail("no executable", "cannot open /proc/self/exe");
    void* p = mmap(nullptr, status.st_size, PROT_READ, MAP_PRIVATE, file, 0);
    if (p == MAP_FAILED) fail("no executable", "cannot map /proc/self/exe");
    data_ = static_cast<const char*>(p);
    header_ = at<Elf64_Ehdr>(0);
    sections_ = at<Elf64_Shdr>(header_->e_shoff);
    for (int i = 0; i < header_->e_shnum; ++i) {
      if (sections_[i].sh_type == SHT_SYMTAB) read_functions(sections_[i]);
    }
    for (int i = 0; i < header_->e_shnum; ++i) {
      const Elf64_Shdr& s = sections_[i];
      if (s.sh_type == SHT_RELA && sections_[s.sh_info].sh_flags & SHF_EXECINSTR) read_references(s);
    }
    if (references_.empty()) fail("no relocations", "the executable must be linked with --emit-relocs");
    auto earlier = [](const auto& a, const auto& b) { return a.begin < b.begin; };
    std::sort(functions_.begin(), functions_.end(), earlier);
    std::sort(references_.begin(), references_.end(),
              [](const Reference& a, const Reference& b) { return a.from < b.from; });
  }

  const Function* function_at(uintptr_t address) const {
    auto next = std::upper_bound(functions_.begin(), functions_.end(), address,
                                 [](uintptr_t a, const Function& f) { return a < f.begin; });
    if (next == functions_.begin() || address >= std::prev(next)->end) return nullptr;
    return &*std::prev(next);
  }

  size_t static_shared(const Function& kernel) const {
    std::set<const Function*> seen = {&kernel};
    std::vector<const Function*> queue = {&kernel};
    std::set<std::pair<uintptr_t, size_t>> variables;
    while (!queue.empty()) {
      const Function& f = *queue.back();
      queue.pop_back();
      auto r = std::lower_bound(references_.begin(), references_.end(), f.begin,
                                [](const Reference& a, uintptr_t address) { return a.from < address; });
      for (; r != references_.end() && r->from < f.end; ++r) {
        if (r->is_variable) {
          variables.insert({r->to, r->bytes});
          continue;
        }
        const Function* callee = function_at(r->to);
        if (callee && !callee->is_device && seen.insert(callee).second) queue.push_back(callee);
      }
    }
    size_t bytes = 0;
    for (const auto& [offset, size] : variables) bytes += (size + 15) / 16 * 16;
    return bytes;
  }

  // Number of no-ops before the function's entry, each of one instruction.
  unsigned no_ops(const Function& f) const {
#if defined(__x86_64__)
    constexpr unsigned instruction = 1;
#else
    constexpr unsigned instruction = 4;
#endif
    uintptr_t first = 0;
    for (const uintptr_t* p = __start___patchable_function_entries; p != __stop___patchable_function_entries; ++p) {
      if (*p < f.begin) first = std::max(first, *p);
    }
    auto after = std::lower_bound(functions_.begin(), functions_.end(), first,
                                  [](const Function& g, uintptr_t address) { return g.begin < address; });
    if (first == 0 || after->begin != f.begin) return 0;  // they are another function's
    return static_cast<unsigned>(f.begin - first) / instruction;
  }

 private:
  template <class T>
  const T* at(size_t offset) const {
    return reinterpret_cast<const T*>(data_ + offset);
  }

  void read_functions(const Elf64_Shdr& section) {
    const char* names = at<char>(sections_[section.sh_link].sh_offset);
    const auto* symbols = at<Elf64_Sym>(section.sh_offset);
    for (size_t i = 0; i < section.sh_size / sizeof(Elf64_Sym); ++i) {
      const Elf64_Sym& s = symbols[i];
      if (ELF64_ST_TYPE(s.st_info) != STT_FUNC || s.st_shndx == SHN_UNDEF) continue;
      const char* name = names + s.st_name;
      auto begins = [&](const char* prefix) { return strncmp(name, prefix, strlen(prefix)) == 0; };
      functions_.push_back({s.st_value, s.st_value + std::max<size_t>(1, s.st_size),
                            begins("_ZN4simt") || begins("_ZNK4simt") || begins("__")});
    }
  }

  void read_references(const Elf64_Shdr& section) {
    const auto* symbols = at<Elf64_Sym>(sections_[section.sh_link].sh_offset);
    const auto* relocations = at<Elf64_Rela>(section.sh_offset);
    for (size_t i = 0; i < section.sh_size / sizeof(Elf64_Rela); ++i) {
      const Elf64_Rela& r = relocations[i];
      const Elf64_Sym& s = symbols[ELF64_R_SYM(r.r_info)];
      const auto type = ELF64_ST_TYPE(s.st_info);
      if (type == STT_TLS) {
        references_.push_back({r.r_offset, true, s.st_value, s.st_size});
      } else if (type == STT_FUNC || type == STT_SECTION) {
        uintptr_t to = s.st_value;
        if (type == STT_SECTION) {
          to += r.r_addend;
#if defined(__x86_64__)
          const auto kind = ELF64_R_TYPE(r.r_info);
          if (kind == R_X86_64_PC32 || kind == R_X86_64_PLT32) to += 4;  // relative to the next instruction
#endif
        }
        references_.push_back({r.r_offset, false, to, 0});
      }
    }
  }

  const char* data_;
  const Elf64_Ehdr* header_;
  const Elf64_Shdr* sections_;
  std::vector<Function> functions_;
  std::vector<Reference> references_;
};

}  // namespace

const Kernel* find_kernel(const void* function) {
  static const Executable& executable = *new Executable;
  static auto& kernels = *new std::unordered_map<const void*, Kernel>;
  const auto known = kernels.find(function);
  if (known != kernels.end()) return &known->second;
  const auto address = reinterpret_cast<uintptr_t>(function);
  const Function* f = executable.function_at(address);
  if (!f || f->begin != address) return nullptr;
  Kernel kernel = {executable.static_shared(*f), kMostBoundThreads, 1};
  if (const unsigned code = executable.no_ops(*f)) {
    kernel.threads = code % (kMostBoundThreads / 32 + 1) * 32;
    kernel.blocks = code / (kMostBoundThreads / 32 + 1);
  }
  return &kernels.emplace(function, kernel).first->second;
}

}  // namespace simt
