// The operators on CUDA tensors; in a build without CUDA, what to do about it.
#include "ops.h"

#if defined(BNEXT_WITH_CUDA)

#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <utility>

#include "../cuda/launch.h"
#include "plans.h"

namespace bnext {
namespace {

void check(cudaError_t error, const char* what) {
  TORCH_CHECK(error == cudaSuccess, "bnext::", what, ": ", cudaGetErrorName(error), ": ", cudaGetErrorString(error));
}

// What outlives a call, for one device or one stream of it. Never destroyed: at exit the CUDA
// driver may be gone before static objects are.
struct Cache {
  std::mutex mutex;
  std::map<c10::DeviceIndex, cuda::DeviceProperties> properties;
  struct Counters {
    uint32_t* data;
    int64_t count;
  };
  std::map<std::pair<c10::DeviceIndex, cudaStream_t>, Counters> counters;

  static Cache& instance() {
    static Cache* cache = new Cache;
    return *cache;
  }
};

const cuda::DeviceProperties& properties_of(c10::DeviceIndex device) {
  Cache& cache = Cache::instance();
  const std::lock_guard<std::mutex> lock(cache.mutex);
  auto found = cache.properties.find(device);
  if (found == cache.properties.end()) {
    cuda::DeviceProperties properties = {};
    check(cuda::query_device(device, &properties), "query_device");
    found = cache.properties.emplace(device, properties).first;
  }
  return found->second;
}

// Counters that are zero now and that every call leaves at zero, so that one buffer serves all
// calls of a stream, one after the other. It is no tensor, because it outlives the call: torch's
// allocator may be drawing from the pool of a CUDA graph that is about to be captured. A buffer
// that has become too small stays, since kernels may be using it; the sizes double.
uint32_t* counters_of(c10::DeviceIndex device, cudaStream_t stream, int64_t count) {
  Cache& cache = Cache::instance();
  const std::lock_guard<std::mutex> lock(cache.mutex);
  Cache::Counters& counters = cache.counters[{device, stream}];
  if (counters.count < count) {
    const int64_t size = std::max<int64_t>({count, 2 * counters.count, 4096});
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;  // another stream may be capturing
    check(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
    void* data = nullptr;
    const cudaError_t error = cudaMalloc(&data, size * sizeof(uint32_t));
    check(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
    check(error, "cudaMalloc");
    check(cudaMemsetAsync(data, 0, size * sizeof(uint32_t), stream), "cudaMemsetAsync");
    counters = {static_cast<uint32_t*>(data), size};
  }
  return counters.data;
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

// In the order of PlanKind.
const std::vector<std::string> kPlans = {"automatic", "resident", "cooperative", "two_pass"};

cuda::PlanKind parse_plan(const std::string& name) {
  const auto found = std::find(kPlans.begin(), kPlans.end(), name);
  TORCH_CHECK_VALUE(found != kPlans.end(), "plan should be 'automatic', 'resident', 'cooperative' or 'two_pass', not '",
                    name, "'");
  return static_cast<cuda::PlanKind>(found - kPlans.begin());
}

int parse_margin(int64_t multiprocessors) {
  TORCH_CHECK_VALUE(multiprocessors >= 0 && multiprocessors <= 1024,
                    "sm_margin should be a number of multiprocessors, from 0 on, not ", multiprocessors);
  return static_cast<int>(multiprocessors);
}

cuda::PlanKind plan_of_environment() {
  const char* name = std::getenv("BNEXT_PLAN");
  return name ? parse_plan(name) : cuda::PlanKind::automatic;
}

int margin_of_environment() {
  const char* text = std::getenv("BNEXT_SM_MARGIN");
  if (text == nullptr) return 0;
  char* end = nullptr;
  const long value = std::strtol(text, &end, 10);
  TORCH_CHECK_VALUE(*text != 0 && *end == 0, "BNEXT_SM_MARGIN should be a number of multiprocessors, not '", text, "'");
  return parse_margin(value);
}

// Of the process, not of a thread: autograd runs the backward on another one.
struct Options {
  std::atomic<cuda::PlanKind> kind;
  std::atomic<int> sm_margin;

  static Options& instance() {
    static Options options = {{plan_of_environment()}, {margin_of_environment()}};
    return options;
  }
};

void check_kind(const cuda::Plan& plan, cuda::PlanKind wanted) {
  TORCH_CHECK(wanted == cuda::PlanKind::automatic || wanted == plan.kind, "this shape has no plan '",
              kPlans[static_cast<size_t>(wanted)], "', which force_plan or BNEXT_PLAN asks for");
}

// A plan with the memory and the stream that it runs on.
struct Launch {
  cudaStream_t stream;
  cuda::Plan plan;
  cuda::Scratch scratch = {};
  Tensor partials, captured_counters;

  enum class Of { whole, reduction, elementwise };

  template <class Params>
  Launch(const Params& p, const Tensor& x, Of what) : stream(c10::cuda::getCurrentCUDAStream(x.device().index())) {
    const Options& options = Options::instance();
    const cuda::PlanKind kind = what == Of::whole ? options.kind.load() : cuda::PlanKind::two_pass;
    plan = plan_of(p, properties_of(x.device().index()), {kind, options.sm_margin});
    check_kind(plan, kind);
    if (what != Of::elementwise) allocate(x);
  }

 private:
  static cuda::Plan plan_of(const ForwardParams& p, const cuda::DeviceProperties& d, const cuda::PlanOptions& options) {
    return cuda::plan_forward(p, d, options);
  }
  static cuda::Plan plan_of(const BackwardParams& p, const cuda::DeviceProperties& d,
                            const cuda::PlanOptions& options) {
    return cuda::plan_backward(p, d, options);
  }

  void allocate(const Tensor& x) {
    if (plan.partial_bytes != 0) {
      partials = at::empty({plan.partial_bytes}, x.options().dtype(at::kByte));
      scratch.partials = partials.data_ptr();
    }
    if (plan.counters == 0) return;
    if (is_capturing(stream)) {
      // The graph may be replayed on another stream beside this one: it gets counters of its own.
      captured_counters = at::zeros({plan.counters}, x.options().dtype(at::kInt));
      scratch.counters = static_cast<uint32_t*>(captured_counters.data_ptr());
    } else {
      scratch.counters = counters_of(x.device().index(), stream, plan.counters);
    }
  }
};

struct Cuda {
  static constexpr bool executes = true;
  using Int = int64_t;

  static void stats(const ForwardParams& p, const Tensor& x) {
    const Launch l(p, x, Launch::Of::reduction);
    check(cuda::launch_stats(p, l.plan, l.scratch, l.stream), "stats");
  }
  static void normalize(const ForwardParams& p, const Tensor& x) {
    const Launch l(p, x, Launch::Of::elementwise);
    check(cuda::launch_normalize(p, l.plan, l.stream), "normalize");
  }
  static void forward(const ForwardParams& p, const Tensor& x) {
    const Launch l(p, x, Launch::Of::whole);
    check(cuda::launch_forward(p, l.plan, l.scratch, l.stream), "forward");
  }
  static void backward_reduce(const BackwardParams& p, const Tensor& x) {
    const Launch l(p, x, Launch::Of::reduction);
    check(cuda::launch_backward_reduce(p, l.plan, l.scratch, l.stream), "backward_reduce");
  }
  static void backward_input(const BackwardParams& p, const Tensor& x) {
    const Launch l(p, x, Launch::Of::elementwise);
    check(cuda::launch_backward_input(p, l.plan, l.stream), "backward_input");
  }
  static void backward(const BackwardParams& p, const Tensor& x) {
    const Launch l(p, x, p.elementwise() && p.reduces() ? Launch::Of::whole : Launch::Of::reduction);
    check(cuda::launch_backward(p, l.plan, l.scratch, l.stream), "backward");
  }
};

}  // namespace

std::vector<std::string> plans() { return kPlans; }

std::string force_plan(const std::string& name) {
  return kPlans[static_cast<size_t>(Options::instance().kind.exchange(parse_plan(name)))];
}

int64_t set_sm_margin(int64_t multiprocessors) {
  return Options::instance().sm_margin.exchange(parse_margin(multiprocessors));
}

TORCH_LIBRARY_IMPL(bnext, CUDA, m) { register_ops<Cuda>(m); }

}  // namespace bnext

#else  // BNEXT_WITH_CUDA

namespace bnext {
namespace {

void refuse(const c10::OperatorHandle& op, c10::Stack*) {
  TORCH_CHECK(false, op.schema().name(),
              ": got a CUDA tensor, but this build of bnext has CPU code only. Rebuild it where a CUDA compiler and a "
              "CUDA build of torch are installed: `pip install --no-build-isolation --force-reinstall --no-deps .`, "
              "with CUDA_HOME set if nvcc lies in an unusual place.");
}

}  // namespace

TORCH_LIBRARY_IMPL(bnext, CUDA, m) {
  for (const char* name :
       {"stats", "normalize", "forward", "forward_eval", "backward_reduce", "backward_input", "backward"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse>());
  }
}

}  // namespace bnext

#endif
