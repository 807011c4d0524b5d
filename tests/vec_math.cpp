// csrc/cpu/vec_math.h as functions on arrays, for the instruction set whose header ISA names.
#include ISA

#include "../csrc/cpu/vec_math.h"

namespace {

template <class A, class F>
void apply(const A* in, A* out, int64_t n, F f) {
  using namespace bnext::cpu;
  for (int64_t i = 0; i < n; i += Vec<A>::lanes) store(out + i, Full{}, f(load(in + i, Full{})));
}

}  // namespace

// n is a multiple of 16.
extern "C" {
void exp_float(const float* in, float* out, int64_t n) {
  apply(in, out, n, [](auto v) { return exp(v); });
}
void exp_double(const double* in, double* out, int64_t n) {
  apply(in, out, n, [](auto v) { return exp(v); });
}
void tanh_float(const float* in, float* out, int64_t n) {
  apply(in, out, n, [](auto v) { return tanh(v); });
}
void tanh_double(const double* in, double* out, int64_t n) {
  apply(in, out, n, [](auto v) { return tanh(v); });
}
void negative_float(const float* in, float* out, int64_t n) {
  apply(in, out, n, [](auto v) { return -v; });
}
void negative_double(const double* in, double* out, int64_t n) {
  apply(in, out, n, [](auto v) { return -v; });
}
}
