// Stacks, and switching between them: every thread of a kernel has its own.
#pragma once

#include <cstddef>

namespace simt {

constexpr size_t kStackBytes = 256 * 1024;

// A stack, and where it was left.
struct Context {
  void* position;
  const char* stack;
  size_t bytes;
  void* sanitizer;
};

// kStackBytes, and a page below that nobody may touch.
const char* new_stack();
// Makes a context begin with that function, which calls enter_context() first and never returns.
void prepare(Context&, void (*entry)());
void enter_context();
// `last`: nobody will come back to `from`.
void switch_context(Context& from, const Context& to, bool last = false);

}  // namespace simt
