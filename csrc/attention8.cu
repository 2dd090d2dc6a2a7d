// The versions of the 8-bit attention kernel that the package holds: the fastest of the ladder in
// docs/kernels/attention8.md, dense and block-sparse.
#include "attention8_launch.cuh"

namespace cosmos_fast {
namespace {

using namespace attention8;

struct Dense : Config {
  static constexpr int warpgroups = 3, keys = 96;
  static constexpr Schedule schedule = Schedule::kOverlap;
  static constexpr bool turns = true, vote = true, late_sums = true, lean = true;
};

struct Sparse : Dense {
  static constexpr bool sparse = true;
};

struct Version {
  Attention8Version shape;
  cudaError_t (*launch)(const Attention8Args&, cudaStream_t);
  KernelInfo (*describe)();
};

template <class C>
constexpr Version version(const char* name) {
  return {{name, Plan<C>::kQueries, C::keys, C::sparse}, launch<C>, [] {
            return describe_kernel("attention8", attention8_kernel<C>, Plan<C>::kThreads);
          }};
}

constexpr Version kVersions[] = {version<Dense>("dense"), version<Sparse>("sparse")};
constexpr int kCount = sizeof(kVersions) / sizeof(kVersions[0]);

}  // namespace

std::vector<Attention8Version> attention8_versions() {
  std::vector<Attention8Version> rows;
  for (const Version& one : kVersions) rows.push_back(one.shape);
  return rows;
}

cudaError_t attention8_launch(int version, const Attention8Args& args, cudaStream_t stream) {
  if (version < 0 || version >= kCount) return cudaErrorInvalidValue;
  return kVersions[version].launch(args, stream);
}

void attention8_kernels(std::vector<KernelInfo>& rows) {
  for (const Version& one : kVersions) {
    KernelInfo row = one.describe();
    row.name += std::string("_") + one.shape.name;
    rows.push_back(row);
  }
}

}  // namespace cosmos_fast
