// Tensors as operands of core/activation.h: what it asks of a V, in differentiable operators.
#pragma once

#include <ATen/ATen.h>

#include <utility>

#include "../core/activation.h"

namespace bnext {

// A tensor of a name space that is ours, where overloads for it are found. Operators return plain tensors, which become
// operands again.
struct Operand : at::Tensor {
  Operand(at::Tensor t) : at::Tensor(std::move(t)) {}  // NOLINT: implicit on purpose
};

inline Operand constant_like(const Operand& z, double v) { return at::scalar_tensor(v, z.options()); }
inline Operand where_le(const Operand& z, double limit, const Operand& a, const Operand& b) {
  return at::where(z.le(limit), a, b);
}
inline Operand where_ge(const Operand& z, double limit, const Operand& a, const Operand& b) {
  return at::where(z.ge(limit), a, b);
}
inline Operand fma(const Operand& a, const Operand& b, const Operand& c) { return a * b + c; }
// Its own operator, whose derivatives do not pass through the infinite exp(-z) of a z far below 0.
inline Operand sigmoid(const Operand& z) { return at::sigmoid(z); }

}  // namespace bnext
