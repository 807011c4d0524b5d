#include "plan_choice.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <type_traits>

#include "partition.h"

namespace bnext::cuda {
namespace {

struct Detail {
  const char* name;
  unsigned max;
  const char* allowed;
  unsigned (*get)(const PlanChoice&);
  void (*set)(PlanChoice&, unsigned);
};

template <auto MEMBER>
Detail detail(const char* name, unsigned max, const char* allowed) {
  return {name, max, allowed, [](const PlanChoice& c) -> unsigned { return c.*MEMBER; },
          [](PlanChoice& c, unsigned value) { c.*MEMBER = static_cast<std::decay_t<decltype(c.*MEMBER)>>(value); }};
}

const Detail kDetails[] = {
    detail<&PlanChoice::cluster>("cluster", 16, "1, 2, 4, 8 or 16"),
    detail<&PlanChoice::groups>("groups", 65535, "from 1 to 65535"),
    detail<&PlanChoice::splits>("splits", 65535, "from 1 to 65535"),
    detail<&PlanChoice::tile_vecs>("tile_vecs", kMaxTileVecs, "from 1 to 16"),
};

void check(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

void parse_detail(PlanChoice& choice, const std::string& text) {
  const size_t equals = text.find('=');
  const std::string name = text.substr(0, equals), value = equals == std::string::npos ? "" : text.substr(equals + 1);
  const auto detail =
      std::find_if(std::begin(kDetails), std::end(kDetails), [&](const Detail& d) { return d.name == name; });
  check(detail != std::end(kDetails),
        "a detail of plan 'resident' should be " +
            alternatives(kDetails, [](const Detail& d) { return std::string(d.name) + "=NUMBER"; }) + ", not " +
            in_quotes(text));
  const bool digits = !value.empty() && value.size() <= 5 && value.find_first_not_of("0123456789") == std::string::npos;
  const unsigned number = digits ? std::stoul(value) : 0;
  const bool power = (number & (number - 1)) == 0 || name != "cluster";
  check(number >= 1 && number <= detail->max && power,
        name + " of plan 'resident' should be " + detail->allowed + ", not " + in_quotes(value));
  check(detail->get(choice) == 0, name + " of plan 'resident' is given twice");
  detail->set(choice, number);
}

}  // namespace

PlanChoice parse_choice(const std::string& text) {
  const size_t colon = text.find(':');
  PlanChoice choice;
  check(find_name(kPlanKindNames, text.substr(0, colon), &choice.kind),
        "plan should be " + alternatives(kPlanKindNames, in_quotes) + ", not " + in_quotes(text));
  if (colon == std::string::npos) return choice;
  check(choice.kind == PlanKind::resident, "only plan 'resident' has details, got " + in_quotes(text));
  size_t begin = colon + 1, comma;
  do {
    comma = text.find(',', begin);
    parse_detail(choice, text.substr(begin, comma - begin));
    begin = comma + 1;
  } while (comma != std::string::npos);
  check(!choice.cluster || !choice.grouped(),
        "plan 'resident' has clusters, or groups and splits, got " + in_quotes(text));
  return choice;
}

std::string to_string(const PlanChoice& choice) {
  std::string out = name_of(choice.kind);
  char separator = ':';
  for (const Detail& detail : kDetails) {
    const unsigned value = detail.get(choice);
    if (value == 0) continue;
    out += separator + std::string(detail.name) + "=" + std::to_string(value);
    separator = ',';
  }
  return out;
}

}  // namespace bnext::cuda
