// Runs the CPU backend with the kernels for AVX2 and with those for AVX-512 (on 64-bit ARM, in plain C++ and for NEON),
// and prints each case whose bits differ. In the same way it compares threads, whose tasks come in another order, and
// stores past the caches with normal ones.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "../csrc/core/half.h"
#include "../csrc/cpu/cpu.h"
#include "../csrc/cpu/isa.h"

namespace bnext::cpu {
namespace {
const KernelSet* chosen = nullptr;
bool beyond_cache = false;
}  // namespace

// In place of dispatch.cpp's and cache.cpp's.
const KernelSet& kernel_set() { return *chosen; }
bool exceeds_cache(int64_t) { return beyond_cache; }
}  // namespace bnext::cpu

namespace {

using namespace bnext;

struct Case {
  Shape shape;
  DType dtype;
  Activation activation;
  bool residual;
  int64_t shift;  // elements before the tensors' first, from a cache line on: a multiple of 16 bytes
};

constexpr size_t kPage = 4096;

// Memory of its own, filled with what an unwritten element must not be. It begins `shift` bytes into a page, which
// decides which way passes go whose stores go past the caches: see is_faster_backwards() of csrc/cpu/streaming.h.
class Bytes {
 public:
  Bytes(size_t size, size_t shift) : size_(size), start_(shift), memory_(size + shift + 2 * kPage, 0x5a) {}
  char* data() {
    char* page = memory_.data() + (kPage - reinterpret_cast<uintptr_t>(memory_.data()) % kPage);
    return page + start_;
  }
  std::string copy() { return std::string(data(), size_); }

 private:
  size_t size_, start_;
  std::vector<char> memory_;
};

void fill(void* p, DType t, int64_t n, double mean, double scale, uint64_t seed) {
  uint64_t state = seed * 0x9e3779b97f4a7c15u + 1;
  for (int64_t i = 0; i < n; i++) {
    double v = 0;
    for (int k = 0; k < 3; k++) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      v += static_cast<double>(state >> 40) / (1 << 24) - 0.5;
    }
    v = mean + scale * v;
    switch (t) {
      case DType::f32: static_cast<float*>(p)[i] = static_cast<float>(v); break;
      case DType::f64: static_cast<double*>(p)[i] = v; break;
      case DType::f16: static_cast<f16*>(p)[i] = to_f16(static_cast<float>(v)); break;
      case DType::bf16: static_cast<bf16*>(p)[i] = to_bf16(static_cast<float>(v)); break;
    }
  }
}

// All that forward, eval and backward write.
std::string run(const Case& c, const cpu::ParallelFor& parallel) {
  const int64_t numel = c.shape.numel(), size = size_of(c.dtype), channels = c.shape.c;
  const DType acc = acc_size_of(c.dtype) == 8 ? DType::f64 : DType::f32;
  const size_t bytes = numel * size, shift = c.shift * size, vector = channels * size_of(acc);
  const size_t ahead = shift + 64, behind = shift + kPage - 64;
  Bytes x(bytes, shift), residual(bytes, shift), dy(bytes, shift), y(bytes, ahead), evaluated(bytes, behind);
  // Two outputs whose cache lines begin at the same elements, or do not.
  const size_t beside = ahead + (c.activation == Activation::leaky_relu ? 16 : 0);
  Bytes dx(bytes, ahead), dresidual(bytes, beside), mask((numel + 7) / 8, 0);
  fill(x.data(), c.dtype, numel, 3, 2, 1);
  fill(residual.data(), c.dtype, numel, 0, 2, 2);
  fill(dy.data(), c.dtype, numel, 0.1, 1, 3);
  Bytes weight(vector, 0), bias(vector, 0), mean(vector, 0), invstd(vector, 0), running_mean(vector, 0);
  Bytes running_var(vector, 0), sum_dy(vector, 0), sum_dy_xmu(vector, 0), dweight(vector, 0), dbias(vector, 0);
  fill(weight.data(), acc, channels, 1, 0.5, 4);
  fill(bias.data(), acc, channels, 0, 0.5, 5);
  fill(running_mean.data(), acc, channels, 3, 0.5, 6);
  fill(running_var.data(), acc, channels, 2, 0.5, 7);

  const bool active = c.activation != Activation::none, keeps_bits = saves_of(c.activation) == Saves::mask;
  const bool masked = c.residual && active && keeps_bits;
  BatchNormForwardParams f = {};
  f.shape = c.shape;
  f.dtype = c.dtype;
  f.weight_dtype = f.running_dtype = acc;
  f.activation = c.activation;
  f.activation_param = c.activation == Activation::leaky_relu ? 0.1 : 0;
  f.x = x.data();
  f.residual = c.residual ? residual.data() : nullptr;
  f.weight = weight.data();
  f.bias = bias.data();
  f.running_mean = running_mean.data();
  f.running_var = running_var.data();
  f.momentum = 0.1;
  f.eps = 1e-5;
  f.y = evaluated.data();
  cpu::batch_norm_normalize(f, parallel);
  f.mean = mean.data();
  f.invstd = invstd.data();
  f.y = y.data();
  f.mask = masked ? reinterpret_cast<uint8_t*>(mask.data()) : nullptr;
  cpu::batch_norm_forward(f, parallel);

  BatchNormBackwardParams b = {};
  b.shape = c.shape;
  b.dtype = c.dtype;
  b.weight_dtype = acc;
  b.activation = f.activation;
  b.activation_param = f.activation_param;
  b.training = true;
  b.dy = dy.data();
  b.x = x.data();
  b.mask = f.mask;
  b.residual = c.residual && active && !keeps_bits ? residual.data() : nullptr;
  b.weight = weight.data();
  b.bias = bias.data();
  b.mean = mean.data();
  b.invstd = invstd.data();
  b.count = c.shape.per_channel();
  b.sum_dy = sum_dy.data();
  b.sum_dy_xmu = sum_dy_xmu.data();
  b.dweight = dweight.data();
  b.dbias = dbias.data();
  b.dx = dx.data();
  b.dresidual = c.residual && active ? dresidual.data() : nullptr;
  cpu::batch_norm_backward(b, parallel);

  std::string all;
  for (Bytes* written : {&y, &evaluated, &dx, &dresidual, &mask, &mean, &invstd, &running_mean, &running_var, &sum_dy,
                         &sum_dy_xmu, &dweight, &dbias})
    all += written->copy();
  return all;
}

#if BNEXT_ARM64
const cpu::KernelSet &one = cpu::portable_kernels(), &other = cpu::neon_kernels();
#else
// OTHER: avx512_kernels or avx512_bf16_kernels.
const cpu::KernelSet &one = cpu::avx2_kernels(), &other = cpu::OTHER();
#endif

void in_order(int64_t tasks, const std::function<void(int64_t, int64_t)>& body) { body(0, tasks); }
void one_by_one_backwards(int64_t tasks, const std::function<void(int64_t, int64_t)>& body) {
  for (int64_t task = tasks; task-- > 0;) body(task, task + 1);
}

}  // namespace

// An argument, of 1 or more, leaves all shapes but every so manyth away.
int main(int argc, char** argv) {
  const int step = argc > 1 ? std::atoi(argv[1]) : 1;
  int number = 0;
  const Shape shapes[] = {
      {Layout::planar, 5, 19, 49},       {Layout::planar, 3, 37, 25},       {Layout::planar, 2, 3, 5003},
      {Layout::planar, 7, 24, 729},      {Layout::planar, 2, 100, 196},     {Layout::planar, 9, 40, 7},
      {Layout::planar, 4, 1, 333},       {Layout::planar, 2, 17, 784},      {Layout::planar, 40, 100, 16},
      {Layout::interleaved, 3, 70, 333}, {Layout::interleaved, 31, 127, 5}, {Layout::interleaved, 2, 1030, 9},
      {Layout::interleaved, 600, 3, 7},  {Layout::interleaved, 5, 16, 64},  {Layout::interleaved, 2, 5, 1},
      {Layout::interleaved, 3, 2056, 3}, {Layout::planar, 4, 256, 9},       {Layout::planar, 12, 16, 196},
      {Layout::planar, 40, 5, 729},      {Layout::planar, 70, 37, 25},
  };
  int cases = 0, different = 0;
  for (const Shape& shape : shapes) {
    if (number++ % step != 0) continue;
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16, DType::f64})
      for (const Activation activation : {Activation::none, Activation::relu, Activation::leaky_relu, Activation::silu})
        for (const bool residual : {false, true})
          for (const bool beyond_cache : {false, true}) {
            const Case c = {shape, dtype, activation, residual, beyond_cache ? 16 / size_of(dtype) : 0};
            cpu::beyond_cache = beyond_cache;
            cpu::chosen = &one;
            const std::string expected = run(c, in_order);
            const auto compare = [&](const char* what, const std::string& found) {
              cases++;
              if (found == expected) return;
              different++;
              std::printf("%s: %s %lldx%lldx%lld, %s, %s%s%s\n", what, name_of(shape.layout),
                          static_cast<long long>(shape.n), static_cast<long long>(shape.c),
                          static_cast<long long>(shape.s), name_of(dtype), name_of(activation),
                          residual ? ", residual" : "", beyond_cache ? ", streams" : "");
            };
            compare("tasks in another order", run(c, one_by_one_backwards));
            cpu::chosen = &other;
            compare("the other instruction set", run(c, in_order));
            cpu::chosen = &one;
            cpu::beyond_cache = !beyond_cache;
            compare("streaming or not", run(c, in_order));
          }
  }
  std::printf("%d of %d differ\n", different, cases);
  return different != 0;
}
