// Which kernels a shape gets, with what grids: a pure function of the problem and the device, so
// that a table test on any machine can check it. Nothing here touches CUDA.
#pragma once

#include <array>
#include <iterator>
#include <string>

#include "partition.h"
#include "plan_choice.h"

namespace bnext::cuda {

struct DeviceProperties {
  int32_t compute_capability;  // 10 * major + minor, of the device and of the code that runs there
  int32_t multiprocessors;
  int64_t shared_per_multiprocessor;  // bytes
  int64_t shared_per_block;           // with opt-in
  int64_t l2_bytes;
  int64_t bandwidth;  // of its memory, in bytes a microsecond, as far as a copy gets
  // So many clusters of 2, 4, 8 and 16 blocks, each with all the shared memory it may have, are there together.
  std::array<int32_t, 4> clusters_together;
  bool cooperative = true;  // grids whose blocks are all there together
  bool clusters = true;     // from compute capability 9.0 on
};

struct Plan {
  PlanKind kind;          // the stages on their own, and eval mode, take a plan of two_pass
  Partition resident;     // of that kind
  Partition reduce;       // of the others: stats, backward_reduce
  Partition apply;        // and normalize, backward_input
  int64_t blocks;         // of the kind `cooperative`
  int64_t partial_bytes;  // scratch that the kind needs
  int64_t counters;       // 32-bit counters likewise; the last is the barrier's of `cooperative`
  int64_t flagged_bytes;  // and memory of flagged numbers, for `resident` without clusters
  // Predicted times in microseconds, by kind: of this plan, and of those that it was chosen over. Else 0.
  std::array<double, std::size(kPlanKindNames)> predicted_us;

  double& us() { return predicted_us[static_cast<size_t>(kind)]; }
  // What a driver may refuse: clusters of so many blocks, if that is more than one; and that all blocks are there
  // together.
  uint32_t cluster() const { return resident.cluster(); }
  bool cooperative() const { return kind == PlanKind::cooperative || resident.cooperative(); }
};

// What a caller may ask for.
struct PlanOptions {
  PlanChoice plan = {};
  int32_t sm_margin = 0;  // multiprocessors that kernels whose blocks all have to be there together leave to others
};

// The plans of a forward (with its stages stats and normalize) and of a backward. They look at shape,
// dtype, activation, whether there are a residual (forward) or a mask (backward), whether the forward
// averages cumulatively and counts, and which gradients are wanted: of those that one pass makes, the plan is two_pass.
// It also is where the shape or the device does not allow what `options` ask for; *refusal then says why, and what
// they would allow.
Plan make_plan(const BatchNormForwardParams&, const DeviceProperties&, const PlanOptions& = {},
               std::string* refusal = nullptr);
Plan make_plan(const BatchNormBackwardParams&, const DeviceProperties&, const PlanOptions& = {},
               std::string* refusal = nullptr);

// One line for people: what is launched, scratch memory, predicted times.
std::string describe(const Plan&);

}  // namespace bnext::cuda
