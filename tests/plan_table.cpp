// Prints the plan of each problem on standard input, one JSON object a line. A problem is
//   cc multiprocessors shared shared_of_a_block l2 bandwidth clusters_of_2 of_4 of_8 of_16  planar|interleaved dtype n
//   c s forward|backward masked plan margin
// `plan_table choices` reads plans instead, and prints each again, or what is wrong with it.
#include <cstring>
#include <iostream>
#include <stdexcept>
#include <string>

#include "../csrc/cuda/planner/plan.h"

using namespace bnext;
using namespace bnext::cuda;

void print(const char* name, const Partition& p) {
  std::cout << ",\"" << name << "\":{\"columns\":" << p.by_columns << ",\"aligned\":" << p.planar.aligned
            << ",\"vec\":" << p.vec << ",\"threads\":" << p.threads << ",\"tiles\":" << p.tiles
            << ",\"groups\":" << p.groups << ",\"splits\":" << p.splits << ",\"l2_steps\":" << p.l2_steps
            << ",\"pdl\":" << p.pdl << ",\"starts_next\":" << p.starts_next
            << ",\"tile_channels\":" << p.columns.tile_channels << ",\"packs\":" << p.columns.packs
            << ",\"clustered\":" << p.clustered << ",\"late\":[" << p.first_wave << "," << p.stagger_cycles << ","
            << p.prefetch_vecs << "]"
            << ",\"steps\":" << p.steps << ",\"steps_per_split\":" << p.steps_per_split
            << ",\"shared_bytes\":" << p.shared_bytes << ",\"resident_bytes\":" << p.resident_bytes
            << ",\"register_vecs\":" << p.register_vecs << ",\"reread_bytes\":" << p.reread_bytes
            << ",\"exchange_bytes\":" << p.exchange_bytes << ",\"plane_vecs\":" << p.planar.plane_vecs
            << ",\"stride_planes\":" << p.planar.stride_planes << ",\"stride_vecs\":" << p.planar.stride_vecs
            << ",\"cols\":" << p.columns.cols << ",\"tile_vecs\":" << p.columns.tile_vecs
            << ",\"row_threads\":" << p.columns.row_threads << ",\"merge_section\":" << p.merge_section
            << ",\"thread_rows\":" << p.columns.thread_rows << ",\"repeat\":" << p.repeat << ",\"fits\":" << p.fits()
            << "}";
}

void print_choices() {
  for (std::string line; std::getline(std::cin, line);) {
    try {
      std::cout << to_string(parse_choice(line)) << "\n";
    } catch (const std::invalid_argument& error) {
      std::cout << "error: " << error.what() << "\n";
    }
  }
}

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "choices") == 0) {
    print_choices();
    return 0;
  }
  DeviceProperties device;
  std::string layout, dtype, direction, wish, refusal;
  Shape shape;
  int masked, margin;
  while (std::cin >> device.compute_capability >> device.multiprocessors >> device.shared_per_multiprocessor >>
         device.shared_per_block >> device.l2_bytes >> device.bandwidth >> device.clusters_together[0] >>
         device.clusters_together[1] >> device.clusters_together[2] >> device.clusters_together[3] >> layout >> dtype >>
         shape.n >> shape.c >> shape.s >> direction >> masked >> wish >> margin) {
    const PlanOptions options = {parse_choice(wish), margin};
    refusal.clear();
    DType type = {};
    if (!find_name(kLayoutNames, layout, &shape.layout) || !find_name(kDTypeNames, dtype, &type)) return 1;
    Plan plan;
    uint8_t present = 0;  // plans look at whether a pointer is null only
    if (direction == "forward") {
      BatchNormForwardParams p = {};
      p.shape = shape;
      p.dtype = type;
      p.activation = masked ? Activation::relu : Activation::none;
      p.residual = masked ? &present : nullptr;
      p.mask = masked ? &present : nullptr;
      plan = make_plan(p, device, options, &refusal);
    } else {
      BatchNormBackwardParams p = {};
      p.shape = shape;
      p.dtype = type;
      p.activation = masked ? Activation::relu : Activation::none;
      p.mask = masked ? &present : nullptr;
      p.dresidual = masked ? &present : nullptr;
      p.dx = p.dweight = &present;
      plan = make_plan(p, device, options, &refusal);
    }
    std::cout << "{\"kind\":\"" << name_of(plan.kind) << "\",\"refusal\":\"" << refusal << "\",\"text\":\""
              << describe(plan) << "\",\"blocks\":" << plan.blocks << ",\"partial_bytes\":" << plan.partial_bytes
              << ",\"counters\":" << plan.counters << ",\"flagged_bytes\":" << plan.flagged_bytes
              << ",\"cluster\":" << plan.cluster() << ",\"cooperative\":" << plan.cooperative();
    print("resident", plan.resident);
    print("reduce", plan.reduce);
    print("apply", plan.apply);
    std::cout << "}\n";
  }
}
