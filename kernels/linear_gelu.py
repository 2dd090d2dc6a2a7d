"""Linear layer without bias and exact-erf GELU in one kernel: out = gelu(x @ w^T).

Shapes: x (L, D), w (M, D), out (L, M), all contiguous; D and M multiples of 8. Products and GELU in fp32, one
rounding: the published network rounds once more, before GELU, so this is nearer to exact arithmetic than it is.

At L 84480, D 2048, M 8192: 2.83 TFLOP, 3.9 ms at the 732 TFLOP/s that cuBLAS sustains there on one H100, which is also
the floor; 1.76 GB in bf16. Separate kernels write and read the 1.38 GB between them once more.

While a tile's GELU is computed, its tensor cores wait, so every instruction a value costs counts. With a = |x|:
    gelu(x) = max(x, 0) - a * 2^-Q(a),   2^-Q(a) = erfc(a / sqrt(2)) / 2
Q is smooth and close to a parabola, so that a polynomial in fp32 takes its place:
    half precision: degree 5, fitted on [0, 6.5]; 5.5e-6 at most in the result, 1/50 of half an ulp of bf16 where the result is
        above 1e-3 in size. 9 instructions a value.
    fp32: degree 10, fitted on [0, 10.5] with weights that make the error even; 2.5e-7 at most in the result (half an ulp of
        the largest values it occurs at; erf in fp32, as torch computes GELU, leaves 1.2e-6) and 7e-4 relative in the tail below
        -4, where x * (1 + erf) in fp32 has no digit left. 14 instructions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from cosmos_fast.kernels.launch import on_device_of
from cosmos_fast.kernels.tiles import Tiles, halves, place, product, programs, read, write
from torch import Tensor

# Fastest of the sweep recorded as linear-gelu.json in bench/results/.
HALF = Tiles(128, 256, 64, 8, 4)
# Operands twice as wide, no tensor cores: for checks, not for speed.
FULL = Tiles(32, 64, 32, 4, 2)


@triton.jit
def _gelu(x, FINE: tl.constexpr):
    # p is -Q: a sign in the constants costs nothing.
    if FINE:
        a = tl.minimum(tl.abs(x), 10.5)
        p = -2.485452954559264e-09 * a + 1.1573083469329504e-07
        p = p * a - 2.17055367102148e-06
        p = p * a + 1.985527887882199e-05
        p = p * a - 6.479019793914631e-05
        p = p * a - 0.0004916578182019293
        p = p * a + 0.0076155452989041805
        p = p * a - 0.05295684561133385
        p = p * a - 0.45901602506637573
        p = p * a - 1.1511386632919312
        p = p * a - 0.9999983906745911
    else:
        a = tl.minimum(tl.abs(x), 6.5)
        p = -0.00038586664595641196 * a + 0.0064245183020830154
        p = p * a - 0.0501236617565155
        p = p * a - 0.4617270827293396
        p = p * a - 1.1502166986465454
        p = p * a - 1.0000512599945068
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - a * tl.exp2(p)


@triton.jit
def _store_gelu(out, acc, row, column, PARTS: tl.constexpr, FINE: tl.constexpr):
    """In halves of the columns, down to PARTS: registers of the piece before are free when the next one is rounded."""
    if PARTS == 1:
        out.store([row, column], _gelu(acc, FINE).to(out.dtype))
    else:
        low, high = halves(acc)
        _store_gelu(out, low, row, column, PARTS // 2, FINE)
        _store_gelu(out, high, row, column + high.shape[1], PARTS // 2, FINE)


@triton.jit
def _linear_gelu_kernel(
    x, w, out, L, M, D, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, FLATTEN: tl.constexpr, PRECISION: tl.constexpr, FINE: tl.constexpr,
):  # fmt: skip
    l_tiles, m_tiles = tl.cdiv(L, BLOCK_L), tl.cdiv(M, BLOCK_M)
    for tile in tl.range(tl.program_id(0), l_tiles * m_tiles, tl.num_programs(0), flatten=FLATTEN):
        row, column = place(tile, l_tiles, m_tiles, BLOCK_L, BLOCK_M, GROUP)
        acc = product(x, w, row, column, D, BLOCK_L, BLOCK_M, BLOCK_D, PRECISION)
        _store_gelu(out, acc, row, column, PARTS, FINE)


def linear_gelu(x: Tensor, w: Tensor, *, tiles: Tiles | None = None, fine: bool | None = None) -> Tensor:
    """gelu(x @ w^T): x (L, D), w (M, D) -> (L, M). fine: which polynomial; None: the one that the dtype needs."""
    (L, D), M = x.shape, w.shape[0]
    out = x.new_empty(L, M)
    if out.numel() == 0 or D == 0:
        return out.zero_()
    full = x.dtype == torch.float32
    t = tiles or (FULL if full else HALF)
    operands = read(x, [t.l, t.d]), read(w, [t.m, t.d]), write(out, [t.l, t.m // t.parts])
    with on_device_of(x):
        _linear_gelu_kernel[(programs(x, w, t),)](
            *operands, L, M, D, BLOCK_L=t.l, BLOCK_M=t.m, BLOCK_D=t.d, GROUP=t.group, PARTS=t.parts,
            FLATTEN=t.flatten, PRECISION="ieee" if full else "tf32", FINE=full if fine is None else fine,
            num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    return out
