// attention8_cuda: the checks that stand between Python and attention8.h.
#include "attention8.h"

#include <array>
#include <tuple>

#include "common.h"

namespace cosmos_fast {
namespace {

constexpr const char* kOp = "attention8";

// rows: the first axis may step by any multiple of 16 elements.
void check_on(const Tensor& x, const Tensor& q, const char* what, int alignment = 16, bool rows = false) {
  const bool apart =
      rows && x.numel() > 0 && x.stride(2) == 1 && x.stride(1) == x.size(2) && x.stride(0) % 16 == 0;
  const bool dense = x.is_contiguous() || apart;
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == q.get_device_index() && dense &&
                      reinterpret_cast<uintptr_t>(x.data_ptr()) % alignment == 0,
                  kOp, ": ", what, rows ? " must have dense heads" : " must be contiguous",
                  " on q's device and start on ", alignment, " bytes, got ",
                  dense ? "another device or a view" : "strides", ". Call .clone().");
}

// Elements from token to token. A single one may come with any stride, which nothing may rely on.
int64_t row_of(const Tensor& x) { return x.is_contiguous() ? x.size(1) * x.size(2) : x.stride(0); }

const void* codes_of(const Tensor& x, const Tensor& q, const char* what, std::array<int64_t, 3> shape,
                     bool rows = false) {
  bool fits = x.dim() == 3 && x.scalar_type() == ScalarType::Float8_e4m3fn;
  for (int i = 0; fits && i < 3; ++i) fits = x.size(i) == shape[i];
  STD_TORCH_CHECK(fits, kOp, ": ", what, " must be float8_e4m3fn (", shape[0], ", ", shape[1], ", ", shape[2],
                  "), got ", x.dim(), " dimensions and ", x.numel(), " elements.");
  check_on(x, q, what, 16, rows);
  return x.data_ptr();
}

const float* floats_of(const Tensor& x, const Tensor& q, const char* what, int64_t count,
                       int alignment = 16) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.numel() == count, kOp, ": ", what, " must be ",
                  count, " float32 values, got ", x.numel(), " of ", type_name(x.scalar_type()), ".");
  check_on(x, q, what, alignment);
  return static_cast<const float*>(x.data_ptr());
}

const int* ints_of(const Tensor& x, const Tensor& q, const char* what, int64_t heads, int64_t tiles,
                   int dims) {
  STD_TORCH_CHECK(
      x.scalar_type() == ScalarType::Int && x.dim() == dims && x.size(0) == heads && x.size(1) == tiles, kOp,
      ": ", what, " must be int32 (", heads, ", ", tiles, dims == 3 ? ", capacity)" : ")", ", got ", x.dim(),
      " dimensions and ", x.numel(), " elements.");
  check_on(x, q, what);
  return static_cast<const int*>(x.data_ptr());
}

int version_of(bool sparse, Attention8Version& found) {
  const auto versions = attention8_versions();
  for (size_t i = 0; i < versions.size(); ++i)
    if (versions[i].sparse == sparse) return found = versions[i], static_cast<int>(i);
  STD_TORCH_CHECK(false, kOp, ": no version was built, got sparse ", sparse, ".");
}

// Entries of key_tiles must name tiles of k: they are not read here. With an out_step the result is e4m3
// codes.
std::tuple<Tensor, Tensor> attention8_cuda(Tensor q, Tensor k, Tensor v, Tensor score_step, Tensor v_step,
                                           Tensor v_mean, std::optional<Tensor> key_tiles,
                                           std::optional<Tensor> key_counts, std::optional<Tensor> out_step) {
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && q.size(2) == kAttention8Width, kOp,
                  ": q must be (L, N, 128) and k (S, N, 128), got ", q.dim(), " and ", k.dim(),
                  " dimensions, the last of q ", q.size(q.dim() - 1), ".");
  STD_TORCH_CHECK(key_tiles.has_value() == key_counts.has_value(), kOp,
                  ": key_tiles and key_counts must come together, got one of them.");
  const int64_t L = q.size(0), S = k.size(0), N = q.size(1), columns = (S + 15) / 16 * 16;
  STD_TORCH_CHECK(S > 0 && L < (int64_t{1} << 31) && S < (int64_t{1} << 31) - 256, kOp,
                  ": there must be 1 to 2^31 - 257 keys and fewer than 2^31 queries, got ", S, " and ", L,
                  ".");
  Attention8Version version{};
  const int number = version_of(key_tiles.has_value(), version);
  Attention8Args args{};
  args.q = codes_of(q, q, "q", {L, N, kAttention8Width}, true);
  args.k = codes_of(k, q, "k", {S, N, kAttention8Width}, true);
  args.v = codes_of(v, q, "v", {N, kAttention8Width, columns});
  // One value read alone, and the last of three that a kernel makes (ops_attention8.qkv_codes).
  args.q_scale = floats_of(score_step, q, "score_step", 1, sizeof(float));
  args.v_scale = floats_of(v_step, q, "v_step", N * kAttention8Width);
  args.v_mean = floats_of(v_mean, q, "v_mean", N * kAttention8Width);
  if (key_tiles.has_value()) {
    const int64_t tiles = (L + version.queries - 1) / version.queries;
    args.key_tiles = ints_of(*key_tiles, q, "key_tiles", N, tiles, 3);
    args.key_counts = ints_of(*key_counts, q, "key_counts", N, tiles, 2);
    args.key_capacity = static_cast<int>(key_tiles->size(2));
  }
  if (out_step.has_value()) args.out_step = floats_of(*out_step, q, "out_step", 1, sizeof(float));
  const Tensor out = empty_as(q, args.out_step ? ScalarType::Float8_e4m3fn : ScalarType::BFloat16);
  const std::array<int64_t, 2> rows = {N, L};
  const Tensor lse = torch::stable::new_empty(q, rows, ScalarType::Float);
  args.out = out.data_ptr();
  args.lse = static_cast<float*>(lse.data_ptr());
  args.num_queries = L;
  args.num_keys = S;
  args.num_heads = static_cast<int>(N);
  args.q_row = row_of(q);
  args.k_row = row_of(k);
  args.out_row = N * kAttention8Width;
  args.q_head = args.k_head = args.out_head = kAttention8Width;
  args.v_row = columns;
  args.softmax_scale = 1.0f;
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  check_launch(kOp, attention8_launch(number, args, current_stream(q.get_device_index())));
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cosmos_fast, m) {
  m.def(
      "attention8_cuda(Tensor q, Tensor k, Tensor v, Tensor score_step, Tensor v_step, Tensor v_mean, "
      "Tensor? key_tiles=None, Tensor? key_counts=None, Tensor? out_step=None) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(cosmos_fast, CUDA, m) { m.impl("attention8_cuda", TORCH_BOX(&attention8_cuda)); }

}  // namespace cosmos_fast
