// adaln on the GPU. Torch-free.
// One block per row. The row lives in registers as fp32 from its only read to its only write: kVecs vectors
// of 8 values per thread. Two block sums (mean, then squared deviations) keep the statistics exact for rows
// with a large mean. Bytes per row: x, branch and each hint read once, x' and h written once; the (T, D)
// tables stay in L1/L2, because the rows of one frame are neighbours.
#pragma once

#include "adaln.h"
#include "vec.cuh"

namespace cosmos_fast {

// Sum over the block, the same bits in every thread. `scratch` holds one float per warp and is not reused.
template <int kThreads>
__device__ __forceinline__ float block_sum(float value, float* scratch) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kThreads / 32; ++warp) total += scratch[warp];
  return total;
}

// kFull: the width is exactly kThreads * kVecs * kVec, so no vector needs a bound check.
template <typename X, typename H, int kThreads, int kVecs, bool kFull, bool kResidual>
__global__ void __launch_bounds__(kThreads) adaln_kernel(const __grid_constant__ AdalnArgs args) {
  __shared__ float scratch[2][kThreads / 32];
  const int64_t row = blockIdx.x;
  const int64_t start = row * args.width;
  const int64_t frame = (args.token_offset + row) / args.tokens_per_frame;
  const int num_vecs = static_cast<int>(args.width) / kVec;
  Vec values[kVecs];
  float sum = 0.0f;

#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int vec = i * kThreads + threadIdx.x, column = vec * kVec;
    if (kFull || vec < num_vecs) {
      values[i] = load_vec(static_cast<const X*>(args.x) + start + column);
      if constexpr (kResidual) {
        const Vec branch = load_vec(static_cast<const X*>(args.branch) + start + column);
        const Vec gate = load_table(args.gate, frame * args.gate_stride + column, args.gate_bf16);
#pragma unroll
        for (int k = 0; k < kVec; ++k) values[i].v[k] += gate.v[k] * branch.v[k];
        for (int j = 0; j < args.num_hints; ++j) {
          const Vec hint = load_vec(static_cast<const X*>(args.hints[j]) + start + column);
          const float weight = args.hint_weights[j * args.weight_stride_hint + row * args.weight_stride_row];
#pragma unroll
          for (int k = 0; k < kVec; ++k) values[i].v[k] += weight * hint.v[k];
        }
        values[i] = store_vec(static_cast<X*>(args.sum) + start + column, values[i]);
      }
#pragma unroll
      for (int k = 0; k < kVec; ++k) sum += values[i].v[k];
    }
  }

  const float mean = block_sum<kThreads>(sum, scratch[0]) / static_cast<float>(args.width);
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    if (kFull || i * kThreads + threadIdx.x < num_vecs) {
#pragma unroll
      for (int k = 0; k < kVec; ++k) {
        values[i].v[k] -= mean;
        squares += values[i].v[k] * values[i].v[k];
      }
    }
  }
  const float variance = block_sum<kThreads>(squares, scratch[1]) / static_cast<float>(args.width);
  const float rstd = rsqrtf(variance + args.eps);

#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int vec = i * kThreads + threadIdx.x, column = vec * kVec;
    if (kFull || vec < num_vecs) {
      const Vec scale = load_table(args.scale, frame * args.scale_stride + column, args.scale_bf16);
      const Vec shift = load_table(args.shift, frame * args.shift_stride + column, args.shift_bf16);
#pragma unroll
      for (int k = 0; k < kVec; ++k)
        values[i].v[k] = values[i].v[k] * rstd * (1.0f + scale.v[k]) + shift.v[k];
      store_vec(static_cast<H*>(args.h) + start + column, values[i]);
    }
  }
}

}  // namespace cosmos_fast
