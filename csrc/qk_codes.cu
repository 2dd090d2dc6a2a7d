// qk_codes_kernel. A warp takes one token's 16 heads at a time, q and then k; qk_codes_lane.h says who holds
// what. Every lane copies what it will need of the next q and k into a place of its own in shared memory, as
// soon as the last has left it: 8 kB of a warp are on their way or waiting, and no registers are held for
// them. Bytes per token and 16 heads: 8192 read, 4096 written; cos and sin (512) come a token ahead, gains
// and means stay.
#include <cuda_bf16.h>

#include "qk_codes.h"
#include "qk_codes_lane.h"

namespace cosmos_fast {
namespace {

using namespace qk_codes;

constexpr int kWarps = 4, kThreads = 32 * kWarps, kBlocks = 4;
constexpr int kFours = kQkCodesWidth / 4;

struct alignas(16) Words {
  uint32_t w[4];
};

using Own = Words[8][32];  // 4 loads of either head, of each lane

struct Shared {
  Own x[kWarps][2];  // q, k
  Four mean[kQkCodesHeads * kFours];
  Four gain[2][kFours];
  Four angles[kWarps][2][kFours];  // cos, then sin
};

__device__ __forceinline__ void copy_later(void* to, const void* from) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
      "l"(from)
      : "memory");
}

// What this lane needs of 16 heads; from: its first features.
__device__ __forceinline__ void fetch_heads(const __nv_bfloat16* from, Own& to, int lane) {
#pragma unroll
  for (int i = 0; i < 8; ++i) copy_later(&to[i][lane], from + i / 4 * 8 * kQkCodesWidth + i % 4 * 32);
}

// A token's cos and sin, 16 bytes a lane.
__device__ __forceinline__ void fetch_angles(const QkCodesArgs& args, int64_t token, Four (&to)[kFours],
                                             int lane) {
  copy_later(&to[lane], lane < 16 ? args.cos + token * args.cos_stride + 4 * lane
                                  : args.sin + token * args.sin_stride + 4 * (lane - 16));
}

__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// All but the last group are here, for the whole warp.
__device__ __forceinline__ void await_group() {
  asm volatile("cp.async.wait_group 1;" ::: "memory");
  __syncwarp();
}

__device__ __forceinline__ void product(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %10, %10, %10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.0f));
}

// The first operands of 8 products, one for each j.
template <bool kKeys>
__device__ __forceinline__ void operands(const Own& from, const Tables& tables, int lane, float eps,
                                         uint32_t (&a)[8][4]) {
  uint32_t x[2][4][4];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const Words own = from[i][lane];
#pragma unroll
    for (int w = 0; w < 4; ++w) x[i / 4][i % 4][w] = own.w[w];
  }
  float rstd[2];
#pragma unroll
  for (int head = 0; head < 2; ++head) {
    float sum = squares(x[head]);
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    rstd[head] = rsqrtf(sum / kQkCodesWidth + eps);
  }
  rotated<kKeys>(x, rstd, tables, lane, a);
  __syncwarp();  // keeps the compiler from mixing steps, which takes registers that are not there
}

// Where codes of a lane's features begin: of q (which 0) or k (1), of its first head (i 0) or second. In rows
// of their own:
struct Rows {
  uint8_t* first[2];
  int64_t wide;

  __device__ __forceinline__ Rows(const QkCodesArgs& args, int first_head, int lane)
      : wide(static_cast<int64_t>(args.num_heads) * kQkCodesWidth) {
    const int64_t at = (first_head + lane / 4) * kQkCodesWidth + lane % 4 * 16;
    for (int which = 0; which < 2; ++which) first[which] = static_cast<uint8_t*>(args.out[which]) + at;
  }

  __device__ __forceinline__ uint8_t* at(int64_t token, int which, int i) const {
    return first[which] + token * wide + i * 8 * kQkCodesWidth;
  }
};

// Where they travel from. What is known of a head lies in shared memory, for want of registers; it is there
// after the next barrier.
struct Travelling {
  uint8_t* first;
  const Place* place;

  __device__ __forceinline__ Travelling(const QkCodesArgs& args, int first_head, int lane)
      : first(static_cast<uint8_t*>(args.out[0]) + lane % 4 * 16) {
    __shared__ Place places[kQkCodesHeads];
    const int head = static_cast<int>(threadIdx.x);
    if (head < kQkCodesHeads)
      places[head] = place_of(first_head + head, args.num_rows, args.num_heads, args.columns, args.parts);
    place = &places[lane / 4];
  }

  __device__ __forceinline__ uint8_t* at(int64_t token, int which, int i) const {
    return first + place[8 * i].first + (3 * token + which) * place[8 * i].apart;
  }
};

__device__ __forceinline__ void store_codes(const uint32_t (&a)[8][4], const uint32_t (&sign)[2][2],
                                            float scale, uint8_t* first_head, uint8_t* second_head) {
#pragma unroll
  for (int b = 0; b < 2; ++b) {
    float y[8][4];
#pragma unroll
    for (int j = 0; j < 8; ++j) product(y[j], a[j], sign[b]);
    uint32_t words[2][4];
    coded(y, scale, words);
#pragma unroll
    for (int head = 0; head < 2; ++head)
      *reinterpret_cast<uint4*>((head ? second_head : first_head) + 64 * b) =
          make_uint4(words[head][0], words[head][1], words[head][2], words[head][3]);
    __syncwarp();
  }
}

template <typename Out>
__global__ void __launch_bounds__(kThreads, kBlocks)
    qk_codes_kernel(const __grid_constant__ QkCodesArgs args) {
  __shared__ Shared shared;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int first_head = static_cast<int>(blockIdx.y) * kQkCodesHeads;

  const Four* mean = reinterpret_cast<const Four*>(args.k_mean) + first_head * kFours;
  for (int i = thread; i < kQkCodesHeads * kFours; i += kThreads)
    shared.mean[mean_place(i / kFours, i % kFours)] = mean[i];
  for (int i = thread; i < kQkCodesWidth; i += kThreads)
#pragma unroll
    for (int part = 0; part < 2; ++part)
      shared.gain[part][i / 4].v[i % 4] =
          args.gain_bf16[part] ? __bfloat162float(static_cast<const __nv_bfloat16*>(args.gain[part])[i])
                               : static_cast<const float*>(args.gain[part])[i];
  const float q_scale = 1.0f / (kRoot * args.steps[0]), k_scale = 1.0f / (kRoot * args.steps[1]);
  uint32_t sign[2][2];
  signs(lane, 0, sign[0]);
  signs(lane, 1, sign[1]);
  const Out out(args, first_head, lane);
  __syncthreads();

  const int64_t apart = static_cast<int64_t>(gridDim.x) * kWarps;
  int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (token >= args.num_rows) return;  // the whole warp
  const int64_t wide = static_cast<int64_t>(args.num_heads) * kQkCodesWidth;
  const auto* x = static_cast<const __nv_bfloat16*>(args.qkv) + (first_head + lane / 4) * kQkCodesWidth +
                  lane % 4 * 8 + token * args.row_stride;

  Own &q = shared.x[warp][0], &k = shared.x[warp][1];
  Four(&angles)[2][kFours] = shared.angles[warp];
  fetch_angles(args, token, angles[0], lane);
  fetch_heads(x, q, lane);
  end_group();
  fetch_heads(x + wide, k, lane);
  end_group();
  for (int stage = 0; token < args.num_rows; stage ^= 1) {
    const int64_t next = token + apart;
    const bool more = next < args.num_rows;
    const Four* cos = angles[stage];
    uint32_t a[8][4];
    x += apart * args.row_stride;

    await_group();  // nor does any lane still read the angles of the token before
    operands<false>(q, {shared.gain[0], cos, cos + 16, nullptr}, lane, args.eps, a);
    if (more) {
      fetch_angles(args, next, angles[stage ^ 1], lane);
      fetch_heads(x, q, lane);
    }
    end_group();
    store_codes(a, sign, q_scale, out.at(token, 0, 0), out.at(token, 0, 1));

    await_group();
    operands<true>(k, {shared.gain[1], cos, cos + 16, shared.mean}, lane, args.eps, a);
    if (more) fetch_heads(x + wide, k, lane);
    end_group();
    store_codes(a, sign, k_scale, out.at(token, 1, 0), out.at(token, 1, 1));
    token = next;
  }
}

}  // namespace

cudaError_t qk_codes_launch(const QkCodesArgs& args, cudaStream_t stream) {
  const auto kernel = args.columns ? qk_codes_kernel<Travelling> : qk_codes_kernel<Rows>;
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  // As much shared memory as there is: kBlocks of them need it, and nothing of this passes through L1.
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  const int groups = args.num_heads / kQkCodesHeads;
  const int64_t all = (args.num_rows + kWarps - 1) / kWarps;
  const int64_t at_once = (static_cast<int64_t>(processors) * kBlocks + groups - 1) / groups;
  const dim3 grid(static_cast<unsigned>(all < at_once ? all : at_once), static_cast<unsigned>(groups));
  kernel<<<grid, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

void qk_codes_kernels(std::vector<KernelInfo>& rows) {
  rows.push_back(describe_kernel("qk_codes", qk_codes_kernel<Rows>, kThreads));
  rows.push_back(describe_kernel("qk_codes packed", qk_codes_kernel<Travelling>, kThreads));
}

}  // namespace cosmos_fast
