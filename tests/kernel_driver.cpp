// Runs bnext's CUDA launchers on the simulated device of tests/simt and compares them with an oracle of its own:
//
//     kernel_driver [FILE]        cases from FILE or the standard input, one a line
//
// A case is a list of key=value, each with a default (see Case). For each it prints one line: ok or
// FAIL, the plan it got, and the largest error of each output in units of u (half an ulp of 1 in the
// accumulation type) of that output's natural scale; what the storage type rounds off is not counted.
// Exit status 1 if any case failed.
//
// The oracle computes in long double from the rounded inputs. Statistics and sums are compared with
// exact ones; what is elementwise, with the formula evaluated on the statistics that the kernels
// themselves gave, because a mean rounded to float moves y by far more than the arithmetic does where
// |mean| / std is large. Besides the values, each case checks that
//   - every output is written, and nothing outside the outputs (guards, and poison in all of them);
//   - inputs stay as they were, and counters return to 0;
//   - a second run under another order of threads and blocks gives the same bits;
//   - launches with shared memory asked for a carve-out in which as many blocks run as registers and threads allow;
//   - no error of the runtime is left behind;
//   - the second run asks nothing of the runtime but which device it is on, and to launch.
#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "../csrc/cuda/device.h"
#include "../csrc/cuda/launch.h"
#include "simt/simt.h"

namespace {

using namespace bnext;
using real = long double;

// ---- Storage types, written independently of csrc/core/half.h ------------------------------------

struct Format {
  const char* name;
  int mantissa;  // stored bits
  int exponent;  // smallest normal exponent
};

const Format& format(DType t) {
  static const Format formats[] = {{"f32", 23, -126}, {"f64", 52, -1022}, {"f16", 10, -14}, {"bf16", 7, -126}};
  return formats[static_cast<int>(t)];
}

// The distance of the numbers around v.
real ulp(DType t, real v) {
  const int e = v == 0 ? format(t).exponent : std::max(std::ilogb(v), format(t).exponent);
  return std::ldexp(real(1), e - format(t).mantissa);
}

void encode(DType t, void* p, int64_t i, real v) {
  if (t == DType::f32) {
    static_cast<float*>(p)[i] = static_cast<float>(v);
  } else if (t == DType::f64) {
    static_cast<double*>(p)[i] = static_cast<double>(v);
  } else if (t == DType::bf16) {
    // No test value is subnormal or overflows here: rounding to 8 bits is all there is to it.
    const float rounded = std::isnan(v) ? NAN : static_cast<float>(std::nearbyint(v / ulp(t, v)) * ulp(t, v));
    uint32_t bits;
    memcpy(&bits, &rounded, 4);
    static_cast<uint16_t*>(p)[i] = static_cast<uint16_t>(bits >> 16);
  } else {
    const real magnitude = std::nearbyint(std::fabs(v) / ulp(t, v)) * ulp(t, v);
    uint16_t bits = std::isnan(v) ? 0x7e00 : 0;
    if (magnitude > 0) {
      const int e = std::max(std::ilogb(magnitude), -14);
      const int mantissa = static_cast<int>(std::ldexp(magnitude, 10 - e));  // 1024..2047, less if subnormal
      bits = static_cast<uint16_t>(((e + 14) << 10) + mantissa);
    }
    static_cast<uint16_t*>(p)[i] = bits | (std::signbit(v) ? 0x8000 : 0);
  }
}

real decode(DType t, const void* p, int64_t i) {
  if (t == DType::f32) return static_cast<const float*>(p)[i];
  if (t == DType::f64) return static_cast<const double*>(p)[i];
  const uint16_t bits = static_cast<const uint16_t*>(p)[i];
  const int exponent_bits = t == DType::f16 ? 5 : 8, mantissa_bits = format(t).mantissa;
  const int e = bits >> mantissa_bits & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const real sign = bits & 0x8000 ? -1 : 1;
  if (e == (1 << exponent_bits) - 1) return mantissa ? NAN : sign * INFINITY;
  return sign * std::ldexp(real(mantissa + (e ? 1 << mantissa_bits : 0)),
                           std::max(e, 1) - 1 + format(t).exponent - mantissa_bits);
}

DType accumulation(DType t) { return t == DType::f64 ? DType::f64 : DType::f32; }

// ---- Cases ---------------------------------------------------------------------------------------

struct Case {
  std::string op = "forward";  // stats normalize forward eval backward_reduce backward_input backward backward_eval
  DType dtype = DType::f32;
  Layout layout = Layout::planar;
  int64_t n = 2, c = 3, s = 16;
  DType param = DType::f32;  // of weight and bias (and their gradients)
  DType running = DType::f32;
  bool weight = true, bias = true;
  bool stats = false;   // running statistics in training
  bool counter = true;  // num_batches_tracked along with them
  bool cumulative = false;
  bool biased = false;
  double momentum = 0.1, eps = 1e-5;
  std::string act = "none";  // relu relu6 leaky_relu silu hardswish sigmoid tanh
  bool residual = false, mask = true;
  bool saves = true;  // eval: mean and invstd as well
  bool dx = true, dweight = true, dbias = true, dresidual = true;
  bool x = true;                   // backward_eval: without x, where nothing needs it
  int64_t ranks = 1;               // backward: the statistics are of so many times as many elements
  std::string plan = "automatic";  // as force_plan takes it
  std::string data = "normal";     // offset huge constant nan
  // The device. 0: as it is at first.
  int sms = 0, cc = 0, code = 0;  // multiprocessors, compute capability, and that of the code
  int64_t shared = 0;             // shared memory to plan for, of a multiprocessor and of a block
  int clusters = -1;              // of 16 blocks, to plan for; -1: as many as it has
  int largest = 16;               // cluster that it does not refuse
  bool refuses = false;           // cooperative launches
  int planned_cc = 0;             // to plan for, against what query_device says
  uint64_t seed = 1;              // of the data
  uint64_t order = 0;             // of the schedule

  Shape shape() const { return {layout, n, c, s}; }
  bool backward() const { return op.rfind("backward", 0) == 0; }
};

template <class T, size_t count>
T value_of(const char* const (&names)[count], const std::string& name) {
  T value = {};
  if (!find_name(names, name, &value)) throw std::runtime_error("unknown value " + name);
  return value;
}

Case parse(const std::string& line) {
  Case out;
  using Set = std::function<void(const std::string&)>;
  auto text = [](std::string& to) -> Set { return [&](const std::string& v) { to = v; }; };
  auto flag = [](bool& to) -> Set { return [&](const std::string& v) { to = v != "0"; }; };
  auto integer = [](auto& to) -> Set { return [&](const std::string& v) { to = std::stoll(v); }; };
  auto number = [](double& to) -> Set { return [&](const std::string& v) { to = std::stod(v); }; };
  auto dtype = [](DType& to) -> Set { return [&](const std::string& v) { to = value_of<DType>(kDTypeNames, v); }; };
  auto layout = [](Layout& to) -> Set { return [&](const std::string& v) { to = value_of<Layout>(kLayoutNames, v); }; };
  const std::map<std::string, Set> set = {
      {"op", text(out.op)},
      {"dtype", dtype(out.dtype)},
      {"layout", layout(out.layout)},
      {"n", integer(out.n)},
      {"c", integer(out.c)},
      {"s", integer(out.s)},
      {"param", dtype(out.param)},
      {"running", dtype(out.running)},
      {"weight", flag(out.weight)},
      {"bias", flag(out.bias)},
      {"stats", flag(out.stats)},
      {"counter", flag(out.counter)},
      {"cumulative", flag(out.cumulative)},
      {"biased", flag(out.biased)},
      {"momentum", number(out.momentum)},
      {"eps", number(out.eps)},
      {"act", text(out.act)},
      {"residual", flag(out.residual)},
      {"mask", flag(out.mask)},
      {"saves", flag(out.saves)},
      {"dx", flag(out.dx)},
      {"dweight", flag(out.dweight)},
      {"dbias", flag(out.dbias)},
      {"dresidual", flag(out.dresidual)},
      {"x", flag(out.x)},
      {"ranks", integer(out.ranks)},
      {"plan", text(out.plan)},
      {"data", text(out.data)},
      {"sms", integer(out.sms)},
      {"cc", integer(out.cc)},
      {"shared", integer(out.shared)},
      {"code", integer(out.code)},
      {"clusters", integer(out.clusters)},
      {"largest", integer(out.largest)},
      {"refuses", flag(out.refuses)},
      {"planned_cc", integer(out.planned_cc)},
      {"seed", integer(out.seed)},
      {"order", integer(out.order)},
  };
  std::istringstream words(line);
  for (std::string word; words >> word;) {
    const size_t equals = word.find('=');
    const auto found = set.find(word.substr(0, equals));
    if (equals == std::string::npos || found == set.end()) throw std::runtime_error("unknown option " + word);
    found->second(word.substr(equals + 1));
  }
  return out;
}

// ---- Device memory -------------------------------------------------------------------------------

struct Failure : std::runtime_error { using std::runtime_error::runtime_error; };

std::string say(const char* text, ...) __attribute__((format(printf, 1, 2)));
std::string say(const char* text, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, text);
  vsnprintf(buffer, sizeof(buffer), text, arguments);
  va_end(arguments);
  return buffer;
}

// A tensor or vector in "global memory"; null where it is absent.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const char* name, DType dtype, int64_t count) : Buffer(name, dtype, count, count * size_of(dtype)) {}
  Buffer(const char* name, DType dtype, int64_t count, int64_t bytes)
      : name_(name), dtype_(dtype), count_(count), bytes_(bytes), p_(simt::allocate(bytes, name), simt::release) {}

  explicit operator bool() const { return p_ != nullptr; }
  void* get() const { return p_.get(); }
  template <class T> T* as() const { return static_cast<T*>(p_.get()); }
  const char* name() const { return name_; }
  DType dtype() const { return dtype_; }
  int64_t count() const { return count_; }
  real operator[](int64_t i) const { return decode(dtype_, p_.get(), i); }

  // Makes it an input.
  void fill(const std::function<real(int64_t)>& f) {
    for (int64_t i = 0; i < count_; ++i) encode(dtype_, p_.get(), i, f(i));
    freeze();
  }
  void freeze() {
    simt::written(p_.get(), bytes_);
    before_.assign(as<char>(), as<char>() + bytes_);
  }
  void restore() {
    std::copy(before_.begin(), before_.end(), as<char>());
    simt::written(p_.get(), bytes_);
  }
  // Forgets what a run wrote.
  void poison() {
    simt::release(p_.release());
    p_.reset(simt::allocate(bytes_, name_));
  }

  std::vector<char> bytes() const { return {as<char>(), as<char>() + bytes_}; }
  void expect_unchanged() const {
    if (!std::equal(before_.begin(), before_.end(), as<char>())) throw Failure(say("%s has changed", name_));
  }
  void expect_written() const {
    const size_t missing = simt::count_unwritten(p_.get(), bytes_);
    if (missing > 0) throw Failure(say("%zu bytes of %s were not written", missing, name_));
  }

 private:
  const char* name_ = nullptr;
  DType dtype_ = DType::f32;
  int64_t count_ = 0, bytes_ = 0;
  std::unique_ptr<void, void (*)(void*)> p_ = {nullptr, simt::release};
  std::vector<char> before_;
};

// ---- The oracle's arithmetic ---------------------------------------------------------------------

// Kahan's summation, so that the oracle's own error stays below float64's.
struct Sum {
  real sum = 0, low = 0;
  void add(real v) {
    const real y = v - low, t = sum + y;
    low = (t - sum) - y;
    sum = t;
  }
};

// Numbers as even as they come, about normally distributed, in (-6, 6).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15 + 1) {}
  real uniform() { return std::ldexp(real(next() >> 11), -53); }
  real normal() {
    real sum = -6;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum;
  }

 private:
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }
  uint64_t state_;
};

// Largest errors by output, in units of u.
class Errors {
 public:
  explicit Errors(DType accumulation) : u_(std::ldexp(real(1), -format(accumulation).mantissa - 1)) {}

  // |got - want| may be `limit` units of u * scale, and half an ulp where `storage` rounds.
  void expect(const char* what, int64_t i, real got, real want, real scale, double limit, DType storage) {
    if (std::isnan(want) && std::isnan(got)) return;
    real error = std::fabs(got - want);
    if (format(storage).mantissa < 23) error = std::max(real(0), error - ulp(storage, want) / 2);
    const double units = error == 0 ? 0 : static_cast<double>(error / (u_ * scale));
    double& largest = largest_.try_emplace(what, 0.0).first->second;
    if (!(units <= largest)) largest = units;
    if (!(units <= limit)) {
      throw Failure(say("%s[%" PRId64 "] is %.9Lg, expected %.9Lg: off by %.3g u of %.3Lg, allowed %.3g", what, i, got,
                        want, units, scale, limit));
    }
  }
  std::string text() const {
    std::string out;
    for (const auto& [what, units] : largest_) out += say(" %s=%.2f", what.c_str(), units);
    return out;
  }

 private:
  real u_;
  std::map<std::string, double> largest_;
};

// ---- Tolerances, in units of u -------------------------------------------------------------------

// Mean, of |mean| + std: adding the shift rounds to half an ulp, 1 u; the offset from it is made of numbers
// of the size of std, and each chunk and each level of merging rounds it a few times, at random.
constexpr double kMean = 8;
// Variance, relative: squares and pairwise sums within a chunk make about 3 u, and merging rounds as it
// does for the mean. 8 u are 4 ulp.
constexpr double kVar = 8;
// 1 / sqrt(var + eps) of the variance that the kernel gave: three correctly rounded operations, the
// first of which counts half.
constexpr double kInvstd = 3;
// y, of the largest of its terms: x - mean, weight * invstd and fma round once each, the last of a sum of
// up to twice that size: 4 u, which are 2 ulp; adding the residual rounds a sum of up to three terms.
constexpr double kY = 4, kYResidual = 7;
// Running statistics, of the larger of old and new: two products, a sum, 1 - factor, and for the variance
// the factor m / (m - 1) and its product; over what the mean and the variance themselves may be off by.
constexpr double kRunning = 4, kRunningVar = 6;
// Sums, of the sum of magnitudes: rounding errors of random sign, of partial sums that are mostly far
// smaller than the whole. dy * (x - mean) rounds the difference besides.
constexpr double kSum = 4;
// dweight multiplies by invstd once more; dbias is the sum.
constexpr double kGradient = 1;
// dx, of the sum of its terms' sizes times scale: (x - mean) * slope has 6 roundings (difference, three
// products and a division in the slope, one product), the two subtractions and the product by
// the scale, itself rounded, 4 more.
constexpr double kDx = 10;

// An activation's derivative, where it depends on z = affine(x) + residual: its own few roundings, and those of z,
// which is off by kYResidual u of the terms that it is the sum of, times a second derivative of at most 1. Beyond 40
// all that have one are straight to the last bit.
real derivative_size(real z_size) { return 1 + std::min(z_size, real(40)); }
// The functions themselves round a few times more than their argument, of which they are at most 1.1 times as steep.
constexpr double kActivation = 8;

// ---- Activations, by their definitions; independent of csrc/core/activation.h -----------------------

constexpr real kSlope = 0.1L;  // leaky_relu's

struct ActivationOracle {
  Activation activation;
  bool smooth;              // the derivative depends on z; else it is 0, 1 or kSlope
  std::vector<real> kinks;  // where rounding may turn the derivative
  real (*value)(real z);
  real (*grad)(real z);
};

const ActivationOracle& oracle_of(const std::string& name) {
  const auto sigmoid = [](real z) -> real { return 1 / (1 + std::exp(-z)); };
  static const std::map<std::string, ActivationOracle> all = {
      {"none", {Activation::none, false, {}, [](real z) { return z; }, [](real) -> real { return 1; }}},
      {"relu",
       {Activation::relu,
        false,
        {0},
        [](real z) -> real { return z <= 0 ? 0 : z; },
        [](real z) -> real { return z <= 0 ? 0 : 1; }}},
      {"relu6",
       {Activation::relu6,
        false,
        {0, 6},
        [](real z) -> real { return z <= 0   ? 0
                                    : z >= 6 ? 6
                                             : z; },
        [](real z) -> real { return z <= 0 || z >= 6 ? 0 : 1; }}},
      {"leaky_relu",
       {Activation::leaky_relu,
        false,
        {0},
        [](real z) -> real { return z <= 0 ? kSlope * z : z; },
        [](real z) -> real { return z <= 0 ? kSlope : 1; }}},
      {"silu",
       {Activation::silu,
        true,
        {},
        [](real z) -> real { return z / (1 + std::exp(-z)); },
        [](real z) -> real {
          const real e = std::exp(-z);
          return std::isinf(e) ? 0 : 1 / (1 + e) + z * e / ((1 + e) * (1 + e));
        }}},
      {"hardswish",
       {Activation::hardswish,
        true,
        {-3, 3},
        [](real z) -> real { return z <= -3  ? 0
                                    : z >= 3 ? z
                                             : z * (z + 3) / 6; },
        [](real z) -> real { return z <= -3  ? 0
                                    : z >= 3 ? 1
                                             : (2 * z + 3) / 6; }}},
      {"sigmoid",
       {Activation::sigmoid,
        true,
        {},
        sigmoid,
        [](real z) -> real {
          const real e = std::exp(-std::fabs(z));
          return e / ((1 + e) * (1 + e));
        }}},
      {"tanh",
       {Activation::tanh,
        true,
        {},
        [](real z) -> real { return std::tanh(z); },
        [](real z) -> real { return 1 / (std::cosh(z) * std::cosh(z)); }}},
  };
  const auto found = all.find(name);
  if (found == all.end()) throw std::runtime_error("unknown activation " + name);
  return found->second;
}

// ---- Running a case ------------------------------------------------------------------------------

class Run {
 public:
  explicit Run(const Case& spec)
      : c_(spec),
        act_(oracle_of(spec.act)),
        device_(describe_device(spec)),
        random_(spec.seed),
        acc_(accumulation(spec.dtype)),
        errors_(acc_) {}

  std::string operator()() {
    const std::string plan = c_.backward() ? backward() : forward();
    std::string refused;
    for (std::string what : device_.refused()) {
      std::replace(what.begin(), what.end(), ' ', '_');
      refused += " refused:" + what;
    }
    return plan + errors_.text() + refused;
  }

 private:
  static cuda::DeviceProperties describe_device(const Case& c) {
    simt::Device& device = simt::device() = {};
    if (c.sms) device.multiprocessors = c.sms;
    if (c.cc) device.compute_capability = c.cc;
    device.code_capability = c.code ? c.code : device.compute_capability;
    device.largest_cluster = c.largest;
    device.refuses_cooperative = c.refuses;
    cuda::DeviceProperties found;
    const cudaError_t error = cuda::query_device(0, &found);
    if (error != cudaSuccess) throw Failure(say("query_device returned: %s", cudaGetErrorString(error)));
    if (c.shared) found.shared_per_block = found.shared_per_multiprocessor = c.shared;
    // A driver that refuses may well have said that there is room for so many.
    if (c.largest < 16 || c.planned_cc) found.clusters_together = {66, 33, 16, 8};
    if (c.clusters >= 0 && found.clusters) found.clusters_together.back() = c.clusters;
    if (c.planned_cc) {
      found.compute_capability = c.planned_cc;
      found.clusters = c.planned_cc >= 90;
    }
    return found;
  }

  int64_t numel() const { return c_.shape().numel(); }
  // Behind a residual, of an activation whose derivative takes two values.
  bool keeps_bits() const { return c_.residual && !act_.smooth && act_.activation != Activation::none; }
  int64_t count() const { return c_.ranks * c_.shape().per_channel(); }
  int64_t channel(int64_t i) const { return c_.layout == Layout::planar ? i / c_.s % c_.c : i % c_.c; }
  bool is_nan(int64_t channel) const { return c_.data == "nan" && channel == c_.c / 2; }

  Buffer tensor(const char* name) const { return Buffer(name, c_.dtype, numel()); }
  Buffer vector(const char* name, DType t) const { return Buffer(name, t, c_.c); }

  // Inputs of the kind that the case asks for, each channel with its own mean and deviation.
  void make_x() {
    x_ = tensor("x");
    std::vector<real> mean(c_.c), std(c_.c);
    for (int64_t k = 0; k < c_.c; ++k) {
      std[k] = 0.5 + 1.5 * random_.uniform();
      mean[k] = 4 * random_.uniform() - 2;
      // As far from 0 as the contract goes; 16-bit types would have nothing left but their last digits.
      if (c_.data == "offset") mean[k] = (k % 2 ? -1 : 1) * std[k] * (size_of(c_.dtype) == 2 ? 1e2 : 1e4);
      if (c_.data == "huge") mean[k] *= 1e18, std[k] *= 1e18;
      if (c_.data == "constant") mean[k] *= 1e3, std[k] = 0;
    }
    const int64_t bad = numel() / 3;
    bool placed = false;
    x_.fill([&](int64_t i) -> real {
      const int64_t k = channel(i);
      const real v = mean[k] + std[k] * random_.normal();
      if (!is_nan(k) || placed || i < bad) return v;
      placed = true;
      return NAN;
    });
  }

  void make_parameters() {
    if (c_.weight) {
      weight_ = vector("weight", c_.param);
      weight_.fill([&](int64_t i) -> real { return (i % 3 == 1 ? -1 : 1) * (0.5 + random_.uniform()); });
    }
    if (c_.bias) {
      bias_ = vector("bias", c_.param);
      bias_.fill([&](int64_t) { return random_.normal(); });
    }
  }

  struct Exact { std::vector<real> mean, var; };

  Exact exact_statistics() const {
    Exact out;
    const real m = c_.shape().per_channel();
    std::vector<Sum> sums(c_.c), squares(c_.c);
    // From the channel's first element on, which makes a constant's statistics exact.
    auto first = [&](int64_t k) { return x_[c_.layout == Layout::planar ? k * c_.s : k]; };
    for (int64_t i = 0; i < numel(); ++i) sums[channel(i)].add(x_[i] - first(channel(i)));
    for (int64_t k = 0; k < c_.c; ++k) out.mean.push_back(m > 0 ? first(k) + sums[k].sum / m : NAN);
    for (int64_t i = 0; i < numel(); ++i) {
      const real d = x_[i] - out.mean[channel(i)];
      squares[channel(i)].add(d * d);
    }
    for (const Sum& s : squares) out.var.push_back(s.sum / m);
    return out;
  }

  real weight(int64_t k) const { return weight_ ? weight_[k] : 1; }
  real bias(int64_t k) const { return bias_ ? bias_[k] : 0; }

  static uint64_t count_slow_calls() {
    return simt::count_calls() - simt::count_calls("cudaGetDevice") - simt::count_calls("cudaLaunchKernelEx");
  }

  // Plans, and calls the launcher on fresh outputs, once in the case's order and once in another; without what the
  // device refuses, where it does.
  cuda::Plan launch(const std::vector<Buffer*>& inputs, const std::vector<Buffer*>& outputs,
                    const std::vector<Buffer*>& updated, const std::function<cuda::Plan()>& make_plan,
                    const std::function<cudaError_t(const cuda::Plan&, const cuda::Scratch&)>& call) {
    std::vector<std::vector<char>> first;
    cuda::Plan plan;
    for (const uint64_t order : {c_.order, c_.order + 77}) {
      simt::set_seed(order);
      for (Buffer* b : outputs) b->poison();
      for (Buffer* b : updated) b->restore();
      for (bool refused = true; refused;) {
        plan = make_plan();
        Buffer partials("partials", DType::f32, 0, plan.partial_bytes);
        Buffer counters("counters", DType::f32, 0, plan.counters * 4);
        memset(counters.get(), 0, plan.counters * 4);
        counters.freeze();
        const uint64_t launches = simt::count_launches(), slow_calls = count_slow_calls();
        const cudaError_t error = call(plan, {partials.get(), counters.as<uint32_t>(), flagged(plan.flagged_bytes)});
        if (order != c_.order && count_slow_calls() != slow_calls) throw Failure("a second launch asks the driver");
        refused = error != cudaSuccess;
        if (refused && !device_.disable_refused(plan, error)) {
          throw Failure(say("the launcher returned: %s", cudaGetErrorString(error)));
        }
        if (refused && order != c_.order) throw Failure("the refusal was not remembered");
        if (refused && simt::count_launches() != launches) throw Failure("something ran of what was refused");
        if (cudaPeekAtLastError() != cudaSuccess) throw Failure("an error of the runtime is left");
        const simt::Launched& last = simt::last_launch();
        if (simt::count_launches() != launches && last.shared > 0 && last.fit_as_split < last.fit) {
          throw Failure(say("of %d blocks, %d run at a time in the carve-out", last.fit, last.fit_as_split));
        }
        counters.expect_unchanged();
      }
      for (Buffer* b : inputs) b->expect_unchanged();
      for (Buffer* b : outputs) b->expect_written();

      std::vector<std::vector<char>> results;
      for (Buffer* b : outputs) results.push_back(b->bytes());
      for (Buffer* b : updated) results.push_back(b->bytes());
      if (order == c_.order) first = results;
      if (results != first) throw Failure("another order of execution gives other bits");
    }
    return plan;
  }

  // What the launches before, of other plans, have left there.
  static void* flagged(int64_t bytes) {
    static Buffer memory;
    if (!memory || memory.count() < bytes) {
      memory = Buffer("flagged", DType::f32, bytes, bytes);
      memset(memory.get(), 0, bytes);
      simt::written(memory.get(), bytes);
    }
    return memory.get();
  }

  static void list(std::vector<Buffer*>& out, std::initializer_list<Buffer*> buffers) {
    for (Buffer* b : buffers) {
      if (*b) out.push_back(b);
    }
  }

  std::string forward();
  void check_statistics(const Exact& exact);
  void check_running(const Exact& exact);
  void check_y();
  std::string backward();
  void check_sums(const std::vector<real>& derivative, const std::vector<real>& z_size);
  void check_dx(const std::vector<real>& derivative, const std::vector<real>& z_size);

  // Stages on their own, and eval mode, take a plan of two_pass.
  cuda::PlanOptions options() const {
    if (c_.op == "forward" || c_.op == "backward" || c_.op == "backward_eval") return {cuda::parse_choice(c_.plan), 0};
    return {{cuda::PlanKind::two_pass}, 0};
  }

  const Case c_;
  const ActivationOracle& act_;
  cuda::Device device_;
  Random random_;
  const DType acc_;
  Errors errors_;

  Buffer x_, residual_, weight_, bias_, mean_, mean_rest_, var_, invstd_, running_mean_, running_var_, tracked_, y_,
      mask_;
  Buffer dy_, sum_dy_, sum_dy_xmu_, dweight_, dbias_, dx_, dresidual_;
  std::vector<real> running_before_[2];
};

std::string describe(const cuda::Plan& plan, bool whole) {
  const int section = plan.reduce.merge_section;
  const std::string two_pass = section > 1 ? say("two_pass/%d", section) : "two_pass";
  if (!whole) return two_pass;
  switch (plan.kind) {
    case cuda::PlanKind::resident: {
      const cuda::Partition& pass = plan.resident;
      if (pass.packed()) return say("packed/%d", static_cast<int>(pass.splits));
      if (pass.by_columns && pass.clustered) return say("tiles/%d", static_cast<int>(pass.splits));
      const int64_t rounds = pass.groups == 0 ? 0 : (pass.tiles + pass.groups - 1) / pass.groups;
      const char* name = pass.register_vecs > 0 ? "registers" : pass.reread_bytes > 0 ? "partly" : "resident";
      return say("%s/%d/%d", name, static_cast<int>(pass.splits), static_cast<int>(rounds));
    }
    case cuda::PlanKind::cooperative: return say("cooperative/%d", static_cast<int>(plan.blocks));
    case cuda::PlanKind::automatic:
    case cuda::PlanKind::two_pass: break;
  }
  return two_pass;
}

// ---- Forward -------------------------------------------------------------------------------------

std::string Run::forward() {
  make_x();
  make_parameters();
  const bool eval = c_.op == "eval", normalizes = c_.op != "stats";
  std::vector<Buffer*> inputs, outputs, updated;

  BatchNormForwardParams p = {};
  p.shape = c_.shape();
  p.dtype = c_.dtype;
  p.weight_dtype = c_.param;
  p.running_dtype = c_.running;
  p.activation = act_.activation;
  p.activation_param = c_.act == "leaky_relu" ? static_cast<double>(kSlope) : 0;
  p.momentum = c_.momentum;
  p.cumulative = c_.cumulative;
  p.biased = c_.biased;
  p.eps = c_.eps;

  if (normalizes && c_.residual) {
    residual_ = tensor("residual");
    residual_.fill([&](int64_t) { return random_.normal(); });
  }
  if (eval || (c_.op == "forward" && c_.stats)) {
    running_mean_ = vector("running_mean", c_.running);
    running_var_ = vector("running_var", c_.running);
    running_mean_.fill([&](int64_t) { return random_.normal(); });
    running_var_.fill([&](int64_t) { return 0.5 + random_.uniform(); });
    for (int64_t k = 0; k < c_.c; ++k) {
      running_before_[0].push_back(running_mean_[k]);
      running_before_[1].push_back(running_var_[k]);
    }
    if (!eval && c_.counter) {
      tracked_ = Buffer("num_batches_tracked", DType::f64, 0, 8);
      *tracked_.as<int64_t>() = 6;
      tracked_.freeze();
    }
  }
  const Exact exact = exact_statistics();
  if (c_.op == "normalize" || c_.saves || !eval) {
    mean_ = vector("mean", acc_);
    invstd_ = vector("invstd", acc_);
  }
  if (c_.op == "stats") {
    mean_rest_ = vector("mean_rest", acc_);
    var_ = vector("var", acc_);
    invstd_ = Buffer();
  }
  if (c_.op == "normalize") {
    mean_.fill([&](int64_t k) { return exact.mean[k]; });
    invstd_.fill([&](int64_t k) { return 1 / std::sqrt(exact.var[k] + c_.eps); });
    list(inputs, {&mean_, &invstd_});
  } else {
    list(outputs, {&mean_, &mean_rest_, &var_, &invstd_});
  }
  if (normalizes) {
    y_ = tensor("y");
    if (keeps_bits() && c_.mask) mask_ = Buffer("mask", DType::f32, 0, (numel() + 7) / 8);
    list(outputs, {&y_, &mask_});
  }
  list(inputs, {&x_, &residual_, &weight_, &bias_});
  list(eval ? inputs : updated, {&running_mean_, &running_var_});
  list(updated, {&tracked_});

  p.x = x_.get();
  p.residual = residual_.get();
  p.weight = weight_.get();
  p.bias = bias_.get();
  p.running_mean = running_mean_.get();
  p.running_var = running_var_.get();
  p.num_batches_tracked = tracked_.as<int64_t>();
  p.mask = mask_.as<uint8_t>();  // the plan looks at whether there is one
  const auto make_plan = [&] { return cuda::make_plan(p, device_.properties(), options()); };
  const cuda::Plan plan = launch(inputs, outputs, updated, make_plan, [&](const auto& plan, const auto& scratch) {
    p.mean = mean_.get();
    p.mean_rest = mean_rest_.get();
    p.var = var_.get();
    p.invstd = invstd_.get();
    p.y = y_.get();
    p.mask = mask_.as<uint8_t>();
    if (c_.op == "stats") return cuda::launch_batch_norm_stats(p, plan, scratch, nullptr);
    if (c_.op == "forward") return cuda::launch_batch_norm_forward(p, plan, scratch, nullptr);
    return cuda::launch_batch_norm_normalize(p, plan, nullptr);
  });

  // Without a single element there are no statistics to compare.
  if (numel() > 0) {
    if (c_.op == "stats" || c_.op == "forward") check_statistics(exact);
    if (c_.op == "forward" && c_.stats) check_running(exact);
    if (normalizes) check_y();
  }
  if (tracked_ && *tracked_.as<int64_t>() != 7) {
    throw Failure(say("num_batches_tracked went from 6 to %" PRId64, *tracked_.as<int64_t>()));
  }
  return describe(plan, c_.op == "forward");
}

void Run::check_statistics(const Exact& exact) {
  for (int64_t k = 0; k < c_.c; ++k) {
    const real mean = exact.mean[k], var = exact.var[k];
    errors_.expect("mean", k, mean_[k], mean, std::fabs(mean) + std::sqrt(var), c_.data == "constant" ? 0 : kMean,
                   acc_);
    // The two parts together know the mean as well as the deviations from it; in float64 better than the oracle, whose
    // numbers have 11 bits more than a double.
    const real oracle = acc_ == DType::f64 ? std::fabs(mean) * 0x1p-11L : 0;
    if (mean_rest_) {
      errors_.expect("mean_rest", k, mean_[k] + mean_rest_[k], mean, std::sqrt(var) + oracle, kMean, acc_);
    }
    // The exact variance of a constant is 0, and so is the kernel's.
    if (var_) errors_.expect("var", k, var_[k], var, var, kVar, acc_);
    if (invstd_) {
      const real sum = var + static_cast<real>(c_.eps);
      errors_.expect("invstd", k, invstd_[k], 1 / std::sqrt(sum), 1 / std::sqrt(sum), kInvstd + kVar / 2, acc_);
    }
  }
}

void Run::check_running(const Exact& exact) {
  const real m = c_.shape().per_channel();
  const real factor = c_.cumulative ? real(1) / 7 : static_cast<real>(c_.momentum);
  for (int64_t k = 0; k < c_.c; ++k) {
    const real old_mean = running_before_[0][k], old_var = running_before_[1][k];
    const real var = c_.biased ? exact.var[k] : exact.var[k] * m / (m - 1);
    errors_.expect("running_mean", k, running_mean_[k], (1 - factor) * old_mean + factor * exact.mean[k],
                   std::fabs(old_mean) + std::fabs(exact.mean[k]) + std::sqrt(exact.var[k]), kRunning + kMean,
                   c_.running);
    errors_.expect("running_var", k, running_var_[k], (1 - factor) * old_var + factor * var, old_var + var,
                   kRunningVar + kVar, c_.running);
  }
}

void Run::check_y() {
  const bool eval = c_.op == "eval";
  for (int64_t k = 0; k < c_.c && eval; ++k) {
    const real invstd = 1 / std::sqrt(running_var_[k] + static_cast<real>(c_.eps));
    if (mean_) errors_.expect("mean", k, mean_[k], running_mean_[k], 1, 0, acc_);
    if (invstd_) errors_.expect("invstd", k, invstd_[k], invstd, invstd, kInvstd, acc_);
  }
  for (int64_t i = 0; i < numel(); ++i) {
    const int64_t k = channel(i);
    const real mean = eval ? running_mean_[k] : mean_[k];
    const real invstd = eval ? 1 / std::sqrt(running_var_[k] + static_cast<real>(c_.eps)) : invstd_[k];
    const real scaled = (x_[i] - mean) * invstd * weight(k);
    const real added = residual_ ? residual_[i] : 0;
    const real v = scaled + bias(k) + added;
    const real scale = std::max({std::fabs(scaled), std::fabs(bias(k)), std::fabs(added)});
    const double limit = (residual_ ? kYResidual : kY) + (eval ? kInvstd : 0);
    // A bit is certain only where rounding cannot turn it.
    const real margin = limit * std::ldexp(scale, -format(acc_).mantissa - 1);
    const bool certain =
        std::none_of(act_.kinks.begin(), act_.kinks.end(), [&](real at) { return std::fabs(v - at) <= margin; });
    const bool got_bit = mask_ && mask_.as<uint8_t>()[i / 8] >> (i % 8) & 1;
    if (mask_ && certain && got_bit != (act_.grad(v) == 1)) {
      throw Failure(say("mask[%" PRId64 "] is %d where the value is %.9Lg", i, got_bit, v));
    }
    const bool straight = c_.act == "none" || c_.act == "relu";
    errors_.expect("y", i, y_[i], act_.value(v), scale + (straight ? 0 : 1),
                   straight ? limit : 1.1 * limit + kActivation, c_.dtype);
    if (c_.act == "relu" && mask_ && !got_bit && y_[i] != 0)
      throw Failure(say("y[%" PRId64 "] passed, but its mask bit is 0", i));
    if (c_.data == "constant" && !eval && c_.op == "forward" && scaled != 0) {
      throw Failure(say("channel %" PRId64 " is constant, but x - mean is not 0", k));
    }
  }
  if (mask_ && numel() % 8 && mask_.as<uint8_t>()[numel() / 8] >> (numel() % 8)) {
    throw Failure("unused bits of the mask are set");
  }
}

// ---- Backward ------------------------------------------------------------------------------------

std::string Run::backward() {
  make_x();
  make_parameters();
  const bool training = c_.op != "backward_eval";
  const bool reduces = c_.op != "backward_input";
  std::vector<Buffer*> inputs, outputs;

  // Any mean and invstd will do; these are the statistics of x, without its NaN.
  Exact exact = exact_statistics();
  mean_ = vector("mean", acc_);
  invstd_ = vector("invstd", acc_);
  mean_.fill([&](int64_t k) { return std::isfinite(exact.mean[k]) ? exact.mean[k] : real(0.25); });
  invstd_.fill(
      [&](int64_t k) -> real { return std::isfinite(exact.var[k]) ? 1 / std::sqrt(exact.var[k] + c_.eps) : real(1); });

  dy_ = tensor("dy");
  dy_.fill([&](int64_t) { return 0.25 + random_.normal(); });

  // dy' is dy times the derivative, which comes from the bits that the forward kept, or from z. Where it is computed
  // from z, no value may be so close to a kink that rounding decides.
  std::vector<real> derivative(numel(), 1), z_size(numel(), 0);
  const bool by_bits = keeps_bits();
  if (by_bits) {
    mask_ = Buffer("mask", DType::f32, 0, (numel() + 7) / 8);
    memset(mask_.get(), 0, (numel() + 7) / 8);
    for (int64_t i = 0; i < numel(); ++i) {
      const bool bit = random_.uniform() < 0.6 || std::isnan(x_[i]);  // the forward lets NaN pass
      if (bit) mask_.as<uint8_t>()[i / 8] |= 1 << (i % 8);
      derivative[i] = bit ? 1 : c_.act == "leaky_relu" ? kSlope : 0;
    }
    mask_.freeze();
  } else if (c_.act != "none") {
    if (c_.residual) {
      residual_ = tensor("residual");
      residual_.fill([&](int64_t) { return random_.normal(); });
    }
    const auto z = [&](int64_t i) {
      const int64_t k = channel(i);
      return (x_[i] - mean_[k]) * weight(k) * invstd_[k] + bias(k) + (residual_ ? residual_[i] : 0);
    };
    const auto terms = [&](int64_t i) {
      const int64_t k = channel(i);
      return std::fabs((x_[i] - mean_[k]) * weight(k) * invstd_[k]) + std::fabs(bias(k)) +
             std::fabs(residual_ ? residual_[i] : 0);
    };
    x_.fill([&](int64_t i) {
      const int64_t k = channel(i);
      const real scale = weight(k) * invstd_[k];
      // One deviation on, z differs by |weight|.
      const bool close = std::any_of(act_.kinks.begin(), act_.kinks.end(), [&](real at) {
        return z(i) != at && std::fabs(z(i) - at) < 1e-3 * (terms(i) + std::fabs(at));
      });
      return close ? x_[i] + std::copysign(1 / invstd_[k], scale) : x_[i];
    });
    for (int64_t i = 0; i < numel(); ++i) {
      derivative[i] = act_.grad(z(i));
      if (act_.smooth) z_size[i] = derivative_size(terms(i));
    }
  }

  const bool whole = c_.op == "backward" || c_.op == "backward_eval";
  sum_dy_ = vector("sum_dy", acc_);
  sum_dy_xmu_ = vector("sum_dy_xmu", acc_);
  if (c_.op == "backward_input") {
    sum_dy_.fill([&](int64_t) { return count() * random_.normal() / 4; });
    sum_dy_xmu_.fill([&](int64_t k) { return count() * random_.normal() / 4 / invstd_[k]; });
    list(inputs, {&sum_dy_, &sum_dy_xmu_});
  }
  if (reduces && c_.dweight) dweight_ = vector("dweight", c_.param);
  if (reduces && c_.dbias) dbias_ = vector("dbias", c_.param);
  if (c_.op != "backward_reduce" && c_.dx) dx_ = tensor("dx");
  if (c_.op != "backward_reduce" && c_.dresidual && (mask_ || residual_)) dresidual_ = tensor("dresidual");
  const bool sums = c_.op == "backward_reduce" || (whole && (c_.dweight || c_.dbias || (training && c_.dx)));
  if (sums) list(outputs, {&sum_dy_, &sum_dy_xmu_});
  list(outputs, {&dweight_, &dbias_, &dx_, &dresidual_});
  list(inputs, {&dy_, &x_, &mask_, &residual_, &weight_, &bias_, &mean_, &invstd_});

  BatchNormBackwardParams p = {};
  p.shape = c_.shape();
  p.dtype = c_.dtype;
  p.weight_dtype = c_.param;
  p.activation = act_.activation;
  p.activation_param = c_.act == "leaky_relu" ? static_cast<double>(kSlope) : 0;
  p.training = training;
  p.dy = dy_.get();
  p.x = c_.x ? x_.get() : nullptr;
  p.mask = mask_.as<uint8_t>();
  p.residual = residual_.get();
  p.weight = weight_.get();
  p.bias = bias_.get();
  p.mean = mean_.get();
  p.invstd = invstd_.get();
  p.count = count();
  // The plan looks at which are wanted.
  p.dweight = dweight_.get();
  p.dbias = dbias_.get();
  p.dx = dx_.get();
  p.dresidual = dresidual_.get();
  const auto make_plan = [&] { return cuda::make_plan(p, device_.properties(), options()); };
  const cuda::Plan plan = launch(inputs, outputs, {}, make_plan, [&](const auto& plan, const auto& scratch) {
    p.sum_dy = sum_dy_.get();
    p.sum_dy_xmu = sum_dy_xmu_.get();
    p.dweight = dweight_.get();
    p.dbias = dbias_.get();
    p.dx = dx_.get();
    p.dresidual = dresidual_.get();
    if (c_.op == "backward_reduce") return cuda::launch_batch_norm_backward_reduce(p, plan, scratch, nullptr);
    if (c_.op == "backward_input") return cuda::launch_batch_norm_backward_input(p, plan, nullptr);
    return cuda::launch_batch_norm_backward(p, plan, scratch, nullptr);
  });
  if (sums) check_sums(derivative, z_size);
  check_dx(derivative, z_size);
  return describe(plan, whole);
}

void Run::check_sums(const std::vector<real>& derivative, const std::vector<real>& z_size) {
  std::vector<Sum> dy(c_.c), dy_xmu(c_.c), dy_size(c_.c), dy_xmu_size(c_.c);
  for (int64_t i = 0; i < numel(); ++i) {
    const int64_t k = channel(i);
    const real g = derivative[i] == 0 ? 0 : dy_[i] * derivative[i], xmu = x_[i] - mean_[k];
    const real size = std::fabs(g) + std::fabs(dy_[i]) * z_size[i];
    dy[k].add(g);
    dy_xmu[k].add(g * xmu);
    dy_size[k].add(size);
    dy_xmu_size[k].add(size * std::fabs(xmu));
  }
  for (int64_t k = 0; k < c_.c; ++k) {
    errors_.expect("sum_dy", k, sum_dy_[k], dy[k].sum, dy_size[k].sum, kSum, acc_);
    errors_.expect("sum_dy_xmu", k, sum_dy_xmu_[k], dy_xmu[k].sum, dy_xmu_size[k].sum, kSum, acc_);
    if (dbias_) errors_.expect("dbias", k, dbias_[k], dy[k].sum, dy_size[k].sum, kSum, c_.param);
    if (dweight_) {
      errors_.expect("dweight", k, dweight_[k], dy_xmu[k].sum * invstd_[k], dy_xmu_size[k].sum * invstd_[k],
                     kSum + kGradient, c_.param);
    }
  }
}

void Run::check_dx(const std::vector<real>& derivative, const std::vector<real>& z_size) {
  const bool training = c_.op != "backward_eval";
  const real m = count();
  for (int64_t i = 0; i < numel(); ++i) {
    const int64_t k = channel(i);
    const real g = derivative[i] == 0 ? 0 : dy_[i] * derivative[i];
    const real g_size = std::fabs(g) + std::fabs(dy_[i]) * z_size[i];
    if (dresidual_ && c_.act == "relu" && dresidual_[i] != g) {
      throw Failure(say("dresidual[%" PRId64 "] is %.9Lg, expected %.9Lg", i, dresidual_[i], g));
    }
    if (dresidual_) errors_.expect("dresidual", i, dresidual_[i], g, g_size, kActivation, c_.dtype);
    if (!dx_) continue;
    const real scale = weight(k) * invstd_[k];
    const real mean_dy = training ? sum_dy_[k] / m : 0;
    const real sloped = training ? (x_[i] - mean_[k]) * sum_dy_xmu_[k] / m * invstd_[k] * invstd_[k] : 0;
    const real size = (g_size + std::fabs(mean_dy) + std::fabs(sloped)) * std::fabs(scale);
    errors_.expect("dx", i, dx_[i], (g - mean_dy - sloped) * scale, size, kDx, c_.dtype);
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::ifstream file;
  if (argc > 1) {
    file.open(argv[1]);
    if (!file) {
      fprintf(stderr, "kernel_driver: cannot read %s\n", argv[1]);
      return 2;
    }
  }
  int failed = 0;
  std::istream& lines = argc > 1 ? file : std::cin;
  for (std::string line; std::getline(lines, line);) {
    if (line.empty()) continue;
    printf("%s: ", line.c_str());  // before it runs: the device's own reports end the process
    try {
      printf("ok %s\n", Run(parse(line))().c_str());
    } catch (const std::exception& e) {
      ++failed;
      printf("FAIL %s\n", e.what());
    }
  }
  return failed ? 1 : 0;
}
