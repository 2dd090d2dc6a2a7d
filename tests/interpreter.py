"""Triton's interpreter with a GPU's rounding to e4m3."""

from __future__ import annotations

from typing import Any

import torch


def round_codes() -> None:
    """Have the interpreter round fp16 and fp32 to the nearest e4m3 code, ties to even, saturating, as a GPU does.

    Left alone it forgets the carry into the exponent where a mantissa rounds up to the next power of two, cuts where a
    code is subnormal and wraps around above 448.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    plain = interpreter._convert_float

    def convert(given: Any, kind: Any, wanted: Any, rounding: Any) -> Any:
        if wanted != tl.float8e4nv or kind not in (tl.float16, tl.float32):
            return plain(given, kind, wanted, rounding)
        codes = torch.from_numpy(given.copy()).clamp(-448, 448).to(torch.float8_e4m3fn)
        return codes.view(torch.uint8).numpy()

    interpreter._convert_float = convert
