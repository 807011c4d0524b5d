// What crosses from the bindings to a backend: one plain struct for each direction, whose
// stages read and write subsets of its fields. Zero-initialised ({}), every pointer nullable
// unless it says otherwise; a backend never allocates, owns or frees any of them.
//
// Tensors (x, residual, y, dy, dx, dresidual) are dense in the physical order that `shape`
// describes, all of one dtype, and start on a 16-byte boundary. Vectors are [c] and dense.
// acc_t is double for f64 tensors and float for all others.
#pragma once

#include "activation.h"

namespace bnext {

struct Shape {
  Layout layout;
  int64_t n, c, s;  // s is the product of the spatial sizes; (N, C) inputs have s = 1

  BNEXT_HD constexpr int64_t numel() const { return n * c * s; }
  BNEXT_HD constexpr int64_t per_channel() const { return n * s; }
};

struct BatchNormForwardParams {
  Shape shape;
  DType dtype;          // of x, residual, y
  DType weight_dtype;   // of weight and bias: that of x, or of what x is accumulated in; likewise the next
  DType running_dtype;  // of running_mean and running_var
  Activation activation;
  double activation_param;  // leaky_relu's slope; 0 for all others

  const void* x;         // required
  const void* residual;  // like x; added before the activation
  const void* weight;    // [c]; null means 1
  const void* bias;      // [c]; null means 0

  void* mean;       // [c] acc_t
  void* mean_rest;  // [c] acc_t: what rounding took from mean; written by `stats` only, where not null
  void* var;        // [c] acc_t, biased; written by `stats` only
  void* invstd;     // [c] acc_t, 1 / sqrt(var + eps)

  // Both or neither. `forward` updates them, with the unbiased batch variance, as torch does, unless `biased`;
  // `normalize`, where they are given, normalizes by them (eval mode) and writes mean and invstd
  // where those are not null; else it reads mean (null means 0) and invstd.
  void* running_mean;            // [c]
  void* running_var;             // [c]
  int64_t* num_batches_tracked;  // [1]; `forward` adds one
  double momentum;               // weight of the new batch
  bool cumulative;               // momentum=None: the weight is 1 / num_batches_tracked, after adding one
  bool biased;                   // running_var takes the biased batch variance, as Keras and Flax do
  double eps;

  void* y;        // like x
  uint8_t* mask;  // [ceil(numel / 8)]; bit i % 8 of byte i / 8 says that the activation's derivative at element i, in
                  // memory order, is 1; unused bits are 0. Only behind a residual, for activations that keep a bit
};

struct BatchNormBackwardParams {
  Shape shape;
  DType dtype;         // of dy, x, dx, dresidual
  DType weight_dtype;  // of weight, bias, dweight, dbias: that of x, or of what x is accumulated in
  Activation activation;
  double activation_param;
  bool training;  // false: mean and invstd are constants, and dx = dy' * weight * invstd

  const void* dy;  // required
  const void* x;   // required, except for dx alone in eval mode without an activation
  // With an activation, one of three gives its derivative: the forward's mask; or its argument, computed anew from x,
  // mean, invstd, weight, bias, and, where it is given, the residual.
  const uint8_t* mask;
  const void* residual;  // like x
  const void* weight;    // [c]; null means 1
  const void* bias;      // [c]; null means 0
  const void* mean;      // [c] acc_t, required
  const void* invstd;    // [c] acc_t, required
  int64_t count;         // elements a channel's statistics were taken over; n * s unless synchronised

  // With dy' = dy times the activation's derivative:
  void* sum_dy;      // [c] acc_t: sum of dy'. Written by `backward_reduce`, read by `backward_input`
  void* sum_dy_xmu;  // [c] acc_t: sum of dy' * (x - mean). Likewise
  void* dweight;     // [c] weight_dtype: sum_dy_xmu * invstd
  void* dbias;       // [c] weight_dtype: sum_dy

  void* dx;         // like x
  void* dresidual;  // like x: dy'; only with an activation (without one it is dy itself)

  // Which halves of the backward the requested outputs need.
  BNEXT_HD bool elementwise() const { return dx || dresidual; }
  BNEXT_HD bool reduces() const { return needs_sums(training, dx, dweight, dbias); }
  BNEXT_HD static bool needs_sums(bool training, bool dx, bool dweight, bool dbias) {
    return dweight || dbias || (training && dx);
  }
};

// What follows the affine step of a forward. All but `general` have kernels of their own on both backends.
enum class Epilogue : int32_t {
  none,
  relu,
  add,       // a residual
  add_relu,  // which keeps a bit an element, where there is a mask
  general,   // any activation, residual or not
  run_time,  // none or relu, residual or not, looked up: for CUDA kernels that instructions do not bound
};

// Whether kernels of these take vectors of 8 elements, whose bits of the mask are a byte.
BNEXT_HD constexpr bool masks(Epilogue e) {
  switch (e) {
    case Epilogue::none:
    case Epilogue::relu:
    case Epilogue::add: return false;
    case Epilogue::add_relu:
    case Epilogue::general:
    case Epilogue::run_time: return true;
  }
  BNEXT_UNREACHABLE();
}

inline Epilogue epilogue_of(const BatchNormForwardParams& p) {
  if (p.activation == Activation::none) return p.residual != nullptr ? Epilogue::add : Epilogue::none;
  if (p.activation == Activation::relu) return p.residual != nullptr ? Epilogue::add_relu : Epilogue::relu;
  return Epilogue::general;
}

// Where a backward finds the activation's derivative. All but `general` have kernels of their own on both backends.
enum class Derivative : int32_t {
  none,      // there is no activation
  relu,      // 0 or 1, computed anew from x
  mask,      // 0 or 1, from the bits that the forward kept
  general,   // any, from the bits, or from x and the residual, if that is given
  run_time,  // none, relu or mask, looked up: for CUDA kernels that instructions do not bound
};

BNEXT_HD constexpr bool masks(Derivative d) {
  switch (d) {
    case Derivative::none:
    case Derivative::relu: return false;
    case Derivative::mask:
    case Derivative::general:
    case Derivative::run_time: return true;
  }
  BNEXT_UNREACHABLE();
}

inline Derivative derivative_of(const BatchNormBackwardParams& p) {
  if (p.activation == Activation::none) return Derivative::none;
  if (p.mask != nullptr) return p.activation_param == 0 ? Derivative::mask : Derivative::general;
  return p.activation == Activation::relu && p.residual == nullptr ? Derivative::relu : Derivative::general;
}

}  // namespace bnext
