// What one lane of qk_codes_kernel computes, for the GPU and, so that a test can run 32 of them, for the
// host. A warp holds 16 heads. Lane 4 g + t has heads g and g + 8, and of each the features 32 c + 8 t + j: c
// < 4 sixteen-byte loads of j < 8 features, so that rotation, which pairs c with c + 2, stays inside the
// lane. H of 128 is H of 16 over (c, t) times H of 8 over j. Tensor cores do the first, exactly up to fp32
// sums of 16 terms, with no shuffle: for each j, words of (c 0, c 2) and (c 1, c 3) are an operand of
// m16n8k16, whose 16 rows are the heads. Two products give (c, t) = 8 b + 2 t + e, so a lane ends up with
// features 64 b + 16 t + 8 e + j: 16 codes in a row.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include "e4m3.cuh"
#define COSMOS_BOTH __host__ __device__ __forceinline__
#else
#define COSMOS_BOTH inline
#endif

namespace cosmos_fast::qk_codes {

constexpr float kRoot = 11.3137085f;  // of 128

struct alignas(16) Four {
  float v[4];
};

// Where a lane finds its factors; every table is in fours of features.
struct Tables {
  const Four* gain;  // features 0 to 127
  const Four* cos;   // 0 to 63
  const Four* sin;
  const Four* mean;  // at mean_place
};

// Lanes 0 to 7 and so on read neighbours: no two of the same banks. four: of a head's 32.
COSMOS_BOTH int mean_place(int head, int four) {
  return ((four / 8 * 2 + four % 2) * 16 + head) * 4 + four / 2 % 4;
}

// Where a head travels from: one column's heads are cut into parts of nearly equal length, and each part is
// (columns, L, 3, heads, 128), one behind the other. q, k and v (which 0, 1, 2) of a token begin at
// first + (3 * token + which) * apart.
struct Place {
  int64_t first;
  uint32_t apart;
};

COSMOS_BOTH Place place_of(int head, int64_t num_rows, int num_heads, int columns, int parts) {
  const int own = num_heads / columns, column = head / own, in_column = head % own;
  const int64_t part = (int64_t{in_column + 1} * parts - 1) / own;  // the first that ends behind the head
  const int64_t begin = own * part / parts, heads = own * (part + 1) / parts - begin;
  const int64_t before = 3 * num_rows * (columns * begin + column * heads) + in_column - begin;
  return {before * 128, static_cast<uint32_t>(heads * 128)};
}

COSMOS_BOTH float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
#endif
}

// Rounded one by one, never fused: the same on the host.
COSMOS_BOTH float times(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

COSMOS_BOTH float plus(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

COSMOS_BOTH float fused(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

// Both rounded to bf16, in one word.
COSMOS_BOTH uint32_t pair_of(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  uint32_t words[2];
  const float values[2] = {low, high};
  for (int i = 0; i < 2; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &values[i], sizeof(bits));
    words[i] = values[i] != values[i] ? 0x7FFFu : (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  }
  return words[1] << 16 | words[0];
#endif
}

COSMOS_BOTH float low_of(uint32_t word) { return float_of(word << 16); }
COSMOS_BOTH float high_of(uint32_t word) { return float_of(word & 0xFFFF0000u); }

#ifndef __CUDA_ARCH__
inline uint32_t code_of(float x) {
  const uint32_t sign = std::signbit(x) ? 0x80u : 0u;
  const float size = __builtin_fabsf(x);
  if (x != x) return 0x7Fu;
  if (size >= 448.0f) return sign | 0x7Eu;
  int exponent = -6;
  while (exponent < 8 && size >= std::ldexp(2.0f, exponent)) ++exponent;
  // Steps of an eighth of the power of two; a carry runs into the exponent by itself.
  const auto eighths = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, 3 - exponent)));
  return sign | (static_cast<uint32_t>(exponent + 6) * 8 + eighths);
}
#endif

// e4m3 codes of four values, the first in the lowest byte. NaN stays NaN.
COSMOS_BOTH uint32_t codes_of(float a, float b, float c, float d) {
#ifdef __CUDA_ARCH__
  return e4m3x4(a, b, c, d);
#else
  return code_of(d) << 24 | code_of(c) << 16 | code_of(b) << 8 | code_of(a);
#endif
}

// Sum over this lane's 32 features of one head.
COSMOS_BOTH float squares(const uint32_t (&x)[4][4]) {
  float sum = 0.0f;
#pragma unroll
  for (int c = 0; c < 4; ++c)
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float low = low_of(x[c][w]), high = high_of(x[c][w]);
      sum = fused(high, high, fused(low, low, sum));
    }
  return sum;
}

// Norm, rotation, and k less its mean of both heads of a lane; a[j]: the first operand of m16n8k16. What lies
// in registers beside x and a is kept small: one pair of loads at a time.
template <bool kKeys>
COSMOS_BOTH void rotated(const uint32_t (&x)[2][4][4], const float (&rstd)[2], const Tables& tables, int lane,
                         uint32_t (&a)[8][4]) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int at = 8 * c + 2 * t + half;
      const Four cos = tables.cos[at], sin = tables.sin[at];
      const Four gain[2] = {tables.gain[at], tables.gain[at + 16]};
#pragma unroll
      for (int head = 0; head < 2; ++head) {
        Four mean[2];
        if constexpr (kKeys) {
          mean[0] = tables.mean[mean_place(g + 8 * head, at)];
          mean[1] = tables.mean[mean_place(g + 8 * head, at + 16)];
        }
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          float n[2][2], y[2][2];
#pragma unroll
          for (int side = 0; side < 2; ++side) {
            const uint32_t word = x[head][c + 2 * side][2 * half + i / 2];
            const uint32_t normed = pair_of(times(times(low_of(word), rstd[head]), gain[side].v[i]),
                                            times(times(high_of(word), rstd[head]), gain[side].v[i + 1]));
            n[side][0] = low_of(normed), n[side][1] = high_of(normed);
          }
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            y[0][e] = fused(n[0][e], cos.v[i + e], -times(n[1][e], sin.v[i + e]));
            y[1][e] = fused(n[1][e], cos.v[i + e], times(n[0][e], sin.v[i + e]));
          }
          if constexpr (kKeys) {
#pragma unroll
            for (int side = 0; side < 2; ++side) {
              const uint32_t rounded = pair_of(y[side][0], y[side][1]);
              y[side][0] = plus(low_of(rounded), -mean[side].v[i]);
              y[side][1] = plus(high_of(rounded), -mean[side].v[i + 1]);
            }
          }
#pragma unroll
          for (int e = 0; e < 2; ++e) a[4 * half + i + e][2 * c + head] = pair_of(y[0][e], y[1][e]);
        }
      }
    }
}

// The second operand, signs of H of 16, for the products b 0 and 1. Its row 8 r + 2 t + i is (c, t) = 8 i +
// 4 r + t of what comes in, its column g is 8 b + g of what leaves.
COSMOS_BOTH void signs(int lane, int b, uint32_t (&out)[2]) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    out[r] = 0x3F803F80u;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int both = (8 * i + 4 * r + t) & (8 * b + g);
      const int odd = (both ^ both >> 1 ^ both >> 2 ^ both >> 3) & 1;
      out[r] |= static_cast<uint32_t>(odd) << (16 * i + 15);
    }
  }
}

// H of 8 over j, times scale, as codes: y[j] is what the product for j leaves, two neighbours e of either
// head. out: of each head 8 codes of e 0, then of e 1.
COSMOS_BOTH void coded(float (&y)[8][4], float scale, uint32_t (&out)[2][4]) {
#pragma unroll
  for (int apart = 1; apart < 8; apart *= 2)
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if ((j & apart) == 0)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float a = y[j][i], b = y[j + apart][i];
          y[j][i] = plus(a, b), y[j + apart][i] = plus(a, -b);
        }
#pragma unroll
  for (int head = 0; head < 2; ++head)
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
      for (int j = 0; j < 8; j += 4) {
        const int i = 2 * head + e;
        out[head][2 * e + j / 4] = codes_of(times(y[j][i], scale), times(y[j + 1][i], scale),
                                            times(y[j + 2][i], scale), times(y[j + 3][i], scale));
      }
}

}  // namespace cosmos_fast::qk_codes
