// linear_gelu as raw pointers and sizes:  out = gelu(x @ w^T), exact erf form, one rounding to bf16.
// Shape letters: L rows (tokens), D width, M features.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace cosmos_fast {

struct LinearGeluArgs {
  const void* x;  // (L, D) bf16, contiguous, 16-byte aligned
  const void* w;  // (M, D) likewise
  void* out;      // (L, M) likewise
  int64_t num_rows, num_features, width;
};

// How a launch is cut: `instance` is a row of the table in linear_gelu.cu; `swizzle` tiles of the shorter
// side go together, so that their operands stay in L2; `along` is the axis that neighbouring tiles follow: 0
// as CUTLASS chooses, 1 L, 2 M.
struct LinearGeluChoice {
  int instance = 0, swizzle = 1, along = 0;
};

// D and M multiples of 8, D positive. Current device, which has `num_sms` multiprocessors. Null, or what is
// wrong.
const char* linear_gelu_launch(const LinearGeluArgs& args, const LinearGeluChoice& choice, int num_sms,
                               cudaStream_t stream);

}  // namespace cosmos_fast
