// head_norm and qk_norm_rope as raw pointers and sizes, so that the code that computes sees no torch.
//   n     = x * rsqrt(mean(x^2) + eps) * gain        over each head's K features, rounded to x's type
//   low'  = low * cos - high * sin                   low, high: the halves of n
//   high' = high * cos + low * sin                   rounded to x's type
// head_norm ends after the first line. Shape letters: L rows (tokens), N heads, K head width.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernel_info.h"

namespace cosmos_fast {

// Both halves of a head are whole vectors of 8, and 16 lanes hold the widest head.
constexpr int kHeadStep = 16, kMaxHeadWidth = 256;

struct NormRopeArgs {
  const void* x;        // (L, parts * N * K) bf16 or fp32, unit stride along the features
  const void* gain[2];  // (K,) bf16 or fp32, one per part
  const float* cos;     // (L, K/2); null means no rotation and one part, else two parts: q and k
  const float* sin;
  void* out[2];  // (L, N, K) as x, one per part
  int64_t num_rows, row_stride, cos_stride, sin_stride;
  int num_heads, head_width;
  bool x_bf16, gain_bf16[2];
  float eps;
};

// Head width a multiple of kHeadStep up to kMaxHeadWidth, pointers and rows 16-byte aligned. Current device.
cudaError_t norm_rope_launch(const NormRopeArgs& args, cudaStream_t stream);
void norm_rope_kernels(std::vector<KernelInfo>& rows);

}  // namespace cosmos_fast
