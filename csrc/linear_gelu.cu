// linear_gelu by CUTLASS 4 for compute capability 9.0, the only file that includes its headers; built if
// CMake finds them. Consumer warp groups take turns (ping-pong): while one runs the erf of its tile and
// stores it, the other keeps the tensor cores busy. COSMOS_FAST_TUNE adds the instances that
// tools/tune_linear_gelu.py compares.
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/util/packed_stride.hpp>

#include "linear_gelu.h"

namespace cosmos_fast {
namespace {

using cute::Int;
using cute::Shape;

// gelu(x) = max(x, 0) - a * 2^-Q(a) with a = |x| and 2^-Q(a) = erfc(a / sqrt(2)) / 2, Q by a polynomial of
// degree 10: see kernels/linear_gelu.py, which holds the same numbers and their error.
__device__ __forceinline__ float gelu_erf(float x) {
  constexpr float kQ[] = {0x1.ffffcap-1f,  0x1.26b106p+0f,   0x1.d6084cp-2f,  0x1.b1d28ep-5f,
                          -0x1.f317a6p-8f, 0x1.01c532p-11f,  0x1.0fbff2p-14f, -0x1.4d1dc6p-16f,
                          0x1.2353a8p-19f, -0x1.f10f66p-24f, 0x1.55991ap-29f};
  const float a = fminf(fabsf(x), 10.5f);
  float q = kQ[10];
#pragma unroll
  for (int i = 9; i >= 0; --i) q = fmaf(q, a, kQ[i]);
  float tail, positive;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(tail) : "f"(-q));
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(positive) : "f"(x), "f"(0.0f));
  return fmaf(-a, tail, positive);
}

template <typename T>
struct GeluErf;
template <>
struct GeluErf<float> {
  __device__ float operator()(float x) const { return gelu_erf(x); }
};
template <int N>
struct GeluErf<cutlass::Array<float, N>> {
  __device__ cutlass::Array<float, N> operator()(const cutlass::Array<float, N>& x) const {
    cutlass::Array<float, N> y;
#pragma unroll
    for (int i = 0; i < N; ++i) y[i] = gelu_erf(x[i]);
    return y;
  }
};

using Bf16 = cutlass::bfloat16_t;
using Row = cutlass::layout::RowMajor;
using Column = cutlass::layout::ColumnMajor;
constexpr int kAlign = 8;  // values of bf16 in 16 bytes, which the copy engine asks of every row

template <typename Tile, typename Cluster, typename MainSchedule, typename EpilogueSchedule>
struct Instance {
  using Gelu = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<GeluErf, Bf16, float,
                                             cutlass::FloatRoundStyle::round_to_nearest>,
      cutlass::epilogue::fusion::Sm90AccFetch>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, Row, kAlign, Bf16, Row, kAlign,
      EpilogueSchedule, Gelu>::CollectiveOp;
  using Stages = cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
      sizeof(typename Epilogue::SharedStorage))>;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Bf16, Row, kAlign, Bf16, Column, kAlign, float,
      Tile, Cluster, Stages, MainSchedule>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue,
                                                      cutlass::gemm::PersistentScheduler>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static const char* run(const LinearGeluArgs& args, const LinearGeluChoice& choice, int num_sms,
                         cudaStream_t stream) {
    const int L = static_cast<int>(args.num_rows), M = static_cast<int>(args.num_features),
              D = static_cast<int>(args.width);
    typename Kernel::Arguments call{};
    call.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    call.problem_shape = {L, M, D, 1};
    call.mainloop.ptr_A = static_cast<const Bf16*>(args.x);
    call.mainloop.ptr_B = static_cast<const Bf16*>(args.w);
    call.mainloop.dA = cutlass::make_cute_packed_stride(typename Kernel::StrideA{}, {L, D, 1});
    call.mainloop.dB = cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, {M, D, 1});
    call.epilogue.ptr_D = static_cast<Bf16*>(args.out);
    call.epilogue.dD = cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, {L, M, 1});
    call.hw_info.sm_count = num_sms;
    call.scheduler.max_swizzle_size = choice.swizzle;
    using Order = decltype(call.scheduler.raster_order);
    call.scheduler.raster_order = choice.along == 1   ? Order::AlongM
                                  : choice.along == 2 ? Order::AlongN
                                                      : Order::Heuristic;
    if (Gemm::get_workspace_size(call) != 0) return "CUTLASS asks for a workspace";
    Gemm gemm;
    cutlass::Status status = gemm.can_implement(call);
    if (status == cutlass::Status::kSuccess) status = gemm.initialize(call, nullptr, stream);
    if (status == cutlass::Status::kSuccess) status = gemm.run(stream);
    return status == cutlass::Status::kSuccess ? nullptr : cutlassGetStatusString(status);
  }
};

template <int kTileL, int kTileM, int kClusterL, int kClusterM>
using Pingpong =
    Instance<Shape<Int<kTileL>, Int<kTileM>, Int<64>>, Shape<Int<kClusterL>, Int<kClusterM>, Int<1>>,
             cutlass::gemm::KernelTmaWarpSpecializedPingpong, cutlass::epilogue::TmaWarpSpecialized>;
template <int kTileL, int kTileM, int kClusterL, int kClusterM>
using Cooperative =
    Instance<Shape<Int<kTileL>, Int<kTileM>, Int<64>>, Shape<Int<kClusterL>, Int<kClusterM>, Int<1>>,
             cutlass::gemm::KernelTmaWarpSpecializedCooperative,
             cutlass::epilogue::TmaWarpSpecializedCooperative>;

using Run = decltype(&Pingpong<128, 128, 2, 1>::run);
constexpr Run kInstances[] = {
    Pingpong<128, 128, 2, 1>::run,
#ifdef COSMOS_FAST_TUNE
    Pingpong<128, 128, 1, 2>::run,    Pingpong<64, 256, 2, 1>::run,     Pingpong<128, 192, 2, 1>::run,
    Cooperative<128, 256, 2, 1>::run, Cooperative<256, 128, 2, 1>::run, Cooperative<256, 128, 1, 2>::run,
#endif
};

}  // namespace

const char* linear_gelu_launch(const LinearGeluArgs& args, const LinearGeluChoice& choice, int num_sms,
                               cudaStream_t stream) {
  constexpr int kCount = sizeof(kInstances) / sizeof(kInstances[0]);
  if (choice.instance < 0 || choice.instance >= kCount) return "no such instance";
  return kInstances[choice.instance](args, choice, num_sms, stream);
}

}  // namespace cosmos_fast

#ifdef COSMOS_FAST_TUNE
// For ctypes: returns null, or what is wrong.
extern "C" const char* linear_gelu_tune(const void* x, const void* w, void* out, int64_t num_rows,
                                        int64_t num_features, int64_t width, int instance, int swizzle,
                                        int along, int num_sms, void* stream) {
  return cosmos_fast::linear_gelu_launch({x, w, out, num_rows, num_features, width},
                                         {instance, swizzle, along}, num_sms,
                                         static_cast<cudaStream_t>(stream));
}
#endif
