// head_norm and qk_norm_rope on the GPU. Torch-free.
// One warp per row and part (q or k): neighbouring lanes form a group that owns one head, and each lane holds
// the same 8 features of both halves. So the sum over a head stays inside the group, and the rotation, which
// pairs feature i with i + K/2, stays inside the lane. cos, sin and gain are loaded once and serve every head
// of the row; the loads of kSlots heads per group are in flight together. Bytes per row: each part read once
// and written once, v never; cos and sin come from HBM once and from L1/L2 for the second part.
#pragma once

#include "norm_rope.h"
#include "vec.cuh"

namespace cosmos_fast {

constexpr int kNormRopeThreads = 128;

// 128 bytes a lane in flight, in either type.
template <typename X>
constexpr int kSlots = 128 / (2 * kVec * static_cast<int>(sizeof(X)));

__device__ __forceinline__ float sum_of_squares(const Vec& in) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kVec; ++i) sum += in.v[i] * in.v[i];
  return sum;
}

// (x * rstd) * gain in fp32, rounded to X as head_norm would store it.
template <typename X>
__device__ __forceinline__ Packed<X> normed(const Vec& in, float rstd, const Vec& gain) {
  Vec out;
#pragma unroll
  for (int i = 0; i < kVec; ++i) out.v[i] = in.v[i] * rstd * gain.v[i];
  return narrow<X>(out);
}

// kLanes lanes per head. kFull: K is kLanes * 16 and N a multiple of the heads in flight, so nothing needs a
// bound check.
template <typename X, int kLanes, bool kFull, bool kRope>
__global__ void __launch_bounds__(kNormRopeThreads)
    norm_rope_kernel(const __grid_constant__ NormRopeArgs args) {
  constexpr int kGroups = 32 / kLanes;
  const int64_t warp =
      static_cast<int64_t>(blockIdx.x) * (kNormRopeThreads / 32) + static_cast<int>(threadIdx.x) / 32;
  const int64_t row = kRope ? warp / 2 : warp;
  const int part = kRope ? static_cast<int>(warp % 2) : 0;
  if (row >= args.num_rows) return;  // the whole warp, so the shuffles below are complete

  const int N = args.num_heads, K = kFull ? kLanes * 2 * kVec : args.head_width, half = K / 2;
  const int lane = static_cast<int>(threadIdx.x) % 32, column = lane % kLanes * kVec;
  const bool in_head = kFull || column < half;
  const X* x = static_cast<const X*>(args.x) + row * args.row_stride + part * (N * K) + column;
  X* out = static_cast<X*>(args.out[part]) + row * (N * K) + column;

  Vec gain_low{}, gain_high{}, cos{}, sin{};
  for (int first = lane / kLanes; first - lane / kLanes < N; first += kSlots<X> * kGroups) {
    Packed<X> low[kSlots<X>], high[kSlots<X>];
#pragma unroll
    for (int i = 0; i < kSlots<X>; ++i) {
      const int head = first + i * kGroups;
      low[i] = high[i] = Packed<X>{};
      if (kFull || (in_head && head < N)) {
        low[i] = load_once(x + head * K);
        high[i] = load_once(x + head * K + half);
      }
    }
    // After the first loads of x, which take longer; cos and sin before the gain, whose branch waits for it.
    if (first == lane / kLanes && in_head) {
      if constexpr (kRope) {
        cos = load_vec(args.cos + row * args.cos_stride + column);
        sin = load_vec(args.sin + row * args.sin_stride + column);
      }
      gain_low = load_table(args.gain[part], column, args.gain_bf16[part]);
      gain_high = load_table(args.gain[part], half + column, args.gain_bf16[part]);
    }
#pragma unroll
    for (int i = 0; i < kSlots<X>; ++i) {
      const int head = first + i * kGroups;
      const Vec a = widen(low[i]), b = widen(high[i]);
      float squares = sum_of_squares(a) + sum_of_squares(b);
#pragma unroll
      for (int offset = kLanes / 2; offset > 0; offset /= 2)
        squares += __shfl_xor_sync(0xFFFFFFFFu, squares, offset);
      const float rstd = rsqrtf(squares / static_cast<float>(K) + args.eps);
      low[i] = normed<X>(a, rstd, gain_low);
      high[i] = normed<X>(b, rstd, gain_high);
      if constexpr (kRope) {
        const Vec c = widen(low[i]), d = widen(high[i]);
        Vec turned_low, turned_high;
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
          turned_low.v[k] = c.v[k] * cos.v[k] - d.v[k] * sin.v[k];
          turned_high.v[k] = d.v[k] * cos.v[k] + c.v[k] * sin.v[k];
        }
        low[i] = narrow<X>(turned_low);
        high[i] = narrow<X>(turned_high);
      }
      if (kFull || (in_head && head < N)) {
        store_packed(out + head * K, low[i]);
        store_packed(out + head * K + half, high[i]);
      }
    }
  }
}

}  // namespace cosmos_fast
