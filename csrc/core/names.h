// Enumerations with names. Each is one list, LIST(X) with an X(name, ...) for each value, from which come the
// enumerators, their names, and with these whatever is printed or read.
#pragma once

#include <cstddef>
#include <iterator>
#include <string>
#include <string_view>

#define BNEXT_ENUMERATOR(name, ...) name,
#define BNEXT_NAME(name, ...) #name,

// enum class E; kENames, in the order of its values; and name_of(E).
#define BNEXT_NAMED_ENUM(E, type, LIST)                     \
  enum class E : type { LIST(BNEXT_ENUMERATOR) };           \
  constexpr const char* k##E##Names[] = {LIST(BNEXT_NAME)}; \
  constexpr const char* name_of(E value) { return k##E##Names[static_cast<size_t>(value)]; }

namespace bnext {

// Whether one of the names is `text`; *value is then the value of that name.
template <class E, size_t count>
bool find_name(const char* const (&names)[count], std::string_view text, E* value) {
  for (size_t i = 0; i < count; i++) {
    if (text != names[i]) continue;
    *value = static_cast<E>(i);
    return true;
  }
  return false;
}

inline std::string in_quotes(std::string_view text) { return "'" + std::string(text) + "'"; }

// "a, b or c", of text(item) for each.
template <class Items, class Text>
std::string alternatives(const Items& items, const Text& text) {
  std::string out;
  const size_t count = std::size(items);
  for (size_t i = 0; i < count; i++) out += (i == 0 ? "" : i + 1 < count ? ", " : " or ") + text(items[i]);
  return out;
}

}  // namespace bnext
