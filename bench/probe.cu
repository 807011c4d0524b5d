// Measures on a GPU what the plans' constants come from; bench/probe.py compiles it, runs it and explains its rows.
//
// One argument, the letter of a section: each runs in a process of its own, so that a fault or an endless wait in one
// costs none of the others. Each measurement is a line of JSON on standard output. A launch that the device refuses is
// a row with an `error`; what a device cannot have at all (clusters below compute capability 9.0) is no row.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>

#define CHECK(call)                                                                            \
  do {                                                                                         \
    const cudaError_t error_ = (call);                                                         \
    if (error_ != cudaSuccess) {                                                               \
      std::fprintf(stderr, "%s: %s (line %d)\n", #call, cudaGetErrorString(error_), __LINE__); \
      std::exit(1);                                                                            \
    }                                                                                          \
  } while (0)

namespace {

// One line of output, written when the statement ends.
class Row {
 public:
  Row() { std::printf("{"); }
  ~Row() {
    std::printf("}\n");
    std::fflush(stdout);
  }
  Row& operator()(const char* key, const char* value) {
    comma();
    std::printf("\"%s\": \"%s\"", key, value);
    return *this;
  }
  template <class T, class = std::enable_if_t<std::is_arithmetic_v<T>>>
  Row& operator()(const char* key, T number) {
    const double value = static_cast<double>(number);
    comma();
    if (std::isfinite(value)) {
      std::printf("\"%s\": %.6g", key, value);
    } else {
      std::printf("\"%s\": null", key);
    }
    return *this;
  }
  Row& refused(cudaError_t error) { return error == cudaSuccess ? *this : (*this)("error", cudaGetErrorName(error)); }

 private:
  void comma() {
    if (!first_) std::printf(", ");
    first_ = false;
  }
  bool first_ = true;
};

int sms, capability;
cudaStream_t stream;
uint32_t* sink;  // where kernels would put what they read, if it had one very unlikely value

bool has_clusters() { return capability >= 90; }

// A launch with up to one attribute.
template <class... Params, class... Args>
cudaError_t start(void (*kernel)(Params...), int grid, int block, size_t shared, cudaLaunchAttribute* attribute,
                  Args... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(block);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attribute;
  config.numAttrs = attribute ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

cudaLaunchAttribute cooperative() {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  return attribute;
}

cudaLaunchAttribute overlapping() {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

cudaLaunchAttribute clusters_of(unsigned size) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = size;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return attribute;
}

// Lets a kernel have that much dynamic shared memory and, if the device has them, clusters of 16.
template <class... Params>
void allow(void (*kernel)(Params...), size_t shared) {
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100));
  if (shared > 0) {
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  }
  if (has_clusters() &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess) {
    cudaGetLastError();  // launches with clusters of 16 will be refused, and say so
  }
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// Microseconds that `launch` takes on the device, the median of some; NaN and the error where it is refused.
template <class Launch>
double time_us(Launch&& launch, cudaError_t* refused, int samples = 7) {
  static cudaEvent_t begin, end;
  if (!begin) {
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
  }
  std::vector<double> times;
  for (int i = -2; i < samples; ++i) {
    CHECK(cudaEventRecord(begin, stream));
    *refused = launch();
    if (*refused != cudaSuccess) {
      cudaGetLastError();
      CHECK(cudaStreamSynchronize(stream));
      return NAN;
    }
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
    float ms = 0;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 0) times.push_back(1e3 * ms);
  }
  return median(times);
}

__global__ void fill(uint4* data, size_t n) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < n; i += size_t{gridDim.x} * blockDim.x) {
    const uint32_t a = static_cast<uint32_t>(i) * 2654435761u;
    data[i] = make_uint4(a, a ^ 0x9e3779b9u, a * 40503u, ~a);
  }
}

uint4* memory(size_t bytes) {
  uint4* data = nullptr;
  CHECK(cudaMalloc(&data, bytes));
  fill<<<4 * sms, 256, 0, stream>>>(data, bytes / 16);
  CHECK(cudaGetLastError());
  CHECK(cudaStreamSynchronize(stream));
  return data;
}

__device__ uint32_t mix(uint4 v) { return v.x ^ v.y ^ v.z ^ v.w; }
__device__ void keep(uint32_t value, uint32_t* sink) {
  if (value == 0x13572468u) *sink = value;
}
__device__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
extern __shared__ __align__(128) unsigned char dynamic[];

// ---- a: the time from one node of a CUDA graph to the next ----------------------------------------------------------

__global__ void nothing() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
#endif
}

// Microseconds a node, from the difference of two graphs, so that the launch of a graph is not in it.
template <class Launch>
double node_us(Launch&& launch, cudaError_t* refused) {
  constexpr int kNodes = 64;
  double us[2] = {};
  for (int i = 0; i < 2; ++i) {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    *refused = cudaSuccess;
    for (int node = 0; node < (i + 1) * kNodes && *refused == cudaSuccess; ++node) *refused = launch();
    const cudaError_t ended = cudaStreamEndCapture(stream, &graph);
    if (*refused == cudaSuccess) *refused = ended;
    if (*refused == cudaSuccess) *refused = cudaGraphInstantiateWithFlags(&exec, graph, 0);
    if (*refused == cudaSuccess) us[i] = time_us([&] { return cudaGraphLaunch(exec, stream); }, refused, 15);
    cudaGetLastError();
    if (exec) CHECK(cudaGraphExecDestroy(exec));
    if (graph) CHECK(cudaGraphDestroy(graph));
    if (*refused != cudaSuccess) return NAN;
  }
  return (us[1] - us[0]) / kNodes;
}

void section_a() {
  const int grid = std::max(16, sms / 16 * 16);
  constexpr size_t kShared = 90 * 1024;
  allow(nothing, kShared);
  cudaError_t refused;
  for (const size_t shared : {size_t{0}, kShared}) {
    auto report = [&](const char* kind, double size, cudaLaunchAttribute* attribute) {
      const double us = node_us([&] { return start(nothing, grid, 256, shared, attribute); }, &refused);
      Row()("kind", kind)("cluster", size)("shared_kb", shared / 1024.0)("us", us).refused(refused);
    };
    report("plain", 1, nullptr);
    cudaLaunchAttribute attribute = cooperative();
    report("cooperative", 1, &attribute);
    for (unsigned size = 2; size <= 16 && has_clusters(); size *= 2) {
      attribute = clusters_of(size);
      report("cluster", size, &attribute);
    }
    attribute = overlapping();
    if (has_clusters()) report("overlapping", 1, &attribute);
  }
  const double us = node_us([] { return cudaMemsetAsync(sink, 0, 1024, stream); }, &refused);
  Row()("kind", "memset")("cluster", 1)("shared_kb", 0)("us", us).refused(refused);
}

// ---- b: how many clusters fit, and which multiprocessors form a GPC -------------------------------------------------

__global__ void where(uint32_t* sm_of_block) {
  uint32_t sm;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
  if (threadIdx.x == 0) sm_of_block[blockIdx.x] = sm;
  for (const long long begin = clock64(); clock64() - begin < 40000;) {
  }  // until all of a wave are there
}

void section_b(size_t most_shared) {
  if (!has_clusters()) return;
  uint32_t* sm_of_block = nullptr;
  CHECK(cudaMalloc(&sm_of_block, 4096 * sizeof(uint32_t)));
  std::vector<int> parent(4096);
  std::iota(parent.begin(), parent.end(), 0);
  auto root = [&](int i) {
    while (parent[i] != i) i = parent[i];
    return i;
  };
  std::vector<bool> seen(parent.size());
  allow(where, most_shared);
  for (const int per_sm : {1, 2}) {
    const size_t shared = per_sm == 1 ? most_shared : most_shared / 2 - 1024;
    for (int size = 2; size <= 16; size *= 2) {
      cudaLaunchAttribute attribute = clusters_of(size);
      cudaLaunchConfig_t config = {};
      config.gridDim = dim3(size);
      config.blockDim = dim3(256);
      config.dynamicSmemBytes = shared;
      config.attrs = &attribute;
      config.numAttrs = 1;
      int count = 0;
      const cudaError_t error = cudaOccupancyMaxActiveClusters(&count, where, &config);
      cudaGetLastError();
      Row()("cluster", size)("blocks_per_sm", per_sm)("clusters", count)("part_of_slots",
                                                                         double(count) * size / (per_sm * sms))
          .refused(error);
      if (error != cudaSuccess || count == 0 || per_sm == 2 || count * size > 4096) continue;
      for (int repeat = 0; repeat < 20; ++repeat) {
        if (start(where, count * size, 256, shared, &attribute, sm_of_block) != cudaSuccess) {
          cudaGetLastError();
          break;
        }
        std::vector<uint32_t> sm(count * size);
        CHECK(cudaStreamSynchronize(stream));
        CHECK(cudaMemcpy(sm.data(), sm_of_block, sm.size() * sizeof(uint32_t), cudaMemcpyDeviceToHost));
        for (size_t i = 0; i < sm.size(); ++i) {
          if (sm[i] >= parent.size()) continue;
          seen[sm[i]] = true;
          const uint32_t first = sm[i / size * size];  // a cluster's blocks are adjacent, and all in one GPC
          if (first < parent.size()) parent[root(sm[i])] = root(first);
        }
      }
    }
  }
  for (int r = 0; r < int(parent.size()); ++r) {
    std::vector<int> members;
    for (int i = 0; i < int(parent.size()); ++i) {
      if (seen[i] && root(i) == r) members.push_back(i);
    }
    if (members.empty()) continue;
    char text[2048] = "";
    for (const int sm : members) {
      const size_t used = std::strlen(text);
      std::snprintf(text + used, sizeof(text) - used, "%s%d", used ? " " : "", sm);
    }
    Row()("gpc", r)("sm_count", double(members.size()))("sms", text);
  }
  CHECK(cudaFree(sm_of_block));
}

// ---- c: bandwidth by bytes in flight --------------------------------------------------------------------------------

enum Mode { kRead, kWrite, kCopy };
const char* const kModes[] = {"read", "write", "copy"};
constexpr int kLoaders = 512;  // threads: 8 KB in one 16-byte load of each
constexpr int kPiece = 4096, kConsumers = kPiece / 16;

// U loads, then their use, as a chunk of the walkers.
template <int U, Mode MODE>
__global__ void __launch_bounds__(kLoaders) by_registers(const uint4* in, uint4* out, size_t n, uint32_t* sink) {
  constexpr size_t kBatch = U * kLoaders;
  uint32_t sum = 0;
#pragma unroll 1
  for (size_t base = blockIdx.x * kBatch; base + kBatch <= n; base += gridDim.x * kBatch) {
    uint4 v[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const uint32_t i = static_cast<uint32_t>(base) + u;
      v[u] = MODE == kWrite ? make_uint4(i, i, i, i) : in[base + u * kLoaders + threadIdx.x];
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (MODE == kRead) sum ^= mix(v[u]);
      if (MODE != kRead) out[base + u * kLoaders + threadIdx.x] = v[u];
    }
  }
  keep(sum, sink);
}

// Each thread copies into shared memory what it reads there itself, U copies ahead.
template <int U, Mode MODE>
__global__ void __launch_bounds__(kLoaders) by_async(const uint4* in, uint4* out, size_t n, uint32_t* sink) {
#if __CUDA_ARCH__ >= 800
  uint4* slots = reinterpret_cast<uint4*>(dynamic);
  const size_t step = size_t{gridDim.x} * kLoaders;
  size_t next = blockIdx.x * size_t{kLoaders} + threadIdx.x;
  auto issue = [&](int slot) {
    if (next < n) {
      asm volatile(
          "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(slots + slot * kLoaders + threadIdx.x)),
          "l"(in + next)
          : "memory");
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    next += step;
  };
  for (int u = 0; u < U; ++u) issue(u);
  uint32_t sum = 0;
  int slot = 0;
#pragma unroll 1
  for (size_t i = blockIdx.x * size_t{kLoaders} + threadIdx.x; i < n; i += step) {
    asm volatile("cp.async.wait_group %0;" ::"n"(U - 1) : "memory");
    const uint4 v = slots[slot * kLoaders + threadIdx.x];
    if (MODE == kRead) sum ^= mix(v);
    if (MODE != kRead) out[i] = v;
    issue(slot);
    slot = slot + 1 == U ? 0 : slot + 1;
  }
  asm volatile("cp.async.wait_group 0;" ::: "memory");
  keep(sum, sink);
#endif
}

// One thread orders pieces of 4 KB from the copy engine, STAGES ahead; all threads use them.
template <int STAGES, Mode MODE>
__global__ void __launch_bounds__(kConsumers) by_bulk(const uint4* in, uint4* out, size_t n, uint32_t* sink) {
#if __CUDA_ARCH__ >= 900
  __shared__ __align__(8) uint64_t full[STAGES];
  const size_t pieces = n / kConsumers;
  uint32_t sum = 0;
  if (MODE == kWrite) {
    for (int i = threadIdx.x; i < STAGES * kConsumers; i += kConsumers) {
      reinterpret_cast<uint4*>(dynamic)[i] = make_uint4(i, ~i, i * 40503, i ^ 77);
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    if (threadIdx.x != 0) return;
    int stage = 0;
    for (size_t piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
      asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(out + piece * kConsumers),
                   "r"(shared_address(dynamic + stage * kPiece)), "r"(kPiece)
                   : "memory");
      asm volatile("cp.async.bulk.commit_group;" ::: "memory");
      asm volatile("cp.async.bulk.wait_group %0;" ::"n"(STAGES - 1) : "memory");
      stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    return;
  }
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&full[s])) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  auto issue = [&](size_t piece, int stage) {
    if (piece >= pieces) return;
    const uint32_t barrier = shared_address(&full[stage]);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(kPiece) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(dynamic + stage * kPiece)),
                 "l"(in + piece * kConsumers), "r"(kPiece), "r"(barrier)
                 : "memory");
  };
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) issue(blockIdx.x + s * size_t{gridDim.x}, s);
  }
  int stage = 0;
  uint32_t parity = 0;
#pragma unroll 1
  for (size_t piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
    for (uint32_t done = 0; !done;) {
      asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                   : "=r"(done)
                   : "r"(shared_address(&full[stage])), "r"(parity)
                   : "memory");
    }
    const uint4 v = reinterpret_cast<uint4*>(dynamic + stage * kPiece)[threadIdx.x];
    if (MODE == kRead) sum ^= mix(v);
    if (MODE == kCopy) out[piece * kConsumers + threadIdx.x] = v;
    __syncthreads();  // all have read the piece that the next copy overwrites
    if (threadIdx.x == 0) issue(piece + STAGES * size_t{gridDim.x}, stage);
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
  keep(sum, sink);
#endif
}

constexpr size_t kBytes = size_t{512} << 20;

// One block to a multiprocessor: it asks for more than half of the shared memory.
template <class Kernel>
void bandwidth(const char* path, Mode mode, int kb, Kernel kernel, int threads, const uint4* in, uint4* out) {
  if (capability < 80) return;
  const bool small = capability == 86 || capability == 89 || capability >= 120;  // 100 KB a multiprocessor
  const size_t shared = (small ? 96 : 120) * 1024;
  allow(kernel, shared);
  cudaError_t refused;
  const double us =
      time_us([&] { return start(kernel, sms, threads, shared, nullptr, in, out, kBytes / 16, sink); }, &refused);
  const double moved = double(kBytes) * (mode == kCopy ? 2 : 1);
  Row()("path", path)("mode", kModes[mode])("kb_in_flight", kb)("gbs", moved / us * 1e-3).refused(refused);
}

template <int U, Mode MODE>
void bandwidths(const uint4* in, uint4* out) {
  bandwidth("registers", MODE, 8 * U, by_registers<U, MODE>, kLoaders, in, out);
  if (MODE != kWrite) bandwidth("async", MODE, 8 * U, by_async<U, MODE>, kLoaders, in, out);
  if (has_clusters()) bandwidth("bulk", MODE, 8 * U, by_bulk<2 * U, MODE>, kConsumers, in, out);
}

template <int U>
void all_bandwidths(const uint4* in, uint4* out) {
  bandwidths<U, kRead>(in, out);
  bandwidths<U, kWrite>(in, out);
  bandwidths<U, kCopy>(in, out);
}

void section_c() {
  const uint4* in = memory(kBytes);
  uint4* out = memory(kBytes);
  all_bandwidths<1>(in, out);
  all_bandwidths<2>(in, out);
  all_bandwidths<3>(in, out);
  all_bandwidths<4>(in, out);
  all_bandwidths<6>(in, out);
  all_bandwidths<8>(in, out);
}

// ---- d: tiles of columns --------------------------------------------------------------------------------------------

// A matrix of rows of `pitch` units, tile after tile of `width` units; a block has a range of rows.
template <bool WRITE>
__global__ void __launch_bounds__(256) by_tiles(uint4* data, int64_t rows, int pitch, int width, uint32_t* sink) {
  constexpr int kUnroll = 8;
  const int lane = threadIdx.x % width, row = threadIdx.x / width, step = blockDim.x / width;
  const int64_t share = (rows + gridDim.x - 1) / gridDim.x;
  const int64_t begin = blockIdx.x * share, end = min(rows, begin + share);
  uint32_t sum = 0;
  for (int tile = 0; tile < pitch; tile += width) {
#pragma unroll 1
    for (int64_t base = begin + row; base < end; base += kUnroll * step) {
      uint4 v[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t r = base + u * step;
        uint4* unit = data + r * pitch + tile + lane;
        v[u] = make_uint4(1, 2, 3, tile);
        if (r < end && !WRITE) v[u] = *unit;
        if (r < end && WRITE) *unit = v[u];
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) sum ^= mix(v[u]);
    }
  }
  keep(sum, sink);
}

void section_d() {
  uint4* data = memory(kBytes);
  for (int pitch = 128; pitch <= 4096; pitch *= 2) {
    for (int width = 32; width <= std::min(256, pitch); width *= 2) {
      for (const bool write : {false, true}) {
        cudaError_t refused;
        const double us = time_us(
            [&] {
              return start(write ? by_tiles<true> : by_tiles<false>, 2 * sms, 256, 0, nullptr, data,
                           int64_t(kBytes / pitch), pitch / 16, width / 16, sink);
            },
            &refused, 5);
        Row()("mode", write ? "write" : "read")("pitch", pitch)("tile", width)("gbs", kBytes / us * 1e-3)
            .refused(refused);
      }
    }
  }
}

// ---- e: blocks exchange results through memory ----------------------------------------------------------------------

enum Fence { kNone, kMembar, kAcquireRelease };
const char* const kFences[] = {"none", "membar", "acq_rel"};

// A barrier of all blocks, `rounds` times: all arrive, the last opens, all wait for that. counters: arrived, opened.
template <Fence FENCE>
__global__ void __launch_bounds__(256) exchange(uint32_t* counters, uint4* out, int rounds, int stores, int sleep) {
  uint4* mine = out + blockIdx.x * size_t(stores) * blockDim.x + threadIdx.x;
  for (uint32_t round = 1; round <= static_cast<uint32_t>(rounds); ++round) {
    for (int i = 0; i < stores; ++i) mine[size_t{blockDim.x} * i] = make_uint4(round, i, 1, 2);
    __syncthreads();
    if (FENCE != kNone && threadIdx.x == 0) {
      const uint32_t last = round * gridDim.x - 1;
      if (FENCE == kMembar) {
        __threadfence();
        const uint32_t before = atomicAdd(&counters[0], 1u);
        __threadfence();
        if (before == last) atomicExch(&counters[1], round);
        while (*static_cast<volatile uint32_t*>(&counters[1]) < round) {
          if (sleep > 0) __nanosleep(sleep);
        }
        __threadfence();
      } else {
        uint32_t before, opened = 0;
        asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(&counters[0]) : "memory");
        if (before == last)
          asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(&counters[1]), "r"(round) : "memory");
        while (true) {
          asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(opened) : "l"(&counters[1]) : "memory");
          if (opened >= round) break;
          if (sleep > 0) __nanosleep(sleep);
        }
      }
    }
    __syncthreads();
  }
}

void section_e() {
  constexpr int kRounds = 200, kStores = 8;  // 32 KB a block and round
  const int most = 2 * sms;
  uint32_t* counters = nullptr;
  CHECK(cudaMalloc(&counters, 2 * sizeof(uint32_t)));
  uint4* out = memory(size_t(most) * kStores * 256 * sizeof(uint4));
  void (*const kernels[])(uint32_t*, uint4*, int, int, int) = {exchange<kNone>, exchange<kMembar>,
                                                               exchange<kAcquireRelease>};
  for (const int blocks : {33, 66, 131, 262}) {
    if (blocks > most) continue;
    for (const int stores : {0, kStores}) {
      for (const Fence fence : {kNone, kMembar, kAcquireRelease}) {
        for (const int sleep : {0, 32, 100}) {
          if (fence == kNone && sleep > 0) continue;
          cudaLaunchAttribute attribute = cooperative();  // refused where not all blocks fit at a time
          cudaError_t refused;
          const double us = time_us(
              [&] {
                const cudaError_t error = cudaMemsetAsync(counters, 0, 2 * sizeof(uint32_t), stream);
                return error != cudaSuccess
                           ? error
                           : start(kernels[fence], blocks, 256, 0, &attribute, counters, out, kRounds, stores, sleep);
              },
              &refused, 5);
          Row()("blocks", blocks)("fence", kFences[fence])("stores_kb", stores * 4.0)("sleep_ns", sleep)("us",
                                                                                                         us / kRounds)
              .refused(refused);
        }
      }
    }
  }
}

// ---- g: inside a cluster --------------------------------------------------------------------------------------------

// cycles: of a barrier, of a read of the next block's shared memory, of one of the block's own.
__global__ void __launch_bounds__(256) in_cluster(long long* cycles, unsigned size, int rounds, uint32_t* sink) {
#if __CUDA_ARCH__ >= 900
  __shared__ uint32_t chain[256];
  chain[threadIdx.x] = (threadIdx.x + 1) % 256;
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  auto barrier = [] { asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory"); };
  barrier();
  long long begin = clock64();
  for (int i = 0; i < rounds; ++i) barrier();
  const long long of_barrier = (clock64() - begin) / rounds;
  uint32_t at = threadIdx.x;
  long long of_read[2] = {};
  for (unsigned apart = 0; apart < 2; ++apart) {
    uint32_t base;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(base)
                 : "r"(shared_address(chain)), "r"((rank + apart) % size));
    barrier();
    begin = clock64();
    if (threadIdx.x < 32) {
      for (int i = 0; i < rounds; ++i) {
        asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(at) : "r"(base + 4 * at) : "memory");
      }
    }
    of_read[apart] = (clock64() - begin) / rounds;
    barrier();
  }
  keep(at + 0x13000000u, sink);
  if (threadIdx.x == 0 && blockIdx.x == 0) {
    cycles[0] = of_barrier;
    cycles[1] = of_read[1];
    cycles[2] = of_read[0];
  }
#endif
}

void section_g() {
  if (!has_clusters()) return;
  allow(in_cluster, 0);
  long long* cycles = nullptr;
  CHECK(cudaMalloc(&cycles, 3 * sizeof(long long)));
  for (unsigned size = 1; size <= 16; size *= 2) {
    long long found[3] = {};
    cudaLaunchAttribute attribute = clusters_of(size);
    CHECK(cudaMemsetAsync(cycles, 0, sizeof(found), stream));
    const cudaError_t refused = start(in_cluster, size, 256, 0, &attribute, cycles, size, 1000, sink);
    cudaGetLastError();
    CHECK(cudaStreamSynchronize(stream));
    CHECK(cudaMemcpy(found, cycles, sizeof(found), cudaMemcpyDeviceToHost));
    Row()("cluster", size)("barrier_cycles", double(found[0]))("remote_read_cycles", double(found[1]))(
        "own_read_cycles", double(found[2]))
        .refused(refused);
  }
}

// ---- h: what the L2 cache keeps -------------------------------------------------------------------------------------

enum Policy { kNormal, kEvictLast, kEvictFirst };
const char* const kPolicies[] = {"normal", "evict_last", "evict_first"};

template <Policy POLICY>
__global__ void __launch_bounds__(512) touch(const uint4* data, size_t n, uint32_t* sink) {
#if __CUDA_ARCH__ >= 800
  uint64_t policy = 0;
  if (POLICY == kEvictLast) asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  if (POLICY == kEvictFirst) asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  uint32_t sum = 0;
#pragma unroll 4
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < n; i += size_t{gridDim.x} * blockDim.x) {
    uint4 v;
    if (POLICY == kNormal) {
      v = __ldcg(data + i);
    } else {
      asm volatile("ld.global.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "l"(data + i), "l"(policy));
    }
    sum ^= mix(v);
  }
  keep(sum, sink);
#endif
}

void section_h() {
  if (capability < 80) return;
  constexpr size_t kMega = size_t{1} << 20, kStream = 128 * kMega;
  const uint4* data = memory(64 * kMega);
  const uint4* others = memory(kStream);
  void (*const kernels[])(const uint4*, size_t, uint32_t*) = {touch<kNormal>, touch<kEvictLast>, touch<kEvictFirst>};
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  // The time of reading `bytes` again after reading them so, and then `streamed` others so.
  auto again = [&](size_t bytes, Policy policy, size_t streamed, Policy of_stream) {
    std::vector<double> times;
    for (int i = 0; i < 11; ++i) {
      cudaCtxResetPersistingL2Cache();
      cudaGetLastError();  // a device without persisting lines
      CHECK(start(kernels[kNormal], 2 * sms, 512, 0, nullptr, others, kStream / 16, sink));
      CHECK(start(kernels[policy], 2 * sms, 512, 0, nullptr, data, bytes / 16, sink));
      if (streamed) CHECK(start(kernels[of_stream], 2 * sms, 512, 0, nullptr, others, streamed / 16, sink));
      CHECK(cudaEventRecord(begin, stream));
      CHECK(start(kernels[kNormal], 2 * sms, 512, 0, nullptr, data, bytes / 16, sink));
      CHECK(cudaEventRecord(end, stream));
      CHECK(cudaEventSynchronize(end));
      float ms = 0;
      CHECK(cudaEventElapsedTime(&ms, begin, end));
      times.push_back(1e3 * ms);
    }
    return median(times);
  };
  // What hits and misses cost, a megabyte: from tensors that surely are in the cache, and surely are not.
  const double start_us = again(kMega / 4, kNormal, 0, kNormal);
  const double hit_us = (again(8 * kMega, kNormal, 0, kNormal) - start_us) / 7.75;
  const double miss_us = (again(64 * kMega, kNormal, kStream, kNormal) - start_us) / 63.75;
  Row()("policy", "calibration")("hit_us_per_mb", hit_us)("miss_us_per_mb", miss_us)("start_us", start_us);
  for (const Policy policy : {kNormal, kEvictLast}) {
    for (const Policy of_stream : {kNormal, kEvictFirst}) {
      for (int mb = 10; mb <= 50; mb += 10) {
        const double us = again(mb * kMega, policy, kStream, of_stream);
        const double per_mb = (us - start_us) / (mb - 0.25);
        const double hits = (miss_us - per_mb) / (miss_us - hit_us);
        Row()("policy", kPolicies[policy])("stream", kPolicies[of_stream])("mb", mb)("us", us)(
            "hit_rate", std::min(1.0, std::max(0.0, hits)));
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 || std::strlen(argv[1]) != 1 || !std::strchr("abcdefgh", argv[1][0])) {
    std::fprintf(stderr, "usage: probe SECTION, of a to h\n");
    return 2;
  }
  int device = 0, major = 0, minor = 0, most_shared = 0;
  CHECK(cudaGetDevice(&device));
  CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
  CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  CHECK(cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  capability = 10 * major + minor;
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  CHECK(cudaMalloc(&sink, 1024));
  switch (argv[1][0]) {
    case 'a': section_a(); break;
    case 'b': section_b(most_shared); break;
    case 'c': section_c(); break;
    case 'd': section_d(); break;
    case 'e': section_e(); break;
    case 'g': section_g(); break;
    case 'h': section_h(); break;
  }
  CHECK(cudaDeviceSynchronize());
  return 0;
}
