// q and k of 8-bit attention from the packed projection, as raw pointers and sizes: no torch in here.
//   n     = x * rsqrt(mean(x^2) + eps) * gain        over each head's 128 features, rounded to bf16
//   low'  = low * cos - high * sin                   low, high: the halves of n
//   high' = high * cos + low * sin                   rounded to bf16
//   k     less its mean, rounded to bf16
//   code  = (x H) / step                             H: Hadamard, orthonormal; rounded to e4m3, saturating
// Shape letters: L rows (tokens), N heads; the head width is 128.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernel_info.h"

namespace cosmos_fast {

// Heads of one tile of the tensor cores.
constexpr int kQkCodesWidth = 128, kQkCodesHeads = 16;

struct QkCodesArgs {
  const void* qkv;      // (L, 3 * N * 128) bf16
  const void* gain[2];  // (128,) bf16 or fp32: of q, of k
  const float* cos;     // (L, 64), unit stride along the features
  const float* sin;
  const float* k_mean;  // (N, 128)
  const float* steps;   // of q, of k; 2^-110 at least
  // e4m3: q and k, (L, N, 128) each; with columns only the first, where both and v travel from
  // (qk_codes::place_of). columns divide N, parts are no more than N / columns.
  void* out[2];
  int64_t num_rows, row_stride, cos_stride, sin_stride;
  int num_heads;  // a multiple of kQkCodesHeads
  int columns, parts;
  bool gain_bf16[2];
  float eps;
};

// Pointers and rows 16-byte aligned. Current device.
cudaError_t qk_codes_launch(const QkCodesArgs& args, cudaStream_t stream);
void qk_codes_kernels(std::vector<KernelInfo>& rows);

}  // namespace cosmos_fast
