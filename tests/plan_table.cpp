// Prints the plan of each problem on standard input, one JSON object a line. A problem is
//   cc multiprocessors shared shared_of_a_block l2 large_clusters  planar|interleaved dtype n c s
//   forward|backward masked kind margin
#include <iostream>
#include <string>

#include "../csrc/cuda/plan.h"

using namespace bnext;
using namespace bnext::cuda;

const char* const kKinds[] = {"automatic", "resident", "cooperative", "two_pass"};

void print(const char* name, const Partition& p) {
  std::cout << ",\"" << name << "\":{\"columns\":" << p.columns << ",\"aligned\":" << p.aligned
            << ",\"vec\":" << p.vec << ",\"threads\":" << p.threads << ",\"tiles\":" << p.tiles
            << ",\"groups\":" << p.groups << ",\"splits\":" << p.splits << ",\"buffers\":" << p.buffers
            << ",\"l2_steps\":" << p.l2_steps << ",\"pdl\":" << p.pdl
            << ",\"tile_channels\":" << p.tile_channels << ",\"packs\":" << p.packs << ",\"clustered\":" << p.clustered
            << ",\"steps\":" << p.steps << ",\"steps_per_split\":" << p.steps_per_split
            << ",\"shared_bytes\":" << p.shared_bytes << ",\"resident_bytes\":" << p.resident_bytes
            << ",\"plane_vecs\":" << p.plane_vecs << ",\"stride_planes\":" << p.stride_planes
            << ",\"stride_vecs\":" << p.stride_vecs << ",\"cols\":" << p.cols << ",\"tile_vecs\":" << p.tile_vecs
            << ",\"thread_rows\":" << p.thread_rows << ",\"repeat\":" << p.repeat << ",\"fits\":" << p.fits() << "}";
}

int main() {
  DeviceProperties device;
  std::string layout, dtype, direction;
  Shape shape;
  int masked, kind, margin;
  while (std::cin >> device.compute_capability >> device.multiprocessors >> device.shared_per_multiprocessor >>
         device.shared_per_block >> device.l2_bytes >> device.large_clusters >> layout >> dtype >> shape.n >> shape.c >>
         shape.s >> direction >> masked >> kind >> margin) {
    const PlanOptions options = {static_cast<PlanKind>(kind), margin};
    shape.layout = layout == "planar" ? Layout::planar : Layout::interleaved;
    const DType type = dtype == "f32"   ? DType::f32
                       : dtype == "f64" ? DType::f64
                       : dtype == "f16" ? DType::f16
                                        : DType::bf16;
    Plan plan;
    uint8_t present = 0;  // plans look at whether a pointer is null only
    if (direction == "forward") {
      ForwardParams p = {};
      p.shape = shape;
      p.dtype = type;
      p.activation = masked ? Activation::relu : Activation::none;
      p.residual = masked ? &present : nullptr;
      p.mask = masked ? &present : nullptr;
      plan = plan_forward(p, device, options);
    } else {
      BackwardParams p = {};
      p.shape = shape;
      p.dtype = type;
      p.activation = masked ? Activation::relu : Activation::none;
      p.mask = masked ? &present : nullptr;
      p.dx = p.dweight = &present;
      plan = plan_backward(p, device, options);
    }
    std::cout << "{\"kind\":\"" << kKinds[static_cast<int>(plan.kind)] << "\",\"blocks\":" << plan.blocks
              << ",\"partial_bytes\":" << plan.partial_bytes << ",\"counters\":" << plan.counters;
    print("resident", plan.resident);
    print("reduce", plan.reduce);
    print("apply", plan.apply);
    std::cout << "}\n";
  }
}
