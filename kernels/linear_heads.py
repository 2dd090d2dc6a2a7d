"""Projection to heads and the RMS norm of every head on the tile: `linear_head_norm`.

    y = n(x @ w^T),  n(a) = a * rsqrt(mean(a^2) + eps) * gain        over each head's K features

Shapes: x (L, D), w (N*K, D), contiguous, D a multiple of 8; gain (K,); y (L, N, K). A tile holds whole heads, so that a norm
needs no other tile. All in fp32 with one rounding, where separate kernels round twice. They are what computes heads whose
width is no power of two, or below 16: a tile has no such part.

At L 84480, D 2048, N 16, K 128: 0.71 TFLOP, 1.03 ms in cuBLAS on one H100 at its power limit; separate kernels move 0.69 GB more, 0.23 ms at
2.98 TB/s, the assumed copy. Rotary positions do not fit in beside the norm: cos and sin of a tile are 64 KB, and with them the
compiler needs 246 KB of shared memory and spills 80 registers (Triton 3.6), so q and k keep a kernel of their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from cosmos_fast.kernels.launch import on_device_of
from cosmos_fast.kernels.norm_rope import head_norm
from cosmos_fast.kernels.tiles import Tiles, halves, place, product, programs, read, write
from torch import Tensor

# Fastest of those recorded as exact-ways.json in bench/results/. parts is what the width of a head makes it.
HALF = Tiles(128, 256, 64, 8, 4, group=16)
# Operands twice as wide, no tensor cores: for checks, not for speed.
FULL = Tiles(32, 64, 32, 4, 2)


@triton.jit
def _store_normed(out, acc, factor, row, column, eps):
    """Head by head: registers of the one before are free when the next one is rounded."""
    K: tl.constexpr = factor.shape[0]
    if acc.shape[1] == K:
        rstd = tl.rsqrt(tl.sum(acc * acc, axis=1) / K + eps)
        out.store([row, column], (acc * rstd[:, None] * factor[None, :]).to(out.dtype))
    else:
        low, high = halves(acc)
        _store_normed(out, low, factor, row, column, eps)
        _store_normed(out, high, factor, row, column + high.shape[1], eps)


@triton.jit
def _linear_head_norm_kernel(
    x, w, out, gain, L, M, D, eps, K: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr, FLATTEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    l_tiles, m_tiles = tl.cdiv(L, BLOCK_L), tl.cdiv(M, BLOCK_M)
    for tile in tl.range(tl.program_id(0), l_tiles * m_tiles, tl.num_programs(0), flatten=FLATTEN):
        row, column = place(tile, l_tiles, m_tiles, BLOCK_L, BLOCK_M, GROUP)
        acc = product(x, w, row, column, D, BLOCK_L, BLOCK_M, BLOCK_D, PRECISION)
        factor = tl.load(gain + tl.arange(0, K)).to(tl.float32)
        _store_normed(out, acc, factor, row, column, eps)


def linear_head_norm(x: Tensor, w: Tensor, gain: Tensor, eps: float, *, tiles: Tiles | None = None) -> Tensor:
    """Norm of every head of x @ w^T: x (L, D), w (N*K, D), gain (K,) -> (L, N, K)."""
    (L, D), M, K = x.shape, w.shape[0], gain.shape[0]
    if K < 16 or K & (K - 1):
        return head_norm(F.linear(x, w), gain, eps)
    out = x.new_empty(L, M // K, K)
    if out.numel() == 0 or D == 0:
        return out.zero_()
    full = x.dtype == torch.float32
    t = tiles or (FULL if full else HALF)
    columns = max(t.m, K)
    operands = read(x, [t.l, t.d]), read(w, [columns, t.d]), write(out.view(L, M), [t.l, K])
    with on_device_of(x):
        _linear_head_norm_kernel[(programs(x, w, t),)](
            *operands, gain.contiguous(), L, M, D, eps, K=K, BLOCK_L=t.l, BLOCK_M=columns, BLOCK_D=t.d, GROUP=t.group,
            FLATTEN=t.flatten, PRECISION="ieee" if full else "tf32", num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    return out
