// qk_codes_cuda and qk_codes_packed_cuda: the checks that stand between Python and qk_codes.h.
#include "qk_codes.h"

#include <array>
#include <tuple>

#include "common.h"

namespace cosmos_fast {
namespace {

constexpr const char* kOp = "qk_codes";

bool beside(const Tensor& x, const Tensor& qkv) {
  return x.is_cuda() && x.get_device_index() == qkv.get_device_index();
}

const float* floats_of(const char* what, const Tensor& x, const Tensor& qkv, int64_t count) {
  STD_TORCH_CHECK(
      x.scalar_type() == ScalarType::Float && x.numel() == count && x.is_contiguous() && beside(x, qkv), kOp,
      ": ", what, " must be ", count, " contiguous float32 values on qkv's device, got ", x.numel(), " of ",
      type_name(x.scalar_type()), ".");
  return static_cast<const float*>(x.data_ptr());
}

void set_gain(const char* what, const Tensor& gain, const Tensor& qkv, QkCodesArgs& args, int part) {
  STD_TORCH_CHECK(
      gain.dim() == 1 && gain.size(0) == kQkCodesWidth && gain.is_contiguous() && beside(gain, qkv), kOp,
      ": ", what, " must be contiguous (", kQkCodesWidth, ",) on qkv's device, got ", gain.dim(),
      " dimensions and ", gain.numel(), " elements. Choose another implementation.");
  args.gain[part] = gain.data_ptr();
  args.gain_bf16[part] = is_bf16(kOp, what, gain.scalar_type());
}

const float* angles_of(const char* what, const Tensor& x, const Tensor& qkv, int64_t& stride) {
  const bool fits = x.dim() == 2 && x.size(0) == qkv.size(0) && x.size(1) == kQkCodesWidth / 2 &&
                    x.stride(1) == 1 && x.scalar_type() == ScalarType::Float && beside(x, qkv);
  STD_TORCH_CHECK(fits, kOp, ": ", what, " must be float32 (", qkv.size(0), ", ", kQkCodesWidth / 2,
                  ") with unit stride along K/2 on qkv's device, got ", type_name(x.scalar_type()), " with ",
                  x.dim(), " dimensions and ", x.numel(), " elements.");
  stride = x.stride(0);
  return static_cast<const float*>(x.data_ptr());
}

struct Operands {
  Tensor qkv, q_gain, k_gain, cos, sin, k_mean, steps;
};

// Everything but where codes go.
QkCodesArgs args_of(const Operands& x, double eps) {
  const Tensor& qkv = x.qkv;
  constexpr int64_t kStep = 3 * kQkCodesHeads * kQkCodesWidth;
  STD_TORCH_CHECK(
      qkv.dim() == 2 && qkv.size(1) % kStep == 0 && qkv.size(1) > 0 && qkv.size(1) < (int64_t{1} << 31) &&
          qkv.stride(1) == 1 && qkv.scalar_type() == ScalarType::BFloat16,
      kOp, ": qkv must be bfloat16 (L, 3 * N * ", kQkCodesWidth, "), N a multiple of ", kQkCodesHeads,
      ", with unit stride along the features, got ", type_name(qkv.scalar_type()), " with ", qkv.dim(),
      " dimensions, the last ", qkv.size(qkv.dim() - 1), ". Choose another implementation.");
  const int64_t N = qkv.size(1) / (3 * kQkCodesWidth);
  QkCodesArgs args{};
  args.qkv = qkv.data_ptr();
  args.num_rows = qkv.size(0);
  args.num_heads = static_cast<int>(N);
  args.row_stride = qkv.stride(0);
  args.eps = static_cast<float>(eps);
  set_gain("q_gain", x.q_gain, qkv, args, 0);
  set_gain("k_gain", x.k_gain, qkv, args, 1);
  args.cos = angles_of("cos", x.cos, qkv, args.cos_stride);
  args.sin = angles_of("sin", x.sin, qkv, args.sin_stride);
  args.k_mean = floats_of("k_mean", x.k_mean, qkv, N * kQkCodesWidth);
  args.steps = floats_of("steps", x.steps, qkv, 3);
  return args;
}

void launch(const QkCodesArgs& args, int32_t device) {
  if (args.num_rows == 0) return;
  uintptr_t low_bits = 0;
  for (const void* pointer :
       {args.qkv, static_cast<const void*>(args.cos), static_cast<const void*>(args.sin),
        static_cast<const void*>(args.k_mean), static_cast<const void*>(args.out[0])})
    low_bits |= reinterpret_cast<uintptr_t>(pointer);
  STD_TORCH_CHECK(
      low_bits % 16 == 0 && args.row_stride % 8 == 0 && (args.cos_stride | args.sin_stride) % 4 == 0, kOp,
      ": operands and their rows must start on 16 bytes, got row strides of ", args.row_stride, ", ",
      args.cos_stride, " and ", args.sin_stride, " elements and address bits ", low_bits % 16,
      ". Call .contiguous() on a view.");
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_launch(kOp, qk_codes_launch(args, current_stream(device)));
}

std::tuple<Tensor, Tensor> qk_codes_cuda(Tensor qkv, Tensor q_gain, Tensor k_gain, Tensor cos, Tensor sin,
                                         Tensor k_mean, Tensor steps, double eps) {
  QkCodesArgs args = args_of({qkv, q_gain, k_gain, cos, sin, k_mean, steps}, eps);
  const std::array<int64_t, 3> shape = {args.num_rows, args.num_heads, kQkCodesWidth};
  const Tensor q = torch::stable::new_empty(qkv, shape, ScalarType::Float8_e4m3fn);
  const Tensor k = torch::stable::new_empty(qkv, shape, ScalarType::Float8_e4m3fn);
  args.out[0] = q.data_ptr();
  args.out[1] = k.data_ptr();
  launch(args, qkv.get_device_index());
  return {q, k};
}

// Codes of q and k in their places of what travels; v's are left as they are.
void qk_codes_packed_cuda(Tensor qkv, Tensor q_gain, Tensor k_gain, Tensor cos, Tensor sin, Tensor k_mean,
                          Tensor steps, int64_t columns, int64_t parts, double eps, Tensor out) {
  QkCodesArgs args = args_of({qkv, q_gain, k_gain, cos, sin, k_mean, steps}, eps);
  STD_TORCH_CHECK(columns > 0 && args.num_heads % columns == 0 && parts > 0, kOp,
                  ": columns must divide the ", args.num_heads, " heads and parts be positive, got ", columns,
                  " and ", parts, ".");
  STD_TORCH_CHECK(out.numel() == qkv.numel() && out.is_contiguous() && beside(out, qkv) &&
                      out.scalar_type() == ScalarType::Float8_e4m3fn,
                  kOp, ": out must be ", qkv.numel(), " contiguous e4m3 codes on qkv's device, got ",
                  out.numel(), " of ", type_name(out.scalar_type()), ".");
  const int64_t own = args.num_heads / columns;
  args.columns = static_cast<int>(columns);
  args.parts = static_cast<int>(parts < own ? parts : own);
  args.out[0] = out.data_ptr();
  launch(args, qkv.get_device_index());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cosmos_fast, m) {
  m.def(
      "qk_codes_cuda(Tensor qkv, Tensor q_gain, Tensor k_gain, Tensor cos, Tensor sin, Tensor k_mean, "
      "Tensor steps, float eps) -> (Tensor, Tensor)");
  m.def(
      "qk_codes_packed_cuda(Tensor qkv, Tensor q_gain, Tensor k_gain, Tensor cos, Tensor sin, Tensor k_mean, "
      "Tensor steps, int columns, int parts, float eps, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cosmos_fast, CUDA, m) {
  m.impl("qk_codes_cuda", TORCH_BOX(&qk_codes_cuda));
  m.impl("qk_codes_packed_cuda", TORCH_BOX(&qk_codes_packed_cuda));
}

}  // namespace cosmos_fast
