// Arithmetic of the softmax in registers.
#pragma once

#include "attention8_plan.cuh"

namespace cosmos_fast::attention8 {

// 2^x for x <= 127 on the FMA units, to 1.8e-3: what e4m3 keeps of it is 6e-2. Below 2^-30 it returns about
// 2^-30.
__device__ __forceinline__ float exp2_poly(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  x = fmaxf(x, -30.0f);
  const float shifted = x + kRound;
  const float part = x - (shifted - kRound);
  const float power = fmaf(fmaf(0.23842917f, part, 0.70344904f), part, 1.00044320f);
  return __int_as_float(__float_as_int(power) + (__float_as_int(shifted) << 23));
}

// The largest score of each of the two rows that this thread holds; peak: what those before came to.
template <class C>
__device__ __forceinline__ void row_maxima(const float (&s)[Plan<C>::kScores], const float (&peak)[2],
                                           float (&top)[2]) {
  constexpr int kScores = Plan<C>::kScores;
  if constexpr (C::probe == Probe::kNoMaxima) {
    top[0] = s[0], top[1] = s[2];
    return;
  }
  if constexpr (C::max3) {
    // One instruction takes the largest of three integers, and positive floats are in order as integers.
    // Negative ones are in reverse, so of those alone it may find one too small: no matter below a peak
    // that is positive.
    int best[2] = {__float_as_int(s[0]), __float_as_int(s[2])};
#pragma unroll
    for (int e = 0; e < kScores; e += 4)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        best[r] = __vimax3_s32(best[r], __float_as_int(s[e + 2 * r]), __float_as_int(s[e + 2 * r + 1]));
    top[0] = __int_as_float(best[0]), top[1] = __int_as_float(best[1]);
    if (!__any_sync(~0u, (best[0] < 0 && peak[0] < 0) || (best[1] < 0 && peak[1] < 0))) return;
  }
  float pair[2][2] = {{s[0], s[1]}, {s[2], s[3]}};
#pragma unroll
  for (int e = 4; e < kScores; ++e) pair[e / 2 % 2][e % 2] = fmaxf(pair[e / 2 % 2][e % 2], s[e]);
#pragma unroll
  for (int r = 0; r < 2; ++r) top[r] = fmaxf(pair[r][0], pair[r][1]);
}

}  // namespace cosmos_fast::attention8
