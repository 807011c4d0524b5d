// The element-wise arithmetic of normalization and its gradient: written once, for scalars and for the CPU's vectors,
// so that the backward recomputes the very bits whose sign the forward acted on.
#pragma once

#include <cmath>

#include "types.h"

namespace bnext {

// ---- the operations that a vector overloads, for scalars

BNEXT_HD float fma(float a, float b, float c) { return std::fma(a, b, c); }
BNEXT_HD double fma(double a, double b, double c) { return std::fma(a, b, c); }
// c - a * b
BNEXT_HD float fnma(float a, float b, float c) { return std::fma(-a, b, c); }
BNEXT_HD double fnma(double a, double b, double c) { return std::fma(-a, b, c); }

// ---- for V a float, a double or a vector of them, and x_minus_mean already found

// y = (x - mean) * scale + bias, with scale = weight * invstd.
template <class V>
BNEXT_HD V affine(const V& x_minus_mean, const V& scale, const V& bias) {
  return fma(x_minus_mean, scale, bias);
}

// dx = (dy' - mean_dy - (x - mean) * slope) * scale, with
//   mean_dy = sum_dy / count,  slope = sum_dy_xmu * invstd^2 / count.
template <class V>
BNEXT_HD V input_gradient(const V& dy, const V& x_minus_mean, const V& mean_dy, const V& slope, const V& scale) {
  return fnma(x_minus_mean, slope, dy - mean_dy) * scale;
}

// One channel's normalization. Subtracting before scaling keeps y exact where |mean| is far above the deviation;
// folding mean into bias would cancel there.
template <class A>
struct Affine {
  A mean, scale, bias;

  BNEXT_HD A operator()(A x) const { return affine(x - mean, scale, bias); }
};

// One channel's input gradient. In eval mode mean_dy and slope are 0.
template <class A>
struct AffineGradient {
  A mean, scale, mean_dy, slope;

  BNEXT_HD A operator()(A dy, A x) const { return input_gradient(dy, x - mean, mean_dy, slope, scale); }
};

}  // namespace bnext
