"""Product of 8-bit rows, exact-erf GELU and rounding to 8 bits again in one kernel: the first layer of an 8-bit MLP.

    code = gelu(sum_d a_ld w_md * a_step_l * w_step_m) / step_l

Shapes: a (L, D), w (M, D) e4m3, a_steps, steps (L,), w_steps (M,) fp32, code (L, M) e4m3; D and M multiples of 16. `step`
is known before the product (`ops_linear8`), so no tile waits for another.

At L 84480, D 2048, M 8192: 2.83 TFLOP, 2.1 ms at the 1,350 TFLOP/s of torch's scaled product; 0.88 GB. In two kernels
the hidden layer is written in bf16 and read again, 2.8 GB more. A tile of 128 x 256 multiplies for 16,400 clocks and
needs 3,600 more for GELU and rounding where nothing overlaps them. Smaller tiles, two to a multiprocessor, could let one
multiply while the other rounds, but measured 2.808 ms against TILES' 2.724 (1041 TFLOP/s) on one H100.
"""

from __future__ import annotations

import triton
import triton.language as tl
from cosmos_fast.kernels.launch import on_device_of
from cosmos_fast.kernels.quantise import short_gelu
from cosmos_fast.kernels.tiles import Tiles, halves, place, product, programs, read, write
from torch import Tensor

TILES = Tiles(128, 256, 128, 8, 4, group=16, parts=4)


@triton.jit
def _store(out, acc, a_step, inverse, w_steps, row, column, M, PARTS: tl.constexpr):
    """In halves of the columns, down to PARTS: registers of the piece before are free when the next one is rounded."""
    if PARTS == 1:
        cols = column + tl.arange(0, acc.shape[1])
        w_step = tl.load(w_steps + cols, cols < M, 0.0)
        code = short_gelu(acc * a_step[:, None] * w_step[None, :]) * inverse[:, None]
        out.store([row, column], code.to(out.dtype))
    else:
        low, high = halves(acc)
        _store(out, low, a_step, inverse, w_steps, row, column, M, PARTS // 2)
        _store(out, high, a_step, inverse, w_steps, row, column + high.shape[1], M, PARTS // 2)


@triton.jit
def _linear_gelu_fp8_kernel(
    a, w, out, a_steps, steps, w_steps, L, M, D, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    l_tiles, m_tiles = tl.cdiv(L, BLOCK_L), tl.cdiv(M, BLOCK_M)
    for tile in tl.range(tl.program_id(0), l_tiles * m_tiles, tl.num_programs(0), flatten=FLATTEN):
        row, column = place(tile, l_tiles, m_tiles, BLOCK_L, BLOCK_M, GROUP)
        acc = product(a, w, row, column, D, BLOCK_L, BLOCK_M, BLOCK_D, "tf32")
        at = row + tl.arange(0, BLOCK_L)
        a_step = tl.load(a_steps + at, at < L, 0.0)
        inverse = 1.0 / tl.load(steps + at, at < L, 1.0)
        _store(out, acc, a_step, inverse, w_steps, row, column, M, PARTS)


def linear_gelu_fp8(
    a: Tensor, a_steps: Tensor, steps: Tensor, w: Tensor, w_steps: Tensor, *, tiles: Tiles = TILES
) -> Tensor:
    """Codes (L, M) of gelu(a w^T). Shapes as above."""
    (L, D), M, t = a.shape, w.shape[0], tiles
    out = a.new_empty(L, M)
    if out.numel() == 0:
        return out
    blocks = read(a, [t.l, t.d]), read(w, [t.m, t.d]), write(out, [t.l, t.m // t.parts])
    with on_device_of(a):
        _linear_gelu_fp8_kernel[(programs(a, w, t),)](
            *blocks, a_steps, steps, w_steps, L, M, D, BLOCK_L=t.l, BLOCK_M=t.m, BLOCK_D=t.d, GROUP=t.group,
            PARTS=t.parts, FLATTEN=t.flatten, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    return out
