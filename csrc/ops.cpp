// PyInit__C, the registration table, and the checks that stand between Python and raw pointers.
#include <Python.h>

#include <tuple>
#include <vector>

#include "adaln.h"
#include "common.h"

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
}
#endif

}  // namespace cosmos_fast

// Importing _C is what registers the ops; the module itself is empty.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
