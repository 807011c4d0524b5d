// The inner loops' interface: everything that is compiled once for each instruction set. A kernel
// works on one block of one tensor, knows nothing of threads, and leaves the merging of partial
// results, which must not depend on the machine, to the stage that calls it.
#pragma once

#include <type_traits>

#include "../core/epilogue.h"
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
// Rows that it takes at once, so that what belongs to a column is loaded once for all of them.
constexpr int64_t kRowsAtOnce = 4;
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
  bool beyond_cache;  // stores go past the caches, since the tensors together exceed these
};

// Kernels here are compiled for all values of Epilogue and of Derivative but the last, `run_time`.
constexpr int kEpilogues = static_cast<int>(Epilogue::run_time);
constexpr int kDerivatives = static_cast<int>(Derivative::run_time);

// Of dy' and of dy' * (x - mean).
struct Sums {
  double dy, dy_xmu;

  void add(const Sums& other) {
    dy += other.dy;
    dy_xmu += other.dy_xmu;
  }
};

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
  void* dz;           // where not null, the `general` sums write dy' here, in the tensors' dtype
  bool beyond_cache;  // likewise
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

  // Sums of the block as a whole or of each column: same limits. The first also takes a block of whole runs together
  // with those of the channels after it, since a call takes as long as the sums of a short plane.
  void (*sums[kDerivatives])(const BackwardArgs<A>&, const SubMatrix&, int64_t channels, int64_t next,
                             Sums*);  // [derivative]
  void (*column_sums[kDerivatives])(const BackwardArgs<A>&, const SubMatrix&, double* sum_dy,
                                    double* sum_dy_xmu);  // [derivative]

  // dx and, where not null, dresidual.
  void (*gradient[kDerivatives][2][2])(const BackwardArgs<A>&, const SubMatrix&);  // [derivative][training][by column]

  // Must follow elementwise kernels whose tensors are beyond the cache, before another thread may look at their
  // outputs.
  void (*stream_fence)();
};

// The kernels of every storage type.
struct KernelSet {
#define BNEXT_MEMBER(name, type, python) Kernels<acc_t<type>> of_##name;
  BNEXT_DTYPES(BNEXT_MEMBER)
#undef BNEXT_MEMBER
};

// The best that this machine can run, chosen once. BNEXT_CPU in the environment lowers the choice, to a name in
// BNEXT_INSTRUCTION_SETS (isa.h). Throws std::invalid_argument where it names none, or one that this machine lacks.
const KernelSet& kernel_set();

// The kernels of a storage type that is accumulated in A.
template <class A>
const Kernels<A>& kernels(DType t) {
  const KernelSet& set = kernel_set();
  switch (t) {
#define BNEXT_CASE(name, type, python)                                  \
  case DType::name:                                                     \
    if constexpr (std::is_same_v<acc_t<type>, A>) return set.of_##name; \
    else break;
    BNEXT_DTYPES(BNEXT_CASE)
#undef BNEXT_CASE
  }
  BNEXT_UNREACHABLE();
}

}  // namespace bnext::cpu
