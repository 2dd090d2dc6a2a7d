// Which instance of adaln_kernel runs: by types, by residual, by width.
#include <string>
#include <utility>

#include "adaln.cuh"

namespace cosmos_fast {
namespace {

using Kernel = void(AdalnArgs);

struct Instance {
  const char* name;
  Kernel* kernel;
  int threads, max_width;
  bool exact;  // runs max_width only
};

// 2048 is the width of the published network: two vectors a thread in flight, four warps, no bound checks.
// The rest take the narrowest instance that holds the row.
template <typename X, typename H, bool kResidual>
constexpr Instance kInstances[] = {
    {"full2048", adaln_kernel<X, H, 128, 2, true, kResidual>, 128, 2048, true},
    {"upto2048", adaln_kernel<X, H, 256, 1, false, kResidual>, 256, 2048, false},
    {"upto8192", adaln_kernel<X, H, 256, 4, false, kResidual>, 256, kMaxCudaWidth, false},
};

template <typename F>
void with_instances(bool x_bf16, bool h_bf16, bool residual, F&& use) {
  const auto by_residual = [&]<typename X, typename H>() {
    residual ? use(kInstances<X, H, true>) : use(kInstances<X, H, false>);
  };
  if (x_bf16 && h_bf16) return by_residual.template operator()<__nv_bfloat16, __nv_bfloat16>();
  if (x_bf16) return by_residual.template operator()<__nv_bfloat16, float>();
  if (h_bf16) return by_residual.template operator()<float, __nv_bfloat16>();
  by_residual.template operator()<float, float>();
}

}  // namespace

cudaError_t adaln_launch(const AdalnArgs& args, cudaStream_t stream) {
  with_instances(args.x_bf16, args.h_bf16, args.branch != nullptr, [&](const auto& instances) {
    for (const Instance& instance : instances) {
      if (instance.exact ? args.width != instance.max_width : args.width > instance.max_width) continue;
      instance.kernel<<<static_cast<unsigned>(args.num_rows), instance.threads, 0, stream>>>(args);
      return;
    }
  });
  return cudaGetLastError();
}

void adaln_kernels(std::vector<KernelInfo>& rows) {
  for (const bool x_bf16 : {true, false})
    for (const bool h_bf16 : {true, false})
      for (const bool residual : {true, false})
        with_instances(x_bf16, h_bf16, residual, [&](const auto& instances) {
          for (const Instance& instance : instances) {
            const std::string name = std::string(residual ? "residual_adaln_" : "adaln_") + instance.name +
                                     (x_bf16 ? "_bf16" : "_fp32") + (h_bf16 ? "_bf16" : "_fp32");
            rows.push_back(describe_kernel(name, instance.kernel, instance.threads));
          }
        });
}

}  // namespace cosmos_fast
