// Runs csrc/cuda/batch_norm_merge.cu on the simulated device, against the definition in long double. Prints "ok" and
// how many cases there were, or what was wrong in one, with exit status 1.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../csrc/cuda/launch.h"
#include "simt/simt.h"

namespace {

using namespace bnext;
using real = long double;

struct Failure { std::string what; };

std::mt19937_64 generator(1);
double draw(double low, double high) { return std::uniform_real_distribution<double>(low, high)(generator); }

template <class T>
class Vector {
 public:
  Vector(const char* name, int64_t count) : count_(count), p_(static_cast<T*>(simt::allocate(bytes(), name))) {}
  Vector(const Vector&) = delete;
  ~Vector() { simt::release(p_); }

  template <class F>
  void fill(F f) {
    for (int64_t i = 0; i < count_; ++i) p_[i] = f(i);
    simt::written(p_, bytes());
    before_.assign(p_, p_ + count_);
  }
  T* get() const { return p_; }
  T operator[](int64_t i) const { return p_[i]; }
  T before(int64_t i) const { return before_[i]; }
  bool changed() const { return std::memcmp(p_, before_.data(), bytes()) != 0; }
  bool whole() const { return simt::count_unwritten(p_, bytes()) == 0; }

 private:
  size_t bytes() const { return count_ * sizeof(T); }
  int64_t count_;
  T* p_;
  std::vector<T> before_;
};

real value(float v) { return v; }
real value(double v) { return v; }
real value(bf16 v) { return to_float(v); }

void expect(const char* name, real actual, real expected, real size, real unit) {
  if (std::fabs(actual - expected) <= unit * size) return;
  char text[200];
  snprintf(text, sizeof(text), "%s is %.12Lg, expected %.12Lg", name, actual, expected);
  throw Failure{text};
}

// A: of the statistics; R: of the running ones.
template <class A, class R>
void run(int64_t ranks, int64_t c, int flags) {
  const bool cumulative = flags & 1, tracks = flags & 2, empty = flags & 4, biased = flags & 8;
  Vector<A> stats("stats", ranks * (3 * c + 2)), mean("mean", c), invstd("invstd", c);
  Vector<R> running_mean("running_mean", c), running_var("running_var", c);
  Vector<int64_t> count("count", 1), tracked("num_batches_tracked", 1);
  std::vector<int64_t> counts(ranks);
  // From one value to more than a float32 counts exactly; some ranks have none.
  for (int64_t& n : counts) n = empty || draw(0, 1) < 0.25 ? 0 : static_cast<int64_t>(std::exp2(draw(1, 30)));
  if (!empty) counts.back() = (int64_t{1} << 24) + 1;
  stats.fill([&](int64_t i) {
    const int64_t rank = i / (3 * c + 2), at = i % (3 * c + 2);
    if (at >= 3 * c) return static_cast<A>(at == 3 * c ? counts[rank] / kCountBase : counts[rank] % kCountBase);
    if (counts[rank] == 0) return static_cast<A>(NAN);
    if (at < c) return static_cast<A>(10 + draw(-1, 1));
    return static_cast<A>(at < 2 * c ? draw(-1e-6, 1e-6) : draw(0.1, 2));
  });
  running_mean.fill([](int64_t) { return narrow<R>(1.5f); });
  running_var.fill([](int64_t) { return narrow<R>(0.75f); });
  tracked.fill([](int64_t) { return 3; });

  BatchNormMergeParams p = {};
  p.ranks = ranks;
  p.c = c;
  p.dtype = dtype_of<A>::value;
  p.running_dtype = dtype_of<R>::value;
  p.stats = stats.get();
  p.mean = mean.get();
  p.invstd = invstd.get();
  p.count = count.get();
  if (tracks) {
    p.running_mean = running_mean.get();
    p.running_var = running_var.get();
  }
  p.num_batches_tracked = tracked.get();
  p.momentum = 0.1;
  p.cumulative = cumulative;
  p.biased = biased;
  p.eps = 1e-5;
  if (cuda::launch_batch_norm_merge(p, nullptr) != cudaSuccess) throw Failure{"the launch failed"};
  if (stats.changed() || tracked.changed()) throw Failure{"an input has changed"};
  if (!mean.whole() || !invstd.whole() || !count.whole()) throw Failure{"not all was written"};
  if ((!tracks || empty) && (running_mean.changed() || running_var.changed()))
    throw Failure{"running statistics moved"};

  int64_t m = 0;
  for (const int64_t n : counts) m += n;
  if (count[0] != m) throw Failure{"count is " + std::to_string(count[0]) + ", expected " + std::to_string(m)};
  const real unit = sizeof(A) == 4 ? 0x1p-23L : 0x1p-49L, running_unit = sizeof(R) == 2 ? 0x1p-7L : unit;
  for (int64_t k = 0; k < c; ++k) {
    real mu = 0, var = 0;
    const auto at = [&](int64_t rank, int64_t i) { return static_cast<real>(stats[rank * (3 * c + 2) + i]); };
    const auto mean_at = [&](int64_t rank) { return at(rank, k) + at(rank, c + k); };
    for (int64_t r = 0; r < ranks; ++r) mu += counts[r] == 0 ? 0 : mean_at(r) * counts[r] / m;
    for (int64_t r = 0; r < ranks; ++r) {
      if (counts[r] != 0) var += (at(r, 2 * c + k) + (mean_at(r) - mu) * (mean_at(r) - mu)) * counts[r] / m;
    }
    const real s = m == 0 ? 0 : 1 / std::sqrt(var + 1e-5L);
    expect("mean", mean[k], mu, std::fabs(mu), unit);
    expect("invstd", invstd[k], s, s, 2 * unit);
    if (!tracks || m == 0) continue;
    const real factor = cumulative ? 0.25L : 0.1L;
    const real correction = biased ? 1 : static_cast<real>(m) / (m - 1);
    const real running = (1 - factor) * 1.5L + factor * mu, spread = (1 - factor) * 0.75L + factor * var * correction;
    expect("running_mean", value(running_mean[k]), running, running, 2 * running_unit);
    expect("running_var", value(running_var[k]), spread, spread, 2 * running_unit);
  }
}

}  // namespace

int main() {
  int cases = 0;
  for (const uint64_t seed : {0, 1, 2}) {
    simt::set_seed(seed);
    for (const int64_t ranks : {1, 2, 3, 8}) {
      for (const int64_t c : {1, 5, 64, 65, 200}) {
        for (int flags = 0; flags < 16; ++flags) {
          try {
            run<float, float>(ranks, c, flags);
            run<float, bf16>(ranks, c, flags);
            run<double, double>(ranks, c, flags);
            cases += 3;
          } catch (const Failure& failure) {
            printf("%d ranks, %d channels, flags %d: %s\n", int(ranks), int(c), flags, failure.what.c_str());
            return 1;
          }
        }
      }
    }
  }
  printf("ok %d\n", cases);
}
