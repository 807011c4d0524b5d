// What is said when something is wrong.
#include <limits.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "internal.h"

namespace simt {

std::string text(const char* format, ...) {
  char buffer[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(buffer, sizeof(buffer), format, arguments);
  va_end(arguments);
  return buffer;
}

std::string describe(const Thread& t) {
  return text("thread (%u,%u,%u) of block (%u,%u,%u)", t.index.x, t.index.y, t.index.z, t.block->index.x,
              t.block->index.y, t.block->index.z);
}

std::string describe_code(const void* pc) {
  char path[PATH_MAX + 1] = {};
  if (readlink("/proc/self/exe", path, PATH_MAX) < 0) return "?";
  // The byte before a return address is part of the call.
  const std::string address = text("%p", static_cast<const void*>(static_cast<const char*>(pc) - 1));
  const std::string command = std::string("addr2line -Cfipe '") + path + "' " + address;
  std::string out;
  char line[4096];
  FILE* pipe = popen(command.c_str(), "r");
  while (pipe && fgets(line, sizeof(line), pipe)) {
    if (strstr(line, "/language.h:")) continue;  // the intrinsic itself
    const char* inlined = strstr(line, "(inlined by) ");
    if (char* end = strpbrk(line, "\n")) *end = 0;
    if (char* end = strstr(line, " (discriminator")) *end = 0;
    out += (out.empty() ? "" : "\n    in ") + std::string(inlined ? inlined + strlen("(inlined by) ") : line);
  }
  if (pipe) pclose(pipe);
  return out.empty() ? text("%p", pc) : out;
}

void fail(const char* kind, const std::string& message) {
  fflush(stdout);
  const std::string who = current ? describe(*current) + " " : "";
  fprintf(stderr, "simt: %s: %s%s\n", kind, who.c_str(), message.c_str());
  if (current && current->pc) fprintf(stderr, "  at %s\n", describe_code(current->pc).c_str());
  if (launched) {
    const char* entry = static_cast<const char*>(launched->bound.kernel) + 1;  // as a return address would be
    fprintf(stderr, "  in kernel %s\n", describe_code(entry).c_str());
  }
  fflush(stderr);
  _exit(66);
}

}  // namespace simt
