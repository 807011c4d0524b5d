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

// In the order of PlanChoice.
const std::vector<std::string> kPlans = {"automatic", "small", "two_pass", "resident"};

cuda::PlanChoice parse_plan(const std::string& name) {
  const auto found = std::find(kPlans.begin(), kPlans.end(), name);
  TORCH_CHECK_VALUE(found != kPlans.end(), "plan should be 'automatic', 'small', 'two_pass' or 'resident', not '", name,
                    "'");
  return static_cast<cuda::PlanChoice>(found - kPlans.begin());
}

// Of the process, not of a thread: autograd runs the backward on another one.
std::atomic<cuda::PlanChoice>& choice() {
  static std::atomic<cuda::PlanChoice> value = [] {
    const char* name = std::getenv("BNEXT_PLAN");
    return name ? parse_plan(name) : cuda::PlanChoice::automatic;
  }();
  return value;
}

void check_choice(const cuda::Plan& plan) {
  using cuda::PlanChoice, cuda::PlanKind;
  const PlanChoice wanted = choice();
  const bool met = wanted == PlanChoice::automatic || (wanted == PlanChoice::small && plan.kind == PlanKind::small) ||
                   (wanted == PlanChoice::resident && plan.kind == PlanKind::resident) ||
                   (wanted == PlanChoice::two_pass && plan.kind == PlanKind::two_pass);
  TORCH_CHECK(met, "this shape has no plan '", kPlans[static_cast<size_t>(wanted)],
              "', which force_plan or BNEXT_PLAN asks for");
}

// A plan with the memory and the stream that it runs on.
struct Launch {
  cudaStream_t stream;
  cuda::Plan plan;
  cuda::Scratch scratch = {};
  Tensor partials, captured_counters;

  // `scratch` false: for an elementwise stage, which needs none.
  template <class Params>
  Launch(const Params& p, const Tensor& x, bool scratch = true)
      : stream(c10::cuda::getCurrentCUDAStream(x.device().index())),
        plan(plan_of(p, properties_of(x.device().index()))) {
    if (scratch) allocate(x);
  }

 private:
  static cuda::Plan plan_of(const ForwardParams& p, const cuda::DeviceProperties& d) {
    return cuda::plan_forward(p, d);
  }
  static cuda::Plan plan_of(const BackwardParams& p, const cuda::DeviceProperties& d) {
    return cuda::plan_backward(p, d);
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
    const Launch l(p, x);
    check(cuda::launch_stats(p, l.plan, l.scratch, l.stream), "stats");
  }
  static void normalize(const ForwardParams& p, const Tensor& x) {
    const Launch l(p, x, /*scratch=*/false);
    check(cuda::launch_normalize(p, l.plan, l.stream), "normalize");
  }
  static void forward(const ForwardParams& p, const Tensor& x) {
    const Launch l(p, x);
    check_choice(l.plan);
    check(cuda::launch_forward(p, l.plan, l.scratch, l.stream), "forward");
  }
  static void backward_reduce(const BackwardParams& p, const Tensor& x) {
    const Launch l(p, x);
    check(cuda::launch_backward_reduce(p, l.plan, l.scratch, l.stream), "backward_reduce");
  }
  static void backward_input(const BackwardParams& p, const Tensor& x) {
    const Launch l(p, x, /*scratch=*/false);
    check(cuda::launch_backward_input(p, l.plan, l.stream), "backward_input");
  }
  static void backward(const BackwardParams& p, const Tensor& x) {
    const Launch l(p, x);
    check_choice(l.plan);
    check(cuda::launch_backward(p, l.plan, l.scratch, l.stream), "backward");
  }
};

}  // namespace

std::vector<std::string> plans() { return kPlans; }

std::string force_plan(const std::string& name) {
  return kPlans[static_cast<size_t>(choice().exchange(parse_plan(name)))];
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
