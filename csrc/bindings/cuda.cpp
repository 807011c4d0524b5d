// The operators on CUDA tensors; in a build without CUDA, what to do about it.
#include "batch_norm_ops.h"

#if defined(BNEXT_WITH_CUDA)

#include <c10/cuda/CUDAStream.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "../cuda/device.h"
#include "../cuda/launch.h"
#include "counters.h"
#include "cuda_error.h"
#include "plans.h"

namespace bnext {
namespace {

cuda::Device& device_of(c10::DeviceIndex index) {
  cuda::Device* device = nullptr;
  check(cuda::Device::get(index, &device), "query_device");
  return *device;
}

// ---- What holds for all plans

// `source` says where the text came from, if not from the caller.
cuda::PlanChoice parse_plan(const std::string& text, const char* source = "") {
  try {
    return cuda::parse_choice(text);
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, source, error.what());
  }
}

int parse_margin(int64_t multiprocessors) {
  TORCH_CHECK_VALUE(multiprocessors >= 0 && multiprocessors <= 1024,
                    "sm_margin should be a number of multiprocessors, from 0 on, not ", multiprocessors);
  return static_cast<int>(multiprocessors);
}

cuda::PlanChoice plan_of_environment() {
  const char* text = std::getenv("BNEXT_PLAN");
  return text ? parse_plan(text, "BNEXT_PLAN: ") : cuda::PlanChoice{};
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
  std::atomic<cuda::PlanChoice> plan;
  std::atomic<int> sm_margin;

  static Options& instance() {
    static Options options = {{plan_of_environment()}, {margin_of_environment()}};
    return options;
  }
  cuda::PlanOptions get() const { return {plan.load(), sm_margin.load()}; }
};
static_assert(std::atomic<cuda::PlanChoice>::is_always_lock_free);

// ---- Running a plan

// The plan that `options` ask for.
template <class Params>
cuda::Plan plan_of(const Params& p, const cuda::DeviceProperties& device, const cuda::PlanOptions& options) {
  std::string refusal;
  const cuda::Plan plan = cuda::make_plan(p, device, options, &refusal);
  TORCH_CHECK(refusal.empty(), "this shape has no plan '", cuda::to_string(options.plan),
              "', which force_plan or BNEXT_PLAN asks for: ", refusal);
  return plan;
}

// What a launch needs beside its operands, for as long as it takes to launch: memory of torch's that is freed then is
// not used by others before the launch is over, as it belongs to the stream.
struct Workspace {
  Tensor partials;
  cuda::Scratch scratch = {};

  Workspace(const cuda::Plan& plan, const Tensor& x, cudaStream_t stream) {
    if (plan.partial_bytes != 0) {
      partials = Allocate<true>::empty(x, {c10::SymInt(plan.partial_bytes)}, at::kByte);
      scratch.partials = partials.data_ptr();
    }
    if (plan.counters != 0) scratch.counters = counters_for(x.device().index(), stream, plan.counters);
    if (plan.flagged_bytes != 0) scratch.flagged = flagged_for(x.device().index(), stream, plan.flagged_bytes);
  }
};

// What is run: the whole, for which there are several plans, or a stage.
enum class Stage { whole, reduction, elementwise };

// Plans for the device of x, allocates what the plan needs, and launches it by launch(p, plan, scratch, stream); and
// again, without what the driver refuses, where it does.
template <class Params, class Launch>
void run(const char* name, Stage what, const Params& p, const Tensor& x, Launch&& launch) {
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream(x.device().index());
  cuda::PlanOptions options = Options::instance().get();
  if (what != Stage::whole) options.plan = {cuda::PlanKind::two_pass};
  cuda::Device& device = device_of(x.device().index());
  for (;;) {
    const cuda::Plan plan = plan_of(p, device.properties(), options);
    const Workspace workspace = what == Stage::elementwise ? Workspace({}, x, stream) : Workspace(plan, x, stream);
    const cudaError_t error = launch(p, plan, workspace.scratch, stream);
    if (error == cudaSuccess || !device.disable_refused(plan, error)) return check(error, name);
  }
}

// An elementwise stage's launcher, which takes no scratch, as one that does.
template <class Params>
auto without_scratch(cudaError_t (*launch)(const Params&, const cuda::Plan&, cudaStream_t)) {
  return [launch](const Params& p, const cuda::Plan& plan, const cuda::Scratch&, cudaStream_t stream) {
    return launch(p, plan, stream);
  };
}

struct Cuda {
  static constexpr bool executes = true;
  using Int = int64_t;

  static void stats(const BatchNormForwardParams& p, const Tensor& x) {
    run("batch_norm_stats", Stage::reduction, p, x, cuda::launch_batch_norm_stats);
  }
  static void normalize(const BatchNormForwardParams& p, const Tensor& x) {
    run("batch_norm_normalize", Stage::elementwise, p, x, without_scratch(cuda::launch_batch_norm_normalize));
  }
  static void forward(const BatchNormForwardParams& p, const Tensor& x) {
    run("batch_norm_forward", Stage::whole, p, x, cuda::launch_batch_norm_forward);
  }
  static void check_forward(const BatchNormForwardParams& p, const Tensor& x) {
    plan_of(p, device_of(x.device().index()).properties(), Options::instance().get());
  }
  // A count of 1 makes running_var NaN: only the device knows it, and the host does not wait.
  static void merge(const BatchNormMergeParams& p, const Tensor& stats) {
    check(cuda::launch_batch_norm_merge(p, c10::cuda::getCurrentCUDAStream(stats.device().index())),
          "batch_norm_merge");
  }
  static void backward_reduce(const BatchNormBackwardParams& p, const Tensor& x) {
    run("batch_norm_backward_reduce", Stage::reduction, p, x, cuda::launch_batch_norm_backward_reduce);
  }
  static void backward_input(const BatchNormBackwardParams& p, const Tensor& x) {
    run("batch_norm_backward_input", Stage::elementwise, p, x, without_scratch(cuda::launch_batch_norm_backward_input));
  }
  static void backward(const BatchNormBackwardParams& p, const Tensor& x) {
    const Stage what = !p.reduces() ? Stage::elementwise : p.elementwise() ? Stage::whole : Stage::reduction;
    run("batch_norm_backward", what, p, x, cuda::launch_batch_norm_backward);
  }
};

}  // namespace

std::vector<std::string> plans() { return {std::begin(cuda::kPlanKindNames), std::end(cuda::kPlanKindNames)}; }

std::string force_plan(const std::string& plan) {
  return cuda::to_string(Options::instance().plan.exchange(parse_plan(plan)));
}

int64_t set_sm_margin(int64_t multiprocessors) {
  return Options::instance().sm_margin.exchange(parse_margin(multiprocessors));
}

DeviceNumbers device_properties(int64_t device) {
  const cuda::DeviceProperties d = device_of(static_cast<c10::DeviceIndex>(device)).properties();
  const auto& together = d.clusters_together;
  return {d.compute_capability, d.multiprocessors, d.shared_per_multiprocessor,
          d.shared_per_block,   d.l2_bytes,        d.bandwidth,
          together[0],          together[1],       together[2],
          together[3],          d.cooperative,     d.clusters};
}

std::vector<std::string> refused_launches(int64_t device) {
  return device_of(static_cast<c10::DeviceIndex>(device)).refused();
}

std::string describe_plan(const Tensor& x, bool backward, const std::string& activation, bool residual,
                          const DeviceNumbers& device, const std::string& plan) {
  const Activation act = parse_activation(activation, /*param=*/0);
  check_input(x);
  const auto count = [&](size_t i) { return static_cast<int32_t>(device[i]); };
  const cuda::DeviceProperties properties = {count(0),
                                             count(1),
                                             device[2],
                                             device[3],
                                             device[4],
                                             device[5],
                                             {count(6), count(7), count(8), count(9)},
                                             device[10] != 0,
                                             device[11] != 0};
  cuda::PlanOptions options = Options::instance().get();
  if (!plan.empty()) options.plan = parse_plan(plan);
  // A plan looks at which operands there are, not at what is in them.
  uint8_t present = 0;
  const auto fill_in = [&](auto& p) {
    p.shape = shape_of(x, format_of(x));
    p.dtype = to_dtype("x", x.scalar_type());
    p.activation = act;
  };
  if (backward) {
    BatchNormBackwardParams p = {};
    fill_in(p);
    p.training = true;
    p.mask = residual && saves_of(act) == Saves::mask ? &present : nullptr;
    p.residual = residual && saves_of(act) == Saves::residual ? &present : nullptr;
    p.dx = p.dweight = &present;
    return cuda::describe(plan_of(p, properties, options));
  }
  BatchNormForwardParams p = {};
  fill_in(p);
  p.residual = residual ? &present : nullptr;
  return cuda::describe(plan_of(p, properties, options));
}

TORCH_LIBRARY_IMPL(bnext, CUDA, m) { register_batch_norm<Cuda>(m); }

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
  for (const char* name : kBatchNormOps) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse>());
  }
}

}  // namespace bnext

#endif
