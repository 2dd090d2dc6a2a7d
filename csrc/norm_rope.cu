// Which instance of norm_rope_kernel runs: by type, by rotation, by head width.
#include <string>

#include "norm_rope.cuh"

namespace cosmos_fast {
namespace {

using Kernel = void(NormRopeArgs);

struct Instance {
  const char* name;
  Kernel* kernel;
  int max_width, heads_step;  // heads_step 0: any width up to max_width and any number of heads
};

// 128 is the head width of the published network, which has 16 heads. The rest take the narrowest instance
// that holds the head.
template <typename X, bool kRope>
constexpr Instance kInstances[] = {
    {"full128", norm_rope_kernel<X, 8, true, kRope>, 128, 4 * kSlots<X>},
    {"upto128", norm_rope_kernel<X, 8, false, kRope>, 128, 0},
    {"upto256", norm_rope_kernel<X, 16, false, kRope>, kMaxHeadWidth, 0},
};

template <typename F>
void with_instances(bool x_bf16, bool rope, F&& use) {
  if (x_bf16) return rope ? use(kInstances<__nv_bfloat16, true>) : use(kInstances<__nv_bfloat16, false>);
  rope ? use(kInstances<float, true>) : use(kInstances<float, false>);
}

}  // namespace

cudaError_t norm_rope_launch(const NormRopeArgs& args, cudaStream_t stream) {
  constexpr int kWarps = kNormRopeThreads / 32;
  const bool rope = args.cos != nullptr;
  const int64_t blocks = (args.num_rows * (rope ? 2 : 1) + kWarps - 1) / kWarps;
  with_instances(args.x_bf16, rope, [&](const auto& instances) {
    for (const Instance& instance : instances) {
      if (args.head_width > instance.max_width) continue;
      if (instance.heads_step != 0 &&
          (args.head_width != instance.max_width || args.num_heads % instance.heads_step != 0))
        continue;
      instance.kernel<<<static_cast<unsigned>(blocks), kNormRopeThreads, 0, stream>>>(args);
      return;
    }
  });
  return cudaGetLastError();
}

void norm_rope_kernels(std::vector<KernelInfo>& rows) {
  for (const bool x_bf16 : {true, false})
    for (const bool rope : {true, false})
      with_instances(x_bf16, rope, [&](const auto& instances) {
        for (const Instance& instance : instances) {
          const std::string name = std::string(rope ? "qk_norm_rope_" : "head_norm_") + instance.name;
          rows.push_back(
              describe_kernel(name + (x_bf16 ? "_bf16" : "_fp32"), instance.kernel, kNormRopeThreads));
        }
      });
}

}  // namespace cosmos_fast
