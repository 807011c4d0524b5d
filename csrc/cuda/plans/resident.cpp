// Plan `resident`: one launch, of the kernel for the way that channels lie in memory.
#include "plans.h"

namespace bnext::cuda {

template <class Params>
cudaError_t launch_resident_plan(const Params& p, const Plan& plan, const Scratch& scratch, cudaStream_t stream) {
  const Partition& partition = plan.resident;
  if (!partition.by_columns) return launch_resident_planar(p, partition, scratch, stream);
  if (partition.packed()) return launch_resident_packed(p, partition, scratch, stream);
  return launch_resident_interleaved(p, partition, scratch, stream);
}

BNEXT_INSTANTIATE(launch_resident_plan, const Plan&, const Scratch&, cudaStream_t)

}  // namespace bnext::cuda
