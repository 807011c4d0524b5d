// As much of the CUDA runtime as csrc/bindings/cuda_error.h uses: it keeps the last error until somebody takes it.
#pragma once

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNoKernelImageForDevice = 209 };

inline cudaError_t& last_error() {
  static cudaError_t error = cudaSuccess;
  return error;
}
inline cudaError_t fails_with(cudaError_t error) { return last_error() = error; }

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error();
  last_error() = cudaSuccess;
  return error;
}
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorSome"; }
inline const char* cudaGetErrorString(cudaError_t) { return "some error"; }
