// PyInit__C, the registration table, and the checks that stand between Python and raw pointers.
#include <Python.h>

#include <array>
#include <tuple>
#include <vector>

#include "adaln.h"
#include "common.h"
#ifdef USE_CUDA
#include "norm_rope.h"
#endif

namespace cosmos_fast {
namespace {

using OptionalType = std::optional<ScalarType>;

// Fills one (T, D) table: checks its shape, returns its pointer and the distance between frames.
const void* table_of(const char* op, const char* what, const Tensor& table, const AdalnArgs& args,
                     int64_t frames, int64_t& stride, bool& bf16) {
  STD_TORCH_CHECK(
      table.dim() == 2 && table.size(0) >= frames && table.size(1) == args.width && table.stride(1) == 1, op,
      ": ", what, " must be (T >= ", frames, ", ", args.width, ") with unit stride along D, got ",
      table.dim(), " dimensions, first ", table.size(0), ", last ", table.size(table.dim() - 1), ".");
  stride = table.stride(0);
  bf16 = is_bf16(op, what, table.scalar_type());
  return table.data_ptr();
}

// A (L, D) operand that must look exactly like x.
const void* like_x(const char* op, const char* what, const Tensor& other, const Tensor& x) {
  const bool same = other.dim() == 2 && other.size(0) == x.size(0) && other.size(1) == x.size(1) &&
                    other.scalar_type() == x.scalar_type() && other.is_contiguous() &&
                    other.is_cuda() == x.is_cuda() && other.get_device_index() == x.get_device_index();
  STD_TORCH_CHECK(same, op, ": ", what, " must be contiguous with x's shape, type and device (", x.size(0),
                  ", ", x.size(1), ") ", type_name(x.scalar_type()), ", got ", type_name(other.scalar_type()),
                  " with ", other.numel(), " elements.");
  return other.data_ptr();
}

AdalnArgs base_args(const char* op, const Tensor& x, const Tensor& h, const Tensor& shift,
                    const Tensor& scale, int64_t tokens_per_frame, int64_t token_offset, double eps) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), op, ": x must be contiguous (L, D), got ", x.dim(),
                  " dimensions.");
  STD_TORCH_CHECK(tokens_per_frame > 0 && token_offset >= 0, op,
                  ": tokens_per_frame must be positive and token_offset not negative, got ", tokens_per_frame,
                  " and ", token_offset, ".");
  AdalnArgs args{};
  args.x = x.data_ptr();
  args.h = h.data_ptr();
  args.num_rows = x.size(0);
  args.width = x.size(1);
  args.tokens_per_frame = tokens_per_frame;
  args.token_offset = token_offset;
  args.eps = static_cast<float>(eps);
  args.x_bf16 = is_bf16(op, "x", x.scalar_type());
  args.h_bf16 = is_bf16(op, "out", h.scalar_type());
  const int64_t frames = args.num_rows == 0 ? 0 : (token_offset + args.num_rows - 1) / tokens_per_frame + 1;
  args.shift = table_of(op, "shift", shift, args, frames, args.shift_stride, args.shift_bf16);
  args.scale = table_of(op, "scale", scale, args, frames, args.scale_stride, args.scale_bf16);
  return args;
}

void add_residual(const char* op, AdalnArgs& args, const Tensor& x, const Tensor& sum, const Tensor& branch,
                  const Tensor& gate, const std::vector<Tensor>& hints,
                  const std::optional<Tensor>& weights) {
  const int64_t frames =
      args.num_rows == 0 ? 0 : (args.token_offset + args.num_rows - 1) / args.tokens_per_frame + 1;
  args.branch = like_x(op, "branch", branch, x);
  args.sum = sum.data_ptr();
  args.gate = table_of(op, "gate", gate, args, frames, args.gate_stride, args.gate_bf16);
  STD_TORCH_CHECK(hints.size() <= kMaxHints, op, ": at most ", kMaxHints, " hints, got ", hints.size(), ".");
  args.num_hints = static_cast<int>(hints.size());
  for (int j = 0; j < args.num_hints; ++j) args.hints[j] = like_x(op, "hints", hints[j], x);
  if (args.num_hints == 0) return;
  STD_TORCH_CHECK(weights.has_value(), op, ": hint_weights must be given with hints, got none.");
  const bool fits = weights->dim() == 2 && weights->size(0) == args.num_hints &&
                    (weights->size(1) == 1 || weights->size(1) == args.num_rows) &&
                    weights->scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(fits, op, ": hint_weights must be float32 (", args.num_hints, ", 1 or ", args.num_rows,
                  "), got ", type_name(weights->scalar_type()), " with ", weights->numel(), " elements.");
  args.hint_weights = static_cast<const float*>(weights->data_ptr());
  args.weight_stride_hint = weights->stride(0);
  args.weight_stride_row = weights->size(1) == 1 ? 0 : weights->stride(1);
}

void run_cpu(const char*, const AdalnArgs& args, const Tensor&) {
  // 32 rows of 2048 are about 20 us on one core: less is not worth a second thread.
  torch::stable::parallel_for(0, args.num_rows, 32,
                              [&](int64_t begin, int64_t end) { adaln_rows_cpu(args, begin, end); });
}

#ifdef USE_CUDA
void run_cuda(const char* op, const AdalnArgs& args, const Tensor& x) {
  if (args.num_rows == 0) return;
  STD_TORCH_CHECK(args.width % 8 == 0 && args.width <= kMaxCudaWidth, op,
                  ": x must be (L, D) with D % 8 == 0 up to ", kMaxCudaWidth, ", got (", args.num_rows, ", ",
                  args.width, ").");
  const void* pointers[] = {args.x, args.branch, args.gate, args.shift, args.scale};
  uintptr_t low_bits = 0;
  for (const void* pointer : pointers) low_bits |= reinterpret_cast<uintptr_t>(pointer);
  for (int j = 0; j < args.num_hints; ++j) low_bits |= reinterpret_cast<uintptr_t>(args.hints[j]);
  const int64_t strides = args.gate_stride | args.shift_stride | args.scale_stride;
  STD_TORCH_CHECK(
      low_bits % 16 == 0 && strides % 8 == 0, op,
      ": operands must start on 16 bytes and tables step by multiples of 8 elements, got neither or one. "
      "Call .contiguous() on a view.");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_launch(op, adaln_launch(args, current_stream(x.get_device_index())));
}
#endif

template <auto kRun>
Tensor adaln(Tensor x, Tensor shift, Tensor scale, int64_t tokens_per_frame, int64_t token_offset, double eps,
             OptionalType out) {
  const Tensor h = empty_as(x, out.value_or(x.scalar_type()));
  kRun("adaln", base_args("adaln", x, h, shift, scale, tokens_per_frame, token_offset, eps), x);
  return h;
}

template <auto kRun>
std::tuple<Tensor, Tensor> residual_adaln(Tensor x, Tensor branch, Tensor gate, std::vector<Tensor> hints,
                                          std::optional<Tensor> hint_weights, Tensor shift, Tensor scale,
                                          int64_t tokens_per_frame, int64_t token_offset, double eps,
                                          OptionalType out) {
  const Tensor sum = empty_as(x, x.scalar_type());
  const Tensor h = empty_as(x, out.value_or(x.scalar_type()));
  AdalnArgs args = base_args("residual_adaln", x, h, shift, scale, tokens_per_frame, token_offset, eps);
  add_residual("residual_adaln", args, x, sum, branch, gate, hints, hint_weights);
  kRun("residual_adaln", args, x);
  return {sum, h};
}

#ifdef USE_CUDA
// One gain (K,), on x's device.
void set_gain(const char* op, const char* what, const Tensor& gain, const Tensor& x, NormRopeArgs& args,
              int part) {
  STD_TORCH_CHECK(gain.dim() == 1 && gain.size(0) == args.head_width && gain.is_contiguous() &&
                      gain.is_cuda() && gain.get_device_index() == x.get_device_index(),
                  op, ": ", what, " must be contiguous (", args.head_width, ",) on x's device, got ",
                  gain.dim(), " dimensions and ", gain.numel(), " elements.");
  args.gain[part] = gain.data_ptr();
  args.gain_bf16[part] = is_bf16(op, what, gain.scalar_type());
}

// Angles (L, K/2), on x's device.
const float* table_of_angles(const char* op, const char* what, const Tensor& table, const Tensor& x,
                             const NormRopeArgs& args, int64_t& stride) {
  const bool fits = table.dim() == 2 && table.size(0) == args.num_rows &&
                    table.size(1) == args.head_width / 2 && table.stride(1) == 1 &&
                    table.scalar_type() == ScalarType::Float && table.is_cuda() &&
                    table.get_device_index() == x.get_device_index();
  STD_TORCH_CHECK(fits, op, ": ", what, " must be float32 (", args.num_rows, ", ", args.head_width / 2,
                  ") with unit stride along K/2 on x's device, got ", type_name(table.scalar_type()),
                  " with ", table.dim(), " dimensions and ", table.numel(), " elements.");
  stride = table.stride(0);
  return static_cast<const float*>(table.data_ptr());
}

// parts: q, k and v of a packed projection, or the one of head_norm.
NormRopeArgs heads_of(const char* op, const Tensor& x, const Tensor& gain, int parts, double eps) {
  STD_TORCH_CHECK(gain.dim() == 1, op, ": gain must be (K,), got ", gain.dim(), " dimensions.");
  const int64_t K = gain.size(0);
  STD_TORCH_CHECK(K > 0 && K % kHeadStep == 0 && K <= kMaxHeadWidth, op,
                  ": the head width K must be a multiple of ", kHeadStep, " up to ", kMaxHeadWidth, ", got ",
                  K, ". Choose another implementation.");
  STD_TORCH_CHECK(
      x.dim() == 2 && x.size(1) % (parts * K) == 0 && x.size(1) < (int64_t{1} << 31) && x.stride(1) == 1, op,
      ": x must be (L, ", parts, " * N * ", K, ") with unit stride along the features, got ", x.dim(),
      " dimensions, last ", x.size(x.dim() - 1), ".");
  NormRopeArgs args{};
  args.x = x.data_ptr();
  args.num_rows = x.size(0);
  args.row_stride = x.stride(0);
  args.num_heads = static_cast<int>(x.size(1) / (parts * K));
  args.head_width = static_cast<int>(K);
  args.x_bf16 = is_bf16(op, "x", x.scalar_type());
  args.eps = static_cast<float>(eps);
  return args;
}

Tensor heads_out(const Tensor& x, const NormRopeArgs& args) {
  const std::array<int64_t, 3> shape = {args.num_rows, args.num_heads, args.head_width};
  return torch::stable::new_empty(x, shape, x.scalar_type());
}

void run_norm_rope(const char* op, const NormRopeArgs& args, const Tensor& x) {
  if (args.num_rows == 0 || args.num_heads == 0) return;
  const void* pointers[] = {args.x, args.gain[0], args.gain[1], args.cos, args.sin};
  uintptr_t low_bits = 0;
  for (const void* pointer : pointers) low_bits |= reinterpret_cast<uintptr_t>(pointer);
  const int64_t row_bytes = args.row_stride * (args.x_bf16 ? 2 : 4),
                angles = args.cos_stride | args.sin_stride;
  STD_TORCH_CHECK(low_bits % 16 == 0 && row_bytes % 16 == 0 && angles % 4 == 0, op,
                  ": operands and their rows must start on 16 bytes, got row strides of ", args.row_stride,
                  ", ", args.cos_stride, " and ", args.sin_stride, " elements and address bits ",
                  low_bits % 16, ". Call .contiguous() on a view.");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_launch(op, norm_rope_launch(args, current_stream(x.get_device_index())));
}

Tensor head_norm_cuda(Tensor x, Tensor gain, double eps) {
  NormRopeArgs args = heads_of("head_norm", x, gain, 1, eps);
  set_gain("head_norm", "gain", gain, x, args, 0);
  const Tensor out = heads_out(x, args);
  args.out[0] = out.data_ptr();
  run_norm_rope("head_norm", args, x);
  return out;
}

std::tuple<Tensor, Tensor> qk_norm_rope_cuda(Tensor qkv, Tensor q_gain, Tensor k_gain, Tensor cos, Tensor sin,
                                             double eps) {
  const char* op = "qk_norm_rope";
  NormRopeArgs args = heads_of(op, qkv, q_gain, 3, eps);
  set_gain(op, "q_gain", q_gain, qkv, args, 0);
  set_gain(op, "k_gain", k_gain, qkv, args, 1);
  args.cos = table_of_angles(op, "cos", cos, qkv, args, args.cos_stride);
  args.sin = table_of_angles(op, "sin", sin, qkv, args, args.sin_stride);
  const Tensor q = heads_out(qkv, args), k = heads_out(qkv, args);
  args.out[0] = q.data_ptr();
  args.out[1] = k.data_ptr();
  run_norm_rope(op, args, qkv);
  return {q, k};
}
#endif

#define ADALN_ARGS \
  "Tensor shift, Tensor scale, int tokens_per_frame, int token_offset, float eps, ScalarType? out=None)"
#define RESIDUAL_ARGS "Tensor x, Tensor branch, Tensor gate, Tensor[] hints, Tensor? hint_weights, "

}  // namespace

// Beside the public ops, whose schemas are in Python: each of these is one implementation, chosen by name
// there.
STABLE_TORCH_LIBRARY_FRAGMENT(cosmos_fast, m) {
  m.def("adaln_cpu(Tensor x, " ADALN_ARGS " -> Tensor");
  m.def("residual_adaln_cpu(" RESIDUAL_ARGS ADALN_ARGS " -> (Tensor, Tensor)");
#ifdef USE_CUDA
  m.def("adaln_cuda(Tensor x, " ADALN_ARGS " -> Tensor");
  m.def("residual_adaln_cuda(" RESIDUAL_ARGS ADALN_ARGS " -> (Tensor, Tensor)");
  m.def("head_norm_cuda(Tensor x, Tensor gain, float eps) -> Tensor");
  m.def(
      "qk_norm_rope_cuda(Tensor qkv, Tensor q_gain, Tensor k_gain, Tensor cos, Tensor sin, float eps) -> "
      "(Tensor, Tensor)");
#endif
}

STABLE_TORCH_LIBRARY_IMPL(cosmos_fast, CPU, m) {
  m.impl("adaln_cpu", TORCH_BOX(&adaln<run_cpu>));
  m.impl("residual_adaln_cpu", TORCH_BOX(&residual_adaln<run_cpu>));
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(cosmos_fast, CUDA, m) {
  m.impl("adaln_cuda", TORCH_BOX(&adaln<run_cuda>));
  m.impl("residual_adaln_cuda", TORCH_BOX(&residual_adaln<run_cuda>));
  m.impl("head_norm_cuda", TORCH_BOX(&head_norm_cuda));
  m.impl("qk_norm_rope_cuda", TORCH_BOX(&qk_norm_rope_cuda));
}
#endif

}  // namespace cosmos_fast

// Importing _C is what registers the ops; the module itself is empty.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
