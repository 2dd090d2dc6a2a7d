// _host: what is not a tensor op. Facts of this build, and what the compiler made of each CUDA kernel.
#include <pybind11/pybind11.h>

#include <string>

#ifdef USE_CUDA
#include "adaln.h"
#include "attention8.h"
#include "norm_rope.h"
#include "qk_codes.h"
#endif

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["mode"] = BUILD_MODE;
  info["torch"] = BUILD_TORCH;
  info["compiler"] = BUILD_CXX;
#ifdef USE_CUDA
  info["archs"] = BUILD_ARCHS;
  info["nvcc"] = BUILD_NVCC;
#endif
  return info;
}

py::list kernel_info() {
  py::list rows;
#ifdef USE_CUDA
  std::vector<cosmos_fast::KernelInfo> found;
  cosmos_fast::adaln_kernels(found);
  cosmos_fast::norm_rope_kernels(found);
  cosmos_fast::qk_codes_kernels(found);
  cosmos_fast::attention8_kernels(found);
  for (const auto& kernel : found) {
    py::dict row;
    row["name"] = kernel.name;
    row["threads"] = kernel.threads;
    if (!kernel.error.empty()) {
      row["error"] = kernel.error;
    } else {
      row["registers"] = kernel.registers;
      row["local_bytes"] = kernel.local_bytes;
      row["shared_bytes"] = kernel.shared_bytes;
      row["blocks_per_sm"] = kernel.blocks_per_sm;
    }
    rows.append(row);
  }
#endif
  return rows;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build facts and kernel resources of the compiled half.";
  m.def("build_info", &build_info, "mode, torch and compilers; archs and nvcc in mode cuda");
  m.def("kernel_info", &kernel_info,
        "per CUDA kernel: threads, registers, local and shared bytes, blocks per SM");
}
