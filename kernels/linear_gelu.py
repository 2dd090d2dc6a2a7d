"""Linear layer without bias and exact-erf GELU in one kernel: out = gelu(x @ w^T).

Shapes: x (L, D), w (M, D), out (L, M), all contiguous; D and M multiples of 8. Products and GELU in fp32, one
rounding: the published network rounds once more, before GELU, so this is nearer to exact arithmetic than it is.

At L 84480, D 2048, M 8192: 2.83 TFLOP, 3.9 ms at the 732 TFLOP/s that cuBLAS sustains there on one H100, which is also
the floor; 1.76 GB in bf16. Separate kernels write and read the 1.38 GB between them once more.

GELU costs 14 instructions a value:
    gelu(x) = max(x, 0) - a * 2^-Q(a),   a = |x|,   2^-Q(a) = erfc(a / sqrt(2)) / 2
Q is smooth and close to a parabola; a polynomial of degree 10, fitted to it on [0, 10.5] with weights that make the error
of a * 2^-Q even, leaves 2.5e-7 at most in the result (half an ulp of the largest values it occurs at; erf in fp32, as torch
computes GELU, leaves 1.2e-6) and 7e-4 relative in the tail below -4, where x * (1 + erf) in fp32 has no digit left.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from cosmos_fast.kernels.launch import on_device_of
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True)
class Tiles:
    """One program's tile: rows of x, rows of w, depth of a step; `group` tiles along L share their rows of w in L2.

    parts: pieces of the tile's features that are rounded and stored one after the other. programs: at most so many,
    each with tiles of its own in turn; None: one per multiprocessor.
    """

    l: int
    m: int
    d: int
    warps: int
    stages: int
    group: int = 8
    parts: int = 2
    flatten: bool = True
    programs: int | None = None


# Fastest of the sweep recorded as linear-gelu.json in bench/results/.
HALF = Tiles(128, 256, 64, 8, 4)
# Operands twice as wide, no tensor cores: for checks, not for speed.
FULL = Tiles(32, 64, 32, 4, 2)


@triton.jit
def _gelu(x):
    a = tl.minimum(tl.abs(x), 10.5)
    q = 2.485452954559264e-09 * a - 1.1573083469329504e-07
    q = q * a + 2.17055367102148e-06
    q = q * a - 1.985527887882199e-05
    q = q * a + 6.479019793914631e-05
    q = q * a + 0.0004916578182019293
    q = q * a - 0.0076155452989041805
    q = q * a + 0.05295684561133385
    q = q * a + 0.45901602506637573
    q = q * a + 1.1511386632919312
    q = q * a + 0.9999983906745911
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - a * tl.exp2(-q)


@triton.jit
def _store_gelu(out, acc, row, column, PARTS: tl.constexpr):
    """In halves of the columns, down to PARTS: registers of the piece before are free when the next one is rounded."""
    if PARTS == 1:
        out.store([row, column], _gelu(acc).to(out.dtype))
    else:
        ROWS: tl.constexpr = acc.shape[0]
        HALF: tl.constexpr = acc.shape[1] // 2
        low, high = tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, HALF)), (0, 2, 1)))
        _store_gelu(out, low, row, column, PARTS // 2)
        _store_gelu(out, high, row, column + HALF, PARTS // 2)


@triton.jit
def _linear_gelu_kernel(
    x, w, out, L, M, D, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, FLATTEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    l_tiles, m_tiles = tl.cdiv(L, BLOCK_L), tl.cdiv(M, BLOCK_M)
    for tile in tl.range(tl.program_id(0), l_tiles * m_tiles, tl.num_programs(0), flatten=FLATTEN):
        first = tile // (GROUP * m_tiles) * GROUP
        size = min(l_tiles - first, GROUP)
        row = (first + tile % (GROUP * m_tiles) % size) * BLOCK_L
        column = tile % (GROUP * m_tiles) // size * BLOCK_M
        acc = tl.zeros((BLOCK_L, BLOCK_M), tl.float32)
        for step in range(tl.cdiv(D, BLOCK_D)):
            rows, features = x.load([row, step * BLOCK_D]), w.load([column, step * BLOCK_D])
            acc = tl.dot(rows, features.T, acc, input_precision=PRECISION)
        _store_gelu(out, acc, row, column, PARTS)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _aligned(x: Tensor) -> Tensor:
    """The copy engine reads from multiples of 16 bytes only; a view may start elsewhere."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def linear_gelu(x: Tensor, w: Tensor, *, tiles: Tiles | None = None) -> Tensor:
    """gelu(x @ w^T): x (L, D), w (M, D) -> (L, M)."""
    (L, D), M = x.shape, w.shape[0]
    out = x.new_empty(L, M)
    if out.numel() == 0 or D == 0:
        return out.zero_()
    full = x.dtype == torch.float32
    t = tiles or (FULL if full else HALF)
    count = triton.cdiv(L, t.l) * triton.cdiv(M, t.m)
    most = t.programs or (_multiprocessors(x.device) if x.is_cuda else 4)
    operands = (
        TensorDescriptor.from_tensor(_aligned(x), [t.l, t.d]),
        TensorDescriptor.from_tensor(_aligned(w), [t.m, t.d]),
        TensorDescriptor.from_tensor(out, [t.l, t.m // t.parts]),
    )
    with on_device_of(x):
        _linear_gelu_kernel[(min(count, most),)](
            *operands, L, M, D, BLOCK_L=t.l, BLOCK_M=t.m, BLOCK_D=t.d, GROUP=t.group, PARTS=t.parts,
            FLATTEN=t.flatten, PRECISION="ieee" if full else "tf32", num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    return out
