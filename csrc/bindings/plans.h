// What the CUDA backend's plans go by: one switch for all of them, so that tests and benchmarks can run each on
// each shape, and what to leave to kernels that run beside.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <string>
#include <vector>

namespace bnext {

std::vector<std::string> plans();

// Makes every training forward and backward of this process take this plan, or an error where the shape
// has no such plan; "automatic" ends that. parse_choice() says how a plan is spelled. Returns what held before.
// BNEXT_PLAN sets what holds at first.
std::string force_plan(const std::string& plan);

// Multiprocessors that kernels whose blocks wait for each other do not count on, since they cannot begin before
// there is room for all of them: those of a library's communication kernels, which may be long. Returns what held
// before. BNEXT_SM_MARGIN sets what holds at first.
int64_t set_sm_margin(int64_t multiprocessors);

// The members of cuda::DeviceProperties, in their order, one after the other; those of a device without what it has
// refused.
using DeviceNumbers = std::array<int64_t, 12>;
DeviceNumbers device_properties(int64_t device);

// What the driver has refused to launch on that device so far, which plans go without since then.
std::vector<std::string> refused_launches(int64_t device);

// What a training forward or backward of a layer over x would get on such a device, in words. x may be a meta tensor.
// By `plan`, or where that is empty by what holds.
std::string describe_plan(const at::Tensor& x, bool backward, const std::string& activation, bool residual,
                          const DeviceNumbers& device, const std::string& plan);

}  // namespace bnext
