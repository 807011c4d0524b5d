#if defined(BNEXT_WITH_CUDA)

#include "counters.h"

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <map>
#include <memory>
#include <mutex>

#include "counter_pool.h"
#include "cuda_error.h"

namespace bnext {
namespace {

// While it lives, this thread may allocate, although it or another one is capturing a stream.
class Relaxed {
 public:
  Relaxed() { check(cudaThreadExchangeStreamCaptureMode(&mode_), "cudaThreadExchangeStreamCaptureMode"); }
  ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  Relaxed(const Relaxed&) = delete;
  Relaxed& operator=(const Relaxed&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Beside torch's allocator: during a capture that one would take from the pool of the graph, which is given
// to other tensors once the graph is gone.
void* allocate_bytes(size_t bytes) {
  void* data = nullptr;
  cudaError_t error = cudaMalloc(&data, bytes);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    try {
      c10::cuda::CUDACachingAllocator::emptyCache();
    } catch (const c10::Error&) {
      // Torch keeps its cache while a stream is being captured. The second try then fails as the first did.
    }
    error = cudaMalloc(&data, bytes);
  }
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    TORCH_CHECK_WITH(OutOfMemoryError, false, "bnext: CUDA out of memory, for ", bytes,
                     " bytes of counters or flagged memory");
  }
  check(error, "cudaMalloc");
  return data;
}

cudaError_t fill_with_zeros(void* data, size_t bytes) {
  cudaStream_t stream = nullptr;  // neither captured, nor one that the legacy stream waits for
  cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (error != cudaSuccess) return error;
  error = cudaMemsetAsync(data, 0, bytes, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  const cudaError_t destroyed = cudaStreamDestroy(stream);
  return error != cudaSuccess ? error : destroyed;
}

uint32_t* allocate(int64_t count) {
  const Relaxed relaxed;
  const size_t bytes = count * sizeof(uint32_t);
  void* data = allocate_bytes(bytes);
  if (const cudaError_t error = fill_with_zeros(data, bytes); error != cudaSuccess) {
    cudaFree(data);
    check(error, "cudaMemsetAsync");
  }
  return static_cast<uint32_t*>(data);
}

// The pools of a device, one for what is 0 between launches and one for what is not.
struct Pools { CounterPool counters, flagged; };

// Never destroyed, as graphs may be destroyed after static objects are.
Pools& pools_of(c10::DeviceIndex device) {
  static std::mutex& mutex = *new std::mutex;
  static auto& pools = *new std::map<c10::DeviceIndex, Pools>;
  const std::lock_guard<std::mutex> lock(mutex);
  return pools[device];
}

uint64_t this_thread() {
  static std::atomic<uint64_t> threads{0};
  thread_local const uint64_t number = ++threads;
  return number;
}

CounterPool::Stream identify(cudaStream_t stream) {
  unsigned long long id = 0;
  check(cudaStreamGetId(stream, &id), "cudaStreamGetId");
  return {id, stream == cudaStreamPerThread ? this_thread() : 0};
}

// The graph that the stream is being captured into; null where it is not.
cudaGraph_t graph_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  if (status == cudaStreamCaptureStatusNone) return nullptr;
  cudaGraph_t graph = nullptr;
#if CUDART_VERSION >= 13000
  check(cudaStreamGetCaptureInfo(stream, &status, nullptr, &graph, nullptr, nullptr, nullptr),
        "cudaStreamGetCaptureInfo");
#else
  check(cudaStreamGetCaptureInfo_v2(stream, &status, nullptr, &graph, nullptr, nullptr), "cudaStreamGetCaptureInfo");
#endif
  TORCH_CHECK(graph != nullptr, "bnext: the capture of this stream has failed before");
  return graph;
}

// A block and where it goes back to.
struct Lent {
  CounterPool& pool;
  CounterPool::Block block;

  explicit Lent(CounterPool& pool, int64_t count) : pool(pool), block(pool.take(count, allocate)) {}
  ~Lent() { pool.give_back(block); }
};

uint32_t* lend(CounterPool& pool, int64_t count, cudaGraph_t graph) {
  auto lent = std::make_unique<Lent>(pool, count);
  uint32_t* counters = lent->block.data;
  cudaUserObject_t object = nullptr;
  const auto give_back = [](void* lent) { delete static_cast<Lent*>(lent); };
  check(cudaUserObjectCreate(&object, lent.get(), give_back, 1, cudaUserObjectNoDestructorSync),
        "cudaUserObjectCreate");
  lent.release();  // to the object, whose only reference becomes the graph's
  // A graph that keeps no objects is none that tells its end: the block is then never free again.
  if (cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove) != cudaSuccess) cudaGetLastError();
  return counters;
}

uint32_t* words_for(CounterPool& pool, cudaStream_t stream, int64_t count) {
  const cudaGraph_t graph = graph_of(stream);
  return graph ? lend(pool, count, graph) : pool.of_stream(identify(stream), count, allocate);
}

}  // namespace

uint32_t* counters_for(c10::DeviceIndex device, cudaStream_t stream, int64_t count) {
  return words_for(pools_of(device).counters, stream, count);
}

void* flagged_for(c10::DeviceIndex device, cudaStream_t stream, int64_t bytes) {
  return words_for(pools_of(device).flagged, stream, bytes / static_cast<int64_t>(sizeof(uint32_t)));
}

}  // namespace bnext

#endif
