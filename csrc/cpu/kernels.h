// The inner loops' interface: everything that is compiled once for each instruction set. A kernel
// works on one block of one tensor, knows nothing of threads, and leaves the merging of partial
// results, which must not depend on the machine, to the stage that calls it.
#pragma once

#include "../core/params.h"
#include "../core/welford.h"

namespace bnext::cpu {

// `rows` runs of `width` contiguous elements, `stride` elements apart; `first` is the index of the
// first one. A channel's parameters are either the same along a row (a row is a piece of an image
// of one channel) or differ from column to column. In the first case row r takes entry
// param + r * param_step of the parameter arrays, in the second column j takes entry param + j.
struct SubMatrix {
  int64_t first, rows, width, stride;
  int64_t param, param_step;
};

// Arrays with an entry per column are read and written in whole vectors: this is the padding that
// every one of them has behind its end.
constexpr int64_t kPadding = 16;

// Rows that a column kernel sums up in the storage's accumulation type before it goes on in double.
constexpr int64_t kColumnRows = 32;
// Elements that a row kernel sums up likewise, each row rounded up to kRowStep, its 4 vectors of
// float: 32 to a lane. Their squares may reach 4e36 without overflow, and they stay in the
// first-level cache for a second look.
constexpr int64_t kRowStep = 64;
constexpr int64_t kRowElements = 32 * kRowStep;
// Columns of a block of a column kernel, at most.
constexpr int64_t kColumns = 512;

// Numbers whose deviations are summed up around one centre, for each number that the centre is the mean of.
constexpr int64_t kPerCentre = 4;

// Kernels come in variants. Without an activation and with relu, the two that are everywhere, an element takes an
// instruction or two, and has kernels of its own. All other activations share the `general` variant, which keeps a
// row's z, the activation's argument, in a buffer, and goes over that with one activation's loop. Rows of the `general`
// elementwise kernels are at most this long; sums are limited anyway.
constexpr int64_t kGeneralRow = kRowElements;

template <class A>
struct NormalizeArgs {
  const void* x;
  const void* residual;
  void* y;
  uint8_t* mask;
  const A *mean, *scale, *bias;
  Activation activation;
  A activation_param;
  bool stream;  // y is too large to be found in cache by whoever reads it next
};

// Values of Epilogue and of Derivative that kernels here have.
constexpr int kEpilogues = 5;
constexpr int kDerivatives = 4;

template <class A>
struct BackwardArgs {
  const void* dy;
  const void* x;
  const uint8_t* mask;
  const void* residual;  // `general` only
  const A *mean, *scale, *bias;
  const A *mean_dy, *slope;  // gradient in training only
  Activation activation;
  A activation_param;
  void* dx;
  void* dresidual;
  void* dz;     // where not null, the `general` sums write dy' here, in the tensors' dtype
  bool stream;  // likewise of dx and dresidual
};

template <class A>
struct Kernels {
  // A centre for the block as a whole, within kRowElements; and statistics around it, or around another that is good
  // enough (kPerCentre).
  // Meanwhile the block that begins at element `next` is fetched into cache.
  A (*centre)(const void* x, const SubMatrix&);
  Welford<double> (*moments)(const void* x, const SubMatrix&, A centre, int64_t next);
  // Statistics of each column, over at most kColumns columns: shift, offset and var of Welford.
  void (*column_moments)(const void* x, const SubMatrix&, A* shift, double* offset, double* var);

  // y and, where it is given, the mask.
  void (*normalize[kEpilogues][2])(const NormalizeArgs<A>&, const SubMatrix&);  // [epilogue][by column]

  // Sums of dy' and of dy' * (x - mean), of the block as a whole or of each column: same limits.
  void (*sums[kDerivatives])(const BackwardArgs<A>&, const SubMatrix&, int64_t next, double* sum_dy,
                             double* sum_dy_xmu);  // [derivative]
  void (*column_sums[kDerivatives])(const BackwardArgs<A>&, const SubMatrix&, double* sum_dy,
                                    double* sum_dy_xmu);  // [derivative]

  // dx and, where not null, dresidual.
  void (*gradient[kDerivatives][2][2])(const BackwardArgs<A>&, const SubMatrix&);  // [derivative][training][by column]
};

// One for each storage type: the list to extend for a new one, with its loads and stores in isa_*.h.
struct KernelSet {
  Kernels<float> f32, f16, bf16;
  Kernels<double> f64;
};

// The best that this machine can run, chosen once. BNEXT_CPU=portable, avx2 or avx512 in the
// environment lowers the choice. Throws std::invalid_argument where it names none, or one that this machine lacks.
const KernelSet& kernel_set();

template <class A> const Kernels<A>& kernels(DType);
template <> inline const Kernels<double>& kernels<double>(DType) { return kernel_set().f64; }
template <> inline const Kernels<float>& kernels<float>(DType t) {
  const KernelSet& set = kernel_set();
  switch (t) {
    case DType::f32: return set.f32;
    case DType::f16: return set.f16;
    case DType::bf16: return set.bf16;
    case DType::f64: break;  // accumulates in double: the other function's
  }
  BNEXT_UNREACHABLE();
}

}  // namespace bnext::cpu
