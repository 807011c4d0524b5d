// What the operators do on Meta tensors, for tracing, and in autograd. Their schemas are in bnext/operators.py, since
// saved programs need them before anything is compiled or loaded.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>

#include "batch_norm_ops.h"

namespace bnext {

// The operators compute; batch_norm is what has gradients. A backward through one of them says so, instead of leaving
// gradients out in silence.
TORCH_LIBRARY_IMPL(bnext, Autograd, m) {
  for (const char* name : kBatchNormOps) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
}

struct Meta {
  static constexpr bool executes = false;
  using Int = c10::SymInt;
};

TORCH_LIBRARY_IMPL(bnext, Meta, m) { register_batch_norm<Meta>(m); }

}  // namespace bnext
