// Prints what check() throws on a failed call, and whether the next caller still finds the error.
#include "../csrc/bindings/cuda_error.h"

#include <iostream>

int main() {
  for (const cudaError_t error : {cudaSuccess, cudaErrorInvalidValue, cudaErrorNoKernelImageForDevice}) {
    std::string thrown = "nothing";
    try {
      bnext::check(fails_with(error), "batch_norm_forward");
    } catch (const std::runtime_error& e) {
      thrown = e.what();
    }
    std::cout << thrown << (cudaGetLastError() == cudaSuccess ? "" : " (and the next call fails)") << "\n";
  }
  // What somebody else left behind is not ours to take.
  fails_with(cudaErrorInvalidValue);
  bnext::check(cudaSuccess, "batch_norm_forward");
  std::cout << (cudaGetLastError() == cudaErrorInvalidValue ? "kept" : "lost") << "\n";
}
