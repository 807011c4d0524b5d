// Prints the plan of each problem on standard input, one JSON object a line. A problem is
//   cc multiprocessors threads shared shared_of_a_block  planar|interleaved dtype n c s  forward|backward masked choice
#include <iostream>
#include <string>

#include "../csrc/cuda/plan.h"

using namespace bnext;
using namespace bnext::cuda;

const char* const kKinds[] = {"resident", "small", "two_pass"};

void print(const char* name, const Pass& p) {
  std::cout << ",\"" << name << "\":{\"columns\":" << p.columns << ",\"aligned\":" << p.aligned << ",\"unit\":" << p.unit
            << ",\"threads\":" << p.threads << ",\"tiles\":" << p.tiles << ",\"splits\":" << p.splits
            << ",\"steps\":" << p.steps << ",\"steps_per_split\":" << p.steps_per_split
            << ",\"shared_bytes\":" << p.shared_bytes << ",\"kept_bytes\":" << p.kept_bytes << ",\"plane_units\":" << p.plane_units
            << ",\"stride_planes\":" << p.stride_planes << ",\"stride_units\":" << p.stride_units
            << ",\"cols\":" << p.cols << ",\"lanes\":" << p.lanes << ",\"lane_rows\":" << p.lane_rows
            << ",\"repeat\":" << p.repeat << ",\"fits\":" << p.fits() << "}";
}

int main() {
  DeviceProperties device;
  std::string layout, dtype, direction;
  Shape shape;
  int masked, choice;
  while (std::cin >> device.compute_capability >> device.multiprocessors >> device.threads_per_multiprocessor >>
         device.shared_per_multiprocessor >> device.shared_per_block >> layout >> dtype >> shape.n >> shape.c >> shape.s >> direction >> masked >> choice) {
    shape.layout = layout == "planar" ? Layout::planar : Layout::interleaved;
    const DType type = dtype == "f32" ? DType::f32 : dtype == "f64" ? DType::f64 : dtype == "f16" ? DType::f16 : DType::bf16;
    Plan plan;
    uint8_t present = 0;  // plans look at whether a pointer is null only
    if (direction == "forward") {
      ForwardParams p = {};
      p.shape = shape;
      p.dtype = type;
      p.activation = masked ? Activation::relu : Activation::none;
      p.residual = masked ? &present : nullptr;
      plan = plan_forward(p, device, static_cast<PlanChoice>(choice));
    } else {
      BackwardParams p = {};
      p.shape = shape;
      p.dtype = type;
      p.activation = masked ? Activation::relu : Activation::none;
      p.mask = masked ? &present : nullptr;
      plan = plan_backward(p, device, static_cast<PlanChoice>(choice));
    }
    std::cout << "{\"kind\":\"" << kKinds[static_cast<int>(plan.kind)]
              << "\",\"partial_bytes\":" << plan.partial_bytes << ",\"counters\":" << plan.counters;
    print("whole", plan.whole);
    print("reduce", plan.reduce);
    print("apply", plan.apply);
    std::cout << "}\n";
  }
}
