// What the compiler made of a kernel, asked of the CUDA runtime. Torch-free.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <vector>

namespace cosmos_fast {

struct KernelInfo {
  std::string name;
  int threads, registers, local_bytes, shared_bytes, blocks_per_sm;
  std::string error;  // empty, or why the runtime could not tell (no device, no code for its architecture)
};

template <typename Kernel>
KernelInfo describe_kernel(std::string name, Kernel* kernel, int threads) {
  KernelInfo info{std::move(name), threads, 0, 0, 0, 0, ""};
  cudaFuncAttributes attributes{};
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&info.blocks_per_sm, kernel, threads, 0);
  if (error != cudaSuccess) {
    info.error = cudaGetErrorString(error);
    cudaGetLastError();
    return info;
  }
  info.registers = attributes.numRegs;
  info.local_bytes = static_cast<int>(attributes.localSizeBytes);
  info.shared_bytes = static_cast<int>(attributes.sharedSizeBytes);
  return info;
}

}  // namespace cosmos_fast
