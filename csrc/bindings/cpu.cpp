// The operators on CPU tensors.
#include "../cpu/cpu.h"

#include <ATen/Parallel.h>

#include "batch_norm_ops.h"

#if AT_PARALLEL_OPENMP && !defined(_OPENMP)
#error "compile with -fopenmp: without it at::parallel_for uses one thread"
#endif

namespace bnext {
namespace {

void parallel_for(int64_t tasks, const std::function<void(int64_t, int64_t)>& body) {
  at::parallel_for(0, tasks, 1, body);
}

struct Cpu {
  static constexpr bool executes = true;
  using Int = int64_t;

  static void stats(const BatchNormForwardParams& p, const Tensor&) { cpu::batch_norm_stats(p, parallel_for); }
  static void normalize(const BatchNormForwardParams& p, const Tensor&) { cpu::batch_norm_normalize(p, parallel_for); }
  static void forward(const BatchNormForwardParams& p, const Tensor&) { cpu::batch_norm_forward(p, parallel_for); }
  static void check_forward(const BatchNormForwardParams&, const Tensor&) {}
  static void merge(const BatchNormMergeParams& p, const Tensor&) {
    TORCH_CHECK_VALUE(cpu::batch_norm_merged_count(p) != 1,
                      "Expected more than 1 value per channel when training, got one from all processes together");
    cpu::batch_norm_merge(p);
  }
  static void backward_reduce(const BatchNormBackwardParams& p, const Tensor&) {
    cpu::batch_norm_backward_reduce(p, parallel_for);
  }
  static void backward_input(const BatchNormBackwardParams& p, const Tensor&) {
    cpu::batch_norm_backward_input(p, parallel_for);
  }
  static void backward(const BatchNormBackwardParams& p, const Tensor&) { cpu::batch_norm_backward(p, parallel_for); }
};

}  // namespace

TORCH_LIBRARY_IMPL(bnext, CPU, m) { register_batch_norm<Cpu>(m); }

}  // namespace bnext
