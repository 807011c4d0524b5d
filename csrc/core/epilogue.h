// The element-wise arithmetic of normalization and its gradient: written once, so that the
// backward recomputes the very bits whose sign the forward acted on.
#pragma once

#include <cmath>

#include "types.h"

namespace bnext {

// One channel's normalization: y = (x - mean) * scale + bias, with scale = weight * invstd.
// Subtracting before scaling keeps y exact where |mean| is far above the deviation; folding
// mean into bias would cancel there.
template <class A>
struct Affine {
  A mean, scale, bias;

  BNEXT_HD A operator()(A x) const { return std::fma(x - mean, scale, bias); }
};

// One channel's input gradient: dx = (dy' - mean_dy - (x - mean) * slope) * scale, with
//   mean_dy = sum_dy / count,  slope = sum_dy_xmu * invstd^2 / count.
// In eval mode mean_dy and slope are 0.
template <class A>
struct AffineGradient {
  A mean, scale, mean_dy, slope;

  BNEXT_HD A operator()(A dy, A x) const { return (dy - mean_dy - (x - mean) * slope) * scale; }
};

}  // namespace bnext
