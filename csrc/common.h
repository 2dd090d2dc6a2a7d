// Shared by the op registrations: argument checks, allocation, the current stream. Stable ABI of torch 2.10
// only.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

#ifdef USE_CUDA
#include <cuda_runtime.h>
#endif

namespace cosmos_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* type_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    default:
      return "another type";
  }
}

// True for bfloat16, false for float32, an error for the rest.
inline bool is_bf16(const char* op, const char* what, ScalarType type) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, op, ": ", what,
                  " must be bfloat16 or float32, got ", type_name(type), ".");
  return type == ScalarType::BFloat16;
}

inline Tensor empty_as(const Tensor& like, ScalarType type) {
  return torch::stable::new_empty(like, like.sizes(), type);
}

#ifdef USE_CUDA
// The stream torch is using on this device right now: a launch on any other one races with the caller.
inline cudaStream_t current_stream(int32_t device_index) {
  void* stream = nullptr;
  // The checking macro has another name in each release; the function and its zero for success are stable.
  const auto error = aoti_torch_get_current_cuda_stream(device_index, &stream);
  STD_TORCH_CHECK(error == 0, "stream: torch must know one for CUDA device ", device_index, ", got error ",
                  error, ".");
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": launch failed, got ", cudaGetErrorString(error), ".");
}
#endif

}  // namespace cosmos_fast
