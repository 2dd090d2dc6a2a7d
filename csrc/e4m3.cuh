// Rounding to 8 bits, for sm_89 and later.
#pragma once

#include <cstdint>

namespace cosmos_fast {

// Four floats as e4m3, rounded to nearest, limited to +-448; the first in the lowest byte. NaN stays NaN.
__device__ __forceinline__ uint32_t e4m3x4(float a, float b, float c, float d) {
  uint32_t packed;
  asm("{\n.reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}"
      : "=r"(packed)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return packed;
}

}  // namespace cosmos_fast
