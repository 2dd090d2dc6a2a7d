// One version of the kernel behind a C function, for tools/bench_attention8.py, which compiles this file once
// per rung with COSMOS_FAST_RUNG defined as the members in which it differs from Config. Not part of the
// package.
#include "attention8_launch.cuh"

namespace cosmos_fast::attention8 {
struct Rung : Config {
  COSMOS_FAST_RUNG
};
}  // namespace cosmos_fast::attention8

#define COSMOS_EXPORT extern "C" __attribute__((visibility("default")))

COSMOS_EXPORT int attention8_rung(const cosmos_fast::Attention8Args* args, void* stream) {
  using namespace cosmos_fast::attention8;
  return static_cast<int>(launch<Rung>(*args, static_cast<cudaStream_t>(stream)));
}

COSMOS_EXPORT const char* attention8_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}
