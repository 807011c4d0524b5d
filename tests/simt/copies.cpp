// Asynchronous copies to shared memory. The device may do them at any time from the call to the wait; here the old
// content is lost at the call, and the copy is done in the wait, so that whoever counts on either finds out.
#include <algorithm>
#include <cstring>

#include "internal.h"

namespace simt {

int code_capability() { return launched->code_capability; }

void copy_async(void* to, const void* from, size_t bytes) {
  Thread& self = *current;
  self.pc = __builtin_return_address(0);
  require_capability(80, "copies while it goes on");
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("wrong size", text("copies %zu bytes, not 4, 8 or 16", bytes));
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes != 0) {
    fail("misaligned access", text("copies %zu bytes, from %p to %p", bytes, from, to));
  }
  for (const Copy& other : self.copies) {
    if (to == other.to)
      fail("copy", "copies to where a copy is under way, which it began in\n    " + describe_code(other.pc));
  }
  self.copies.push_back({to, from, bytes, self.copy_groups, self.pc});
  if constexpr (race::enabled) race::lost(to, bytes, self.pc);
  memset(to, 0xff, bytes);
}

void commit_copies() { ++current->copy_groups; }

void wait_for_copies(unsigned most) {
  Thread& self = *current;
  auto arrives = [&](const Copy& copy) {
    if (copy.group + most >= self.copy_groups) return false;
    if constexpr (race::enabled) race::copied(copy);
    memcpy(copy.to, copy.from, copy.bytes);
    return true;
  };
  auto& copies = self.copies;
  copies.erase(std::remove_if(copies.begin(), copies.end(), arrives), copies.end());
}

void check_copies() {
  const auto& copies = current->copies;
  if (copies.empty()) return;
  fail("copy", text("exits with %zu copies under way, of which the first began in\n    ", copies.size()) +
                   describe_code(copies.front().pc));
}

}  // namespace simt
