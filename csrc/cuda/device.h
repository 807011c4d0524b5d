// What is known of a device, and what it has been found not to do.
#pragma once

#include <atomic>
#include <string>
#include <vector>

#include "device/cuda_compat.h"
#include "planner/plan.h"

namespace bnext::cuda {

// A driver may refuse to launch what the device could run: all blocks of a grid together, or clusters. It does under
// MPS, in green contexts, on virtual GPUs, in debuggers, and says so at the launch only. So whoever launches
//
//   plans by properties(), allocates, and launches; and does so again as long as disable_refused() is true of the
//   error.
//
// Nothing has run when a launch is refused. For all threads of a process; no member takes a lock.
class Device {
 public:
  explicit Device(const DeviceProperties& found) : found_(found) {}

  // The device of that number, queried when first asked for, which is slow.
  static cudaError_t get(int ordinal, Device** device);

  // What it said of itself, less what it has refused since.
  DeviceProperties properties() const;

  // After the first launch of this plan ended with that error: whether it is one that refuses what another plan does
  // without. Then that is remembered, and the runtime's error cleared.
  bool disable_refused(const Plan& plan, cudaError_t error);

  // What it has refused so far, for people to read.
  std::vector<std::string> refused() const;

 private:
  const DeviceProperties found_;
  std::atomic<bool> cooperative_{true}, clusters_{true}, large_clusters_{true};
};

}  // namespace bnext::cuda
