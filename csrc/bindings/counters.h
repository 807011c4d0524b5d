// Counters and flagged memory for a launch, by the rules of counter_pool.h.
#pragma once

#include <c10/core/Device.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace bnext {

// At least `count` counters that are 0 for the next launch in the stream, if that leaves them so. On the current
// device, which `device` is.
uint32_t* counters_for(c10::DeviceIndex device, cudaStream_t stream, int64_t count);

// The same of memory that holds what the launches in the stream that had it before left there, and zeros at first.
void* flagged_for(c10::DeviceIndex device, cudaStream_t stream, int64_t bytes);

}  // namespace bnext
