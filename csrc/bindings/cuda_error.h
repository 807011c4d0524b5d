// What becomes of a CUDA call that fails. Needs no torch.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace bnext {

// Throws where `error` is one. `what` is what was tried. The runtime keeps the last error for whoever asks next, which
// would be torch, behind its next launch: it is taken from there.
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  std::string message =
      std::string("bnext::") + what + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice) {
    message += "; bnext was not compiled for this GPU, see `python -m bnext.doctor`";
  }
  throw std::runtime_error(message);
}

}  // namespace bnext
