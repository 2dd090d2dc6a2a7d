// Eight values at a time: 16-byte accesses to bf16 and fp32 rows, arithmetic in fp32. Torch-free.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace cosmos_fast {

constexpr int kVec = 8;  // values per vector: one 16-byte access in bf16, two in fp32

struct Vec {
  float v[kVec];
};

struct TwoFloat4 {
  float4 a, b;
};

// A vector as it is stored: what a load in flight holds.
template <typename T>
struct PackedOf;
template <>
struct PackedOf<__nv_bfloat16> {
  using Type = uint4;
};
template <>
struct PackedOf<float> {
  using Type = TwoFloat4;
};
template <typename T>
using Packed = typename PackedOf<T>::Type;

__device__ __forceinline__ Vec widen(const uint4& raw) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  Vec out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out.v[2 * i] = __uint_as_float(words[i] << 16);
    out.v[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000u);
  }
  return out;
}

__device__ __forceinline__ Vec widen(const TwoFloat4& raw) {
  return {{raw.a.x, raw.a.y, raw.a.z, raw.a.w, raw.b.x, raw.b.y, raw.b.z, raw.b.w}};
}

template <typename T>
__device__ __forceinline__ Packed<T> narrow(const Vec& in) {
  if constexpr (sizeof(T) == 4) {
    return {make_float4(in.v[0], in.v[1], in.v[2], in.v[3]), make_float4(in.v[4], in.v[5], in.v[6], in.v[7])};
  } else {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(in.v[2 * i], in.v[2 * i + 1]);
      words[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
}

__device__ __forceinline__ Vec load_vec(const __nv_bfloat16* p) {
  return widen(*reinterpret_cast<const uint4*>(p));
}
__device__ __forceinline__ Vec load_vec(const float* p) {
  return widen(TwoFloat4{reinterpret_cast<const float4*>(p)[0], reinterpret_cast<const float4*>(p)[1]});
}

// Read once and never again: first to leave the caches.
__device__ __forceinline__ uint4 load_once(const __nv_bfloat16* p) {
  return __ldcs(reinterpret_cast<const uint4*>(p));
}
__device__ __forceinline__ TwoFloat4 load_once(const float* p) {
  return {__ldcs(reinterpret_cast<const float4*>(p)), __ldcs(reinterpret_cast<const float4*>(p) + 1)};
}

// A table is bf16 or fp32; the choice is the same for the whole grid, so the branch costs nothing.
__device__ __forceinline__ Vec load_table(const void* base, int64_t offset, bool bf16) {
  return bf16 ? load_vec(static_cast<const __nv_bfloat16*>(base) + offset)
              : load_vec(static_cast<const float*>(base) + offset);
}

__device__ __forceinline__ void store_packed(__nv_bfloat16* p, const uint4& in) {
  *reinterpret_cast<uint4*>(p) = in;
}
__device__ __forceinline__ void store_packed(float* p, const TwoFloat4& in) {
  reinterpret_cast<float4*>(p)[0] = in.a;
  reinterpret_cast<float4*>(p)[1] = in.b;
}

// Stores the rounded values and returns them: what follows must see what the next op will read.
template <typename T>
__device__ __forceinline__ Vec store_vec(T* p, const Vec& in) {
  const Packed<T> rounded = narrow<T>(in);
  store_packed(p, rounded);
  return widen(rounded);
}

}  // namespace cosmos_fast
