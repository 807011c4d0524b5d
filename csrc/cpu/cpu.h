// The CPU backend: all that the bindings see of it. The same stages and the same semantics as
// csrc/cuda/launch.h, run through the caller's parallel_for. How work is cut into tasks and the
// order in which partial results are merged depend on the shape alone, so that the result does
// not depend on the number of threads.
#pragma once

#include <cstdint>
#include <functional>

#include "../core/merge.h"
#include "../core/params.h"

namespace bnext::cpu {

// Calls body(begin, end) on disjoint ranges that cover [0, tasks), possibly on several threads,
// and returns when all are done.
using ParallelFor = std::function<void(int64_t tasks, const std::function<void(int64_t begin, int64_t end)>& body)>;

void batch_norm_stats(const BatchNormForwardParams&, const ParallelFor&);
void batch_norm_normalize(const BatchNormForwardParams&, const ParallelFor&);
void batch_norm_forward(const BatchNormForwardParams&, const ParallelFor&);

// What of several processes is merged into the statistics that `normalize` takes; and of how many values.
void batch_norm_merge(const BatchNormMergeParams&);
int64_t batch_norm_merged_count(const BatchNormMergeParams&);

void batch_norm_backward_reduce(const BatchNormBackwardParams&, const ParallelFor&);
void batch_norm_backward_input(const BatchNormBackwardParams&, const ParallelFor&);
void batch_norm_backward(const BatchNormBackwardParams&, const ParallelFor&);

}  // namespace bnext::cpu
