// What bnext knows of devices, on simulated ones:
//
//     device_driver [NAME]
//
// prints "NAME: ok", or what was wrong, with exit status 1; without NAME, the names of all checks.
#include <cstdio>
#include <functional>
#include <map>
#include <string>

#include "../csrc/cuda/device.h"
#include "../csrc/cuda/plans/plans.h"
#include "simt/simt.h"

namespace {

using namespace bnext::cuda;

struct Failure { std::string what; };

void expect(bool good, const char* what) {
  if (!good) throw Failure{what};
}

DeviceProperties query() {
  DeviceProperties found = {};
  expect(query_device(0, &found) == cudaSuccess, "query_device failed");
  return found;
}

cudaFuncAttributes attributes() {
  cudaFuncAttributes out = {};
  expect(cudaFuncGetAttributes(&out, sample_kernel()) == cudaSuccess, "cudaFuncGetAttributes failed");
  return out;
}

// A plan with what it may be refused for.
Plan resident(int64_t splits, bool clustered) {
  Plan plan = {};
  plan.kind = PlanKind::resident;
  plan.resident.splits = splits;
  plan.resident.clustered = clustered;
  plan.resident.resident_bytes = 1;
  return plan;
}

Plan of_kind(PlanKind kind) {
  Plan plan = {};
  plan.kind = kind;
  return plan;
}

// ---- query_device --------------------------------------------------------------------------------

void properties_are_the_devices() {
  simt::device().multiprocessors = 40;
  const DeviceProperties found = query();
  expect(found.compute_capability == 90 && found.multiprocessors == 40 && found.cooperative && found.clusters, "90");
  expect(found.shared_per_block == 227 * 1024 && found.shared_per_multiprocessor == 228 * 1024, "shared memory");
  expect(found.clusters_together == std::array<int32_t, 4>{20, 10, 5, 2},
         "16 blocks of a multiprocessor each, in 16 + 16 + 8");
  expect(cudaGetLastError() == cudaSuccess, "an error is left");
}

void code_may_be_older_than_the_device() {
  simt::device().code_capability = 80;
  const DeviceProperties found = query();
  expect(found.compute_capability == 80 && !found.clusters && found.clusters_together[3] == 0, "80 on 90");
  // Machine code for 8.0, on 8.6.
  simt::device().compute_capability = 86;
  expect(query().compute_capability == 80, "80 on 86");
}

void large_clusters_may_be_refused() {
  simt::device().largest_cluster = 8;
  const DeviceProperties found = query();
  expect(found.clusters && found.clusters_together[3] == 0, "none of 16");
  expect(cudaGetLastError() == cudaSuccess, "an error is left");
}

void the_current_device_stays() {
  simt::set_device_count(3);
  simt::device(1).multiprocessors = 11;
  cudaSetDevice(2);
  DeviceProperties found = {};
  int current = -1;
  expect(query_device(1, &found) == cudaSuccess && found.multiprocessors == 11, "that of device 1");
  expect(cudaGetDevice(&current) == cudaSuccess && current == 2, "another one is current");
  expect(query_device(3, &found) == cudaErrorInvalidDevice, "there are three");
}

// ---- allow_kernel_resources -------------------------------------------------------------------------------------

// All of 48 KB, static shared memory included, and not a byte more.
void asks_for_what_goes_beyond_48_kb() {
  const int without = 48 * 1024 - static_cast<int>(attributes().sharedSizeBytes);
  expect(allow_kernel_resources(sample_kernel(), 256, without, 1) == cudaSuccess, "48 KB");
  expect(attributes().maxDynamicSharedSizeBytes == without, "asked for nothing");
  expect(allow_kernel_resources(sample_kernel(), 256, without + 1, 1) == cudaSuccess, "48 KB and a byte");
  expect(attributes().maxDynamicSharedSizeBytes == without + 1, "asked for a byte");
  expect(allow_kernel_resources(sample_kernel(), 256, 1, 1) == cudaSuccess, "less");
  expect(attributes().maxDynamicSharedSizeBytes == without + 1, "what was granted stays");
}

void asks_once() {
  expect(allow_kernel_resources(sample_kernel(), 128, 60000, 16) == cudaSuccess, "at first");
  const auto asked = [](int threads, size_t shared, unsigned cluster) {
    const uint64_t calls = simt::count_calls() - simt::count_calls("cudaGetDevice");
    expect(allow_kernel_resources(sample_kernel(), threads, shared, cluster) == cudaSuccess, "again");
    return simt::count_calls() - simt::count_calls("cudaGetDevice") != calls;
  };
  expect(!asked(128, 60000, 16) && !asked(256, 0, 1) && !asked(128, 59999, 8), "asked again");
  expect(asked(64, 0, 1) && asked(64, 60001, 1), "did not ask for more");
}

void asks_on_every_device() {
  simt::set_device_count(2);
  expect(allow_kernel_resources(sample_kernel(), 256, 100000, 16) == cudaSuccess, "device 0");
  cudaSetDevice(1);
  expect(attributes().maxDynamicSharedSizeBytes < 100000, "device 1 is not asked");
  expect(allow_kernel_resources(sample_kernel(), 256, 100000, 16) == cudaSuccess, "device 1");
  expect(attributes().maxDynamicSharedSizeBytes == 100000, "device 1 is asked");
}

void more_than_there_is_fails() {
  expect(allow_kernel_resources(sample_kernel(), 256, 227 * 1024, 1) == cudaErrorInvalidValue,
         "with static shared memory");
  expect(allow_kernel_resources(sample_kernel(), 256, 1000, 1) == cudaSuccess, "less is granted after that");
  cudaGetLastError();
}

// As much as two blocks of 256 threads take, which its launch bounds promise.
void carveout_holds_the_promised_blocks() {
  const auto of_two = [](int64_t dynamic) {
    const auto block = static_cast<int64_t>(attributes().sharedSizeBytes) + dynamic + 1024;
    return (100 * 2 * block + 228 * 1024 - 1) / (228 * 1024);
  };
  expect(allow_kernel_resources(sample_kernel(), 256, 10000, 1) == cudaSuccess, "below 28 KB");
  expect(attributes().preferredShmemCarveout == of_two(10000), "of two blocks");
  expect(allow_kernel_resources(sample_kernel(), 256, 90000, 1) == cudaSuccess, "above");
  expect(attributes().preferredShmemCarveout == of_two(90000), "of two blocks");
  expect(allow_kernel_resources(sample_kernel(), 256, 200000, 1) == cudaSuccess, "one block");
  expect(attributes().preferredShmemCarveout == 100, "all of it");
}

// ---- Device --------------------------------------------------------------------------------------

void a_device_is_queried_once() {
  Device *first = nullptr, *second = nullptr;
  expect(Device::get(0, &first) == cudaSuccess && first, "device 0");
  const uint64_t calls = simt::count_calls();
  expect(Device::get(0, &second) == cudaSuccess && first == second, "the same");
  expect(simt::count_calls() == calls, "asked again");
  expect(Device::get(7, &second) == cudaErrorInvalidDevice, "device 7");
  expect(Device::get(-1, &second) == cudaErrorInvalidDevice && Device::get(9999, &second) == cudaErrorInvalidDevice,
         "no device at all");
}

void refusals_are_remembered() {
  Device device(query());
  expect(device.refused().empty(), "nothing yet");
  cudaSetDevice(99);
  expect(device.disable_refused(resident(16, true), cudaErrorInvalidClusterSize), "clusters of 16");
  expect(cudaGetLastError() == cudaSuccess, "the runtime's error is left");
  expect(device.properties().clusters && device.properties().clusters_together[3] == 0, "clusters of 8 stay");
  expect(device.disable_refused(resident(4, true), cudaErrorLaunchOutOfResources), "clusters");
  expect(!device.properties().clusters && device.properties().cooperative, "cooperative launches stay");
  expect(device.disable_refused(of_kind(PlanKind::cooperative), cudaErrorNotSupported), "cooperative launches");
  expect(device.disable_refused(resident(4, false), cudaErrorCooperativeLaunchTooLarge),
         "of the other plan, as another thread");
  expect(!device.properties().cooperative && device.refused().size() == 3, "all three");
}

void other_errors_are_the_callers() {
  Device device(query());
  cudaSetDevice(99);
  expect(!device.disable_refused(resident(4, true), cudaErrorInvalidDevice), "another error");
  expect(!device.disable_refused(of_kind(PlanKind::two_pass), cudaErrorNotSupported), "nothing to do without");
  expect(!device.disable_refused(resident(1, true), cudaErrorLaunchOutOfResources), "one block to a channel");
  expect(!device.disable_refused(resident(1, false), cudaErrorLaunchOutOfResources), "one block to a tile");
  expect(device.refused().empty() && cudaGetLastError() == cudaErrorInvalidDevice, "the error was taken");
}

#define CHECK(name) {#name, name}
const std::map<std::string, std::function<void()>> checks = {
    CHECK(properties_are_the_devices),
    CHECK(code_may_be_older_than_the_device),
    CHECK(large_clusters_may_be_refused),
    CHECK(the_current_device_stays),
    CHECK(asks_for_what_goes_beyond_48_kb),
    CHECK(asks_once),
    CHECK(asks_on_every_device),
    CHECK(more_than_there_is_fails),
    CHECK(carveout_holds_the_promised_blocks),
    CHECK(a_device_is_queried_once),
    CHECK(refusals_are_remembered),
    CHECK(other_errors_are_the_callers),
};

}  // namespace

// One check a process: what a kernel was granted is remembered for as long as it lasts.
int main(int argc, char** argv) {
  if (argc != 2 || checks.count(argv[1]) == 0) {
    for (const auto& [name, check] : checks) puts(name.c_str());
    return argc == 1 ? 0 : 2;
  }
  try {
    checks.at(argv[1])();
  } catch (const Failure& failure) {
    printf("%s: %s\n", argv[1], failure.what.c_str());
    return 1;
  }
  printf("%s: ok\n", argv[1]);
  return 0;
}
