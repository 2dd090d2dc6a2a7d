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

// Weights are 2^(score - peak + kLift): e4m3 ends at 448 = 2^8.8, and a score may pass the peak by kSlack
// before the peak follows, so that most tiles change no peak.
constexpr float kLift = 8.0f, kSlack = 0.75f;

// Two rows of a softmax, as far as one thread knows them: peaks in powers of 2, and sums of weights of a
// quarter of the columns.
template <class C>
struct Rows {
  using Scores = float[Plan<C>::kScores];
  static constexpr int kScores = Plan<C>::kScores;

  float peak[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  float shrink[2];  // what the last tile left of the weights before it, if it moved a peak
  bool moved;       // the same for a warp

  // A peak follows its row where a score passes it by more than kSlack, and the sums come along. top: the
  // largest score of each row in this thread. Returns whether a peak moved.
  __device__ __forceinline__ bool follow(const float (&top)[2], float scale) {
    bool up_any = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float best = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 1));
      best = scale * fmaxf(best, __shfl_xor_sync(~0u, best, 2));
      const bool up = best > peak[r] + kSlack;
      const float next = up ? best : peak[r];
      shrink[r] = exp2_unit(peak[r] - next);
      sum[r] *= shrink[r];
      peak[r] = next;
      up_any |= up;
    }
    return up_any;
  }

  // Adds weights to the sums, in two parts a row, which do not wait for each other.
  __device__ __forceinline__ void add(const Scores& s) {
    float part[2][2] = {{s[0], s[1]}, {s[2], s[3]}};
#pragma unroll
    for (int e = 4; e < kScores; ++e) part[e / 2 % 2][e % 2] += s[e];
#pragma unroll
    for (int r = 0; r < 2; ++r) sum[r] += part[r][0] + part[r][1];
  }

  // Scores to weights, in place; peaks follow, and unless late_sums leaves that to `add`, sums too.
  __device__ __forceinline__ void weigh(Scores& s, float scale) {
    if constexpr (C::probe == Probe::kNoSoftmax) {
      moved = false, peak[0] = peak[1] = 0.0f, sum[0] = sum[1] = 1.0f;
      return;
    }
    float top[2];
    row_maxima<C>(s, peak, top);
    if constexpr (C::vote) {
      // What no thread's scores pass, no row's do.
      moved = __any_sync(~0u, scale * top[0] > peak[0] + kSlack || scale * top[1] > peak[1] + kSlack);
      if (moved) follow(top, scale);
    } else {
      moved = __any_sync(~0u, follow(top, scale));
    }
    const float lift[2] = {kLift - peak[0], kLift - peak[1]};
#pragma unroll
    for (int e = 0; e < kScores; ++e) {
      const int r = e / 2 % 2;
      const float power = fmaf(s[e], scale, lift[r]);
      // Spread over each group of eight, and over both rows.
      const bool poly = (e * 5 + e / 8) % 8 < C::poly;
      if constexpr (C::probe == Probe::kNoExponentials)
        s[e] = power;
      else
        s[e] = poly ? exp2_poly(power) : exp2_unit(power);
      if constexpr (!C::late_sums) sum[r] += s[e];
    }
  }
};

// Turns 4 x 4 pairs of bytes among the four threads of a quad: each gives one pair of each of four groups of
// columns, two in low and two in high, and thread t gets all pairs of group t, in the order of threads.
__device__ __forceinline__ uint2 turned_in_quad(uint32_t low, uint32_t high, int t) {
  const bool upper = t >= 2, odd = t % 2;
  // Across the quad: the lower threads get both groups of low, the upper ones those of high.
  const uint32_t mine = upper ? high : low, other = __shfl_xor_sync(~0u, upper ? low : high, 2);
  const uint32_t first = upper ? other : mine, second = upper ? mine : other;
  // Between neighbours: the even ones get the first of the two groups, the odd ones the second.
  constexpr uint32_t kFirst = 0x5410, kSecond = 0x7632;
  const uint32_t kept = __byte_perm(first, second, odd ? kSecond : kFirst),
                 got = __shfl_xor_sync(~0u, __byte_perm(first, second, odd ? kFirst : kSecond), 1);
  const uint32_t of_even = odd ? got : kept, of_odd = odd ? kept : got;
  return {__byte_perm(of_even, of_odd, kFirst), __byte_perm(of_even, of_odd, kSecond)};
}

}  // namespace cosmos_fast::attention8
