// Stacks, and switching between them.
#include "context.h"

#include <sys/mman.h>

#include <algorithm>

#include "internal.h"

#if defined(SIMT_ASAN)
#include <sanitizer/common_interface_defs.h>
// Fibers and parked OS threads never end, and what they hold is no leak.
extern "C" const char* __asan_default_options() { return "detect_leaks=0"; }
#endif

namespace simt {

#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)

// Saves what a callee must preserve, swaps stacks, restores. ucontext would make a system call.
extern "C" void simt_switch(void** from, void* to);
asm(R"(
.text
.globl simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, . - simt_switch
)");

void prepare(Context& context, void (*entry)()) {
  // Six registers, the entry's address, and a null return address that aligns its stack.
  void** top = reinterpret_cast<void**>(const_cast<char*>(context.stack) + context.bytes) - 8;
  std::fill(top, top + 8, nullptr);
  top[6] = reinterpret_cast<void*>(entry);
  context.position = top;
}

#else
#include <ucontext.h>

// A ucontext lies at the top of its stack; an OS thread's own is in the frame that switches away.
static void simt_switch(void** from, void* to) {
  ucontext_t here;
  *from = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to));
}

void prepare(Context& context, void (*entry)()) {
  char* top = const_cast<char*>(context.stack) + context.bytes - 2 * sizeof(ucontext_t);
  auto* start = reinterpret_cast<ucontext_t*>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{63});
  getcontext(start);
  start->uc_stack.ss_sp = const_cast<char*>(context.stack);
  start->uc_stack.ss_size = reinterpret_cast<char*>(start) - context.stack;
  start->uc_link = nullptr;
  makecontext(start, entry, 0);
  context.position = start;
}

#endif

void switch_context(Context& from, const Context& to, bool last) {
#if defined(SIMT_ASAN)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.sanitizer, to.stack, to.bytes);
#else
  (void)last;
#endif
  simt_switch(&from.position, to.position);
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(from.sanitizer, nullptr, nullptr);
#endif
}

const char* new_stack() {
  constexpr size_t guard = 4096;
  void* p =
      mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED || mprotect(p, guard, PROT_NONE) != 0) fail("out of memory", "cannot map another stack");
  return static_cast<char*>(p) + guard;
}

void enter_context() {
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

}  // namespace simt
