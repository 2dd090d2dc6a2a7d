// adaln and residual_adaln as raw pointers and sizes, so that the code that computes sees no torch.
//   x' = x + gate[frame] * branch + sum_j weight_j * hint_j          (rounded to x's type)
//   h  = layer_norm(x') * (1 + scale[frame]) + shift[frame]          (rounded to h's type)
//   frame(row) = (token_offset + row) / tokens_per_frame
// Shape letters: L rows (tokens), D width, T latent frames, J hints.
#pragma once

#include <cstdint>

#ifdef USE_CUDA
#include <cuda_runtime.h>

#include "kernel_info.h"
#endif

namespace cosmos_fast {

// Hints go to the kernels by value; the published networks have at most four control branches.
constexpr int kMaxHints = 8;
// Widest row that stays in registers: 256 threads of 32 values.
constexpr int kMaxCudaWidth = 8192;

struct AdalnArgs {
  const void* x;       // (L, D) bf16 or fp32, contiguous
  const void* branch;  // (L, D) as x; null means no residual, and then gate, hints and sum are unused
  const void* hints[kMaxHints];
  const float* hint_weights;  // (J, 1) or (J, L)
  const void* gate;           // (T, D) bf16 or fp32, unit stride along D
  const void* shift;
  const void* scale;
  void* sum;  // (L, D) as x
  void* h;    // (L, D) bf16 or fp32
  int64_t num_rows, width, tokens_per_frame, token_offset;
  int64_t gate_stride, shift_stride, scale_stride;  // elements from one frame to the next
  int64_t weight_stride_hint, weight_stride_row;    // weight_stride_row is 0 for (J, 1)
  int num_hints;
  bool x_bf16, gate_bf16, shift_bf16, scale_bf16, h_bf16;
  float eps;
};

// Rows [begin, end) on the calling thread; any width.
void adaln_rows_cpu(const AdalnArgs& args, int64_t begin, int64_t end);

#ifdef USE_CUDA
// Width a multiple of 8 up to kMaxCudaWidth, pointers 16-byte aligned, strides multiples of 8. Current
// device.
cudaError_t adaln_launch(const AdalnArgs& args, cudaStream_t stream);
void adaln_kernels(std::vector<KernelInfo>& rows);
#endif

}  // namespace cosmos_fast
