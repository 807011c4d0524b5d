// Prints how csrc/cpu/plan.h cuts a shape: a line for each pass over it, with the elements of each of its tasks.
// Arguments: planar or interleaved, n, c, s.
#include <cstdio>
#include <cstdlib>

#include "../csrc/cpu/plan.h"

using namespace bnext;
using namespace bnext::cpu;

namespace {

void print_groups(const char* name, const Plan& plan, int64_t each) {
  std::printf("%s", name);
  for (int64_t first = 0; first < plan.channels; first += each)
    std::printf(" %lld", static_cast<long long>(std::min(each, plan.channels - first) * plan.outer * plan.inner));
  std::printf("\n");
}

}  // namespace

int main(int, char** argv) {
  Layout layout = {};
  if (!find_name(kLayoutNames, argv[1], &layout)) return 1;
  const Plan plan = make_plan({layout, std::atoll(argv[2]), std::atoll(argv[3]), std::atoll(argv[4])});
  if (plan.channels_per_task > 0) {
    print_groups("whole", plan, plan.channels_per_task);
    if (plan.channels_per_masked_task > 0) print_groups("masked", plan, plan.channels_per_masked_task);
    return 0;
  }
  std::printf("reduce");
  if (plan.sums_by_column) {
    for (int64_t task = 0; task < plan.blocks_down * plan.blocks_across; task++) {
      int64_t elements = 0;
      for_each_block_of_columns(plan, task, [&](int64_t, const SubMatrix& b) { elements += b.rows * b.width; });
      std::printf(" %lld", static_cast<long long>(elements));
    }
  } else {
    const int64_t strip = plan.outer * plan.inner;
    for (int64_t ch = 0; ch < plan.channels; ch++)
      for (int64_t i = 0; i < plan.pieces; i++)
        std::printf(" %lld", static_cast<long long>(std::min(plan.piece, strip - i * plan.piece)));
  }
  std::printf("\napply");
  for (int64_t i = 0; i < plan.grains; i++)
    std::printf(" %lld", static_cast<long long>(std::min(plan.grain, plan.numel() - i * plan.grain)));
  std::printf("\n");
}
