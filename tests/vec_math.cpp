// csrc/cpu/vec_math.h and conversions as functions on arrays, for the instruction set whose header ISA names.
#include ISA

#include "../csrc/cpu/vec_math.h"

namespace {

template <class From, class To>
void convert(const void* in, void* out, int64_t n) {
  using namespace bnext::cpu;
  const From* from = static_cast<const From*>(in);
  To* to = static_cast<To*>(out);
  for (int64_t i = 0; i < n; i += Vec<float>::lanes) store(to + i, Full{}, load(from + i, Full{}));
}

template <class A, class F>
void apply(const A* in, A* out, int64_t n, F f) {
  using namespace bnext::cpu;
  for (int64_t i = 0; i < n; i += Vec<A>::lanes) store(out + i, Full{}, f(load(in + i, Full{})));
}

}  // namespace

// n is a multiple of 16.
extern "C" {
void widen_f16(const void* in, void* out, int64_t n) { convert<bnext::f16, float>(in, out, n); }
void widen_bf16(const void* in, void* out, int64_t n) { convert<bnext::bf16, float>(in, out, n); }
void narrow_f16(const void* in, void* out, int64_t n) { convert<float, bnext::f16>(in, out, n); }
void narrow_bf16(const void* in, void* out, int64_t n) { convert<float, bnext::bf16>(in, out, n); }

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
