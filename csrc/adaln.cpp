// adaln on the CPU: one row at a time in a float buffer, statistics in two passes. Torch-free.
// Built without FMA contraction and with a fixed order of sums, so every x86 level gives the same bytes.
#include "adaln.h"

#include <cmath>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

namespace cosmos_fast {
namespace {

struct Bf16 {
  uint16_t bits;
};

inline float load(const float* p, int64_t i) { return p[i]; }

inline float load(const Bf16* p, int64_t i) {
  const uint32_t bits = static_cast<uint32_t>(p[i].bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline void store(float* p, int64_t i, float value) { p[i] = value; }

// Round to nearest even; the carry turns a NaN payload into infinity, so NaN is put back.
inline void store(Bf16* p, int64_t i, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  p[i].bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

constexpr int kLanes = 16;  // partial sums: one AVX-512 register, and the same order everywhere

template <typename F>
[[gnu::always_inline]] inline float sum_of(int64_t n, F&& term) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int k = 0; k < kLanes; ++k) lanes[k] += term(i + k);
  for (int k = 0; i + k < n; ++k) lanes[k] += term(i + k);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int k = 0; k < width; ++k) lanes[k] += lanes[k + width];
  return lanes[0];
}

CLONES void widen(const Bf16* src, float* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = load(src, i);
}
// Rounds row to the stored type and leaves the rounded values in row.
CLONES void settle(float* row, float* dst, int64_t n) { std::memcpy(dst, row, n * sizeof(float)); }
CLONES void settle(float* row, Bf16* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(dst, i, row[i]);
  for (int64_t i = 0; i < n; ++i) row[i] = load(dst, i);
}
CLONES void add_scaled(float* row, const float* a, const float* b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) row[i] += a[i] * b[i];
}
CLONES void add_scaled(float* row, float a, const float* b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) row[i] += a * b[i];
}
CLONES float mean_of(const float* row, int64_t n) {
  return sum_of(n, [&](int64_t i) { return row[i]; }) / static_cast<float>(n);
}
CLONES float variance_of(const float* row, float mean, int64_t n) {
  return sum_of(n, [&](int64_t i) { return (row[i] - mean) * (row[i] - mean); }) / static_cast<float>(n);
}
CLONES void modulate(float* row, float mean, float rstd, const float* scale, const float* shift, int64_t n) {
  for (int64_t i = 0; i < n; ++i) row[i] = (row[i] - mean) * rstd * (1.0f + scale[i]) + shift[i];
}

const float* widen_from(const void* base, int64_t offset, bool bf16, float* buffer, int64_t n) {
  if (!bf16) return static_cast<const float*>(base) + offset;
  widen(static_cast<const Bf16*>(base) + offset, buffer, n);
  return buffer;
}

void settle_to(float* row, void* base, int64_t offset, bool bf16, int64_t n) {
  if (bf16)
    settle(row, static_cast<Bf16*>(base) + offset, n);
  else
    settle(row, static_cast<float*>(base) + offset, n);
}

}  // namespace

void adaln_rows_cpu(const AdalnArgs& args, int64_t begin, int64_t end) {
  const int64_t D = args.width;
  std::vector<float> buffers(3 * D);
  float* row = buffers.data();
  float *first = row + D, *second = first + D;
  for (int64_t l = begin; l < end; ++l) {
    const int64_t at = l * D, frame = (args.token_offset + l) / args.tokens_per_frame;
    std::memcpy(row, widen_from(args.x, at, args.x_bf16, first, D), D * sizeof(float));
    if (args.branch != nullptr) {
      const float* gate = widen_from(args.gate, frame * args.gate_stride, args.gate_bf16, first, D);
      add_scaled(row, gate, widen_from(args.branch, at, args.x_bf16, second, D), D);
      for (int j = 0; j < args.num_hints; ++j) {
        const float weight = args.hint_weights[j * args.weight_stride_hint + l * args.weight_stride_row];
        add_scaled(row, weight, widen_from(args.hints[j], at, args.x_bf16, second, D), D);
      }
      settle_to(row, args.sum, at, args.x_bf16, D);
    }
    const float mean = mean_of(row, D);
    const float rstd = 1.0f / std::sqrt(variance_of(row, mean, D) + args.eps);
    const float* scale = widen_from(args.scale, frame * args.scale_stride, args.scale_bf16, first, D);
    const float* shift = widen_from(args.shift, frame * args.shift_stride, args.shift_bf16, second, D);
    modulate(row, mean, rstd, scale, shift, D);
    settle_to(row, args.h, at, args.h_bf16, D);
  }
}

}  // namespace cosmos_fast
