// Launch of one version of the kernel: tensor maps, shared memory, grid.
#pragma once

#include <cudaTypedefs.h>

#include "attention8.cuh"

namespace cosmos_fast::attention8 {

// cuTensorMapEncodeTiled, asked of the driver so that nothing links against it.
inline cudaError_t tensor_map_encoder(PFN_cuTensorMapEncodeTiled_v12000* encode) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
  if (error != cudaSuccess) return error;
  if (result != cudaDriverEntryPointSuccess || found == nullptr) return cudaErrorSymbolNotFound;
  *encode = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  return cudaSuccess;
}

struct Box {
  int64_t sizes[3], strides[2];  // of the tensor, bytes; the first dimension has stride 1
  int box[3];
};

inline cudaError_t make_map(CUtensorMap* map, const void* data, const Box& b) {
  PFN_cuTensorMapEncodeTiled_v12000 encode = nullptr;
  if (const cudaError_t error = tensor_map_encoder(&encode); error != cudaSuccess) return error;
  cuuint64_t sizes[3], strides[2];
  cuuint32_t box[3];
  const cuuint32_t steps[3] = {1, 1, 1};
  for (int i = 0; i < 3; ++i) sizes[i] = b.sizes[i], box[i] = b.box[i];
  for (int i = 0; i < 2; ++i) strides[i] = b.strides[i];
  const CUtensorMapSwizzle swizzle = b.box[0] == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : b.box[0] == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                      : CU_TENSOR_MAP_SWIZZLE_32B;
  const CUresult result = encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, const_cast<void*>(data), sizes,
                                 strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// A k_scale of 1 leaves the q_scale of a head in its place, so that the kernel reads one number per tile.
template <class C>
cudaError_t launch(const Attention8Args& a, cudaStream_t stream) {
  using P = Plan<C>;
  constexpr int64_t kWidth = kAttention8Width;
  if (a.num_queries == 0 || a.num_heads == 0) return cudaSuccess;
  if (a.k_scale_blocks && kAttention8ScaleKeys % C::keys != 0) return cudaErrorInvalidValue;
  if (a.k_scale == nullptr && (a.q_scale_rows != 0 || a.k_scale_blocks)) return cudaErrorInvalidValue;
  if (C::sparse != (a.key_tiles != nullptr)) return cudaErrorInvalidValue;
  const int64_t N = a.num_heads, columns = (a.num_keys + 15) / 16 * 16;
  CUtensorMap q_map, k_map, v_map;
  const Box boxes[3] = {
      {{kWidth, N, a.num_queries}, {a.q_head, a.q_row}, {128, 1, P::kQueries}},
      {{kWidth, N, a.num_keys}, {a.k_head, a.k_row}, {128, 1, Part<C>::kKeys}},
      {{columns, kWidth, N}, {a.v_row, kWidth * a.v_row}, {P::kValueRowBytes, Part<C>::kChannels, 1}},
  };
  if (const cudaError_t error = make_map(&q_map, a.q, boxes[0]); error != cudaSuccess) return error;
  if (const cudaError_t error = make_map(&k_map, a.k, boxes[1]); error != cudaSuccess) return error;
  if (const cudaError_t error = make_map(&v_map, a.v, boxes[2]); error != cudaSuccess) return error;
  const Params params{a.out,
                      a.lse,
                      a.k_scale ? a.q_scale : nullptr,
                      a.k_scale ? a.k_scale : a.q_scale,
                      a.v_scale,
                      a.v_mean,
                      a.out_step,
                      a.key_tiles,
                      a.key_counts,
                      a.out_row,
                      a.out_head,
                      static_cast<int>(a.num_queries),
                      static_cast<int>(a.num_keys),
                      a.q_scale_head,
                      a.k_scale ? a.k_scale_head : a.q_scale_head,
                      a.q_scale_rows,
                      a.key_capacity,
                      a.k_scale_blocks ? 1 : 0,
                      a.softmax_scale * 1.44269504f};
  const auto kernel = attention8_kernel<C>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, P::kBytes);
  if (error != cudaSuccess) return error;
  const int64_t tiles = (a.num_queries + P::kQueries - 1) / P::kQueries;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {C::cluster, 1, 1};
  cudaLaunchConfig_t config{};
  // A query tile too many, to fill a cluster, reads zeros and writes nothing.
  config.gridDim =
      dim3(static_cast<unsigned>((tiles + C::cluster - 1) / C::cluster * C::cluster), a.num_heads);
  config.blockDim = dim3(P::kThreads);
  config.dynamicSmemBytes = P::kBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = C::cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, q_map, k_map, v_map, params);
}

}  // namespace cosmos_fast::attention8
