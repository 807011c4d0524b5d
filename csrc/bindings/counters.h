// Counters for a launch, by the rules of counter_pool.h.
#pragma once

#include <c10/core/Device.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace bnext {

// At least `count` counters that are 0 for the next launch in the stream, if that leaves them so. On the current
// device, which `device` is.
uint32_t* counters_for(c10::DeviceIndex device, cudaStream_t stream, int64_t count);

}  // namespace bnext
