// What a test may ask of the simulated device, beside what CUDA's own runtime offers (cuda_runtime.h): which device it
// is, in which order it runs threads, memory that is watched, and what has been launched.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt {

// ---- The device ----------------------------------------------------------------------------------

// An H100 cut down to a few multiprocessors, so that grids made to fill it stay small.
struct Device {
  int compute_capability = 90;  // 10 * major + minor
  // Of the code: less than the device's where PTX of an older architecture is compiled at load time.
  int code_capability = 90;
  int multiprocessors = 4;
  int multiprocessors_per_cluster = 16;  // so many next to each other can run a cluster's blocks
  int shared_per_multiprocessor = 228 * 1024;
  int shared_per_block = 227 * 1024;  // with opt-in
  int l2_bytes = 50 << 20;
  int memory_khz = 2619000, memory_bits = 5120;
  // What a driver may refuse to launch although the hardware could: under MPS, in a green context, on a vGPU.
  bool refuses_cooperative = false;
  int largest_cluster = 16;  // 1: refuses all
};

// Those that there are: one at first, each as above. Whatever a test changes holds from the next call on.
Device& device(int ordinal = 0);
void set_device_count(int count);
// As at first: one device, and kernels that have been given nothing yet.
void reset_devices();

// ---- What was done -------------------------------------------------------------------------------

struct Launched {
  const void* kernel;
  uint64_t blocks;
  unsigned cluster;  // blocks of one; 1 where the launch asked for none
  bool cooperative, overlapping;
  size_t shared;  // bytes of a block, static and dynamic
  // Blocks that a multiprocessor holds at a time: with its memory split between shared memory and L1 as the kernel
  // prefers (or, if it says nothing, so that one block has room), and with all of it as shared memory.
  int fit_as_split, fit;
};

// The latest kernel that ran.
const Launched& last_launch();
// How many have run.
uint64_t count_launches();
// How often a function of the runtime has been called, by its name.
uint64_t count_calls(const char* function);
uint64_t count_calls();

// ---- Order ---------------------------------------------------------------------------------------

// 0 runs blocks and threads in order; anything else is a random order that it determines. The
// environment variable SIMT_SEED gives the first one.
void set_seed(uint64_t seed);

// ---- Memory --------------------------------------------------------------------------------------

// "Global memory": 16-byte aligned, all 0xff (NaN), guarded on both sides, and in race mode unwritten.
// Accesses outside are reported: at once by the sanitizer and race builds, by the plain build (writes
// only) after the kernel.
void* allocate(size_t bytes, const char* name);
void release(void* address);
// The host wrote these bytes, which must lie in one allocation. Only the race build needs to know.
void written(const void* address, size_t bytes);
// Bytes of [address, address + bytes) that nobody has written; 0 in all but the race build.
size_t count_unwritten(const void* address, size_t bytes);

}  // namespace simt
