"""Latent to patch vectors and back: `patchify`, `unpatchify`. Both only move values.

    patchify     token (t, h, w), feature (c, i, j) <- z[c, t, 2h + i, 2w + j]; then mask[t] and zeros as channels C, C+1
    unpatchify   z[c, t, 2h + i, 2w + j] <- token (t, h, w), feature (i, j, c)

Shapes: z (C, T, H, W) of any strides, mask (T,), vectors (L, 4*(C+2)) or (L, 4*C), L = T * H/2 * W/2.
Bytes at C 16, T 24, H 88, W 160: patchify bf16 23 MB, unpatchify fp32 43 MB; floors 0.008 and 0.015 ms at
2.98 TB/s, the assumed copy of one H100: a copy of as many bytes is the fair measure, for starting and ending count too.

Along a row of pixels the latent is contiguous, along its features a vector is: one program reads a strip of neighbouring
tokens one way, 16 bytes at a time, turns it in shared memory and writes it the other way, 16 bytes at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from cosmos_fast.kernels.launch import on_device_of
from torch import Tensor


@dataclass(frozen=True)
class Strip:
    """What one program turns: rows of tokens, tokens of each row; warps: of 32 threads each."""

    rows: int
    tokens: int
    warps: int


# Fastest in the sweep recorded as patches.json in bench/results/.
PATCHIFY, UNPATCHIFY = Strip(1, 32, 8), Strip(4, 16, 4)


@triton.jit
def _patchify_kernel(
    z, mask, out, token_rows, H, W, c_stride, t_stride, h_stride, w_stride, mask_stride,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    FEATURES: tl.constexpr = 4 * (C + 2)
    line = tl.arange(0, ROWS * BLOCK_C * 2)[:, None]  # (row, c, i)
    column = (tl.program_id(1) * TOKENS * 2 + tl.arange(0, TOKENS * 2))[None, :]  # (w, j)
    row, c, i = tl.program_id(0) * ROWS + line // (BLOCK_C * 2), line // 2 % BLOCK_C, line % 2
    t, h = row // (H // 2), row % (H // 2)
    start = c.to(tl.int64) * c_stride + t.to(tl.int64) * t_stride + (2 * h + i) * h_stride
    value = tl.load(z + start + column * w_stride, (row < token_rows) & (c < C) & (column < W), 0.0)
    value = tl.reshape(value, (ROWS, BLOCK_C * 2, TOKENS, 2))
    value = tl.reshape(tl.permute(value, (0, 2, 1, 3)), (ROWS * TOKENS, BLOCK_C * 4))

    place = tl.arange(0, ROWS * TOKENS)[:, None]
    row, w = tl.program_id(0) * ROWS + place // TOKENS, tl.program_id(1) * TOKENS + place % TOKENS
    here = (row < token_rows) & (w < W // 2)
    to = out + (row.to(tl.int64) * (W // 2) + w) * FEATURES
    feature = tl.arange(0, BLOCK_C * 4)[None, :]
    tl.store(to + feature, value, here & (feature < 4 * C))
    flag = tl.arange(0, 8)[None, :]
    known = tl.load(mask + row // (H // 2) * mask_stride + flag * 0, here & (flag < 4), 0.0)
    tl.store(to + 4 * C + flag, known.to(out.dtype.element_ty), here)


@triton.jit
def _unpatchify_kernel(
    y, out, token_rows, T, H, W, token_stride, feature_stride,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    place = tl.arange(0, ROWS * TOKENS)[:, None]
    row, w = tl.program_id(0) * ROWS + place // TOKENS, tl.program_id(1) * TOKENS + place % TOKENS
    feature = tl.arange(0, 4 * BLOCK_C)[None, :]  # (i, j, c)
    c = feature % BLOCK_C
    start = (row.to(tl.int64) * (W // 2) + w) * token_stride
    keep = (row < token_rows) & (w < W // 2) & (c < C)
    value = tl.load(y + start + (feature // BLOCK_C * C + c) * feature_stride, keep, 0.0)
    value = tl.reshape(value, (ROWS, TOKENS, 2, 2, BLOCK_C))
    value = tl.reshape(tl.permute(value, (0, 4, 2, 1, 3)), (ROWS * BLOCK_C * 2, TOKENS * 2))

    line = tl.arange(0, ROWS * BLOCK_C * 2)[:, None]  # (row, c, i)
    column = (tl.program_id(1) * TOKENS * 2 + tl.arange(0, TOKENS * 2))[None, :]  # (w, j)
    row, c, i = tl.program_id(0) * ROWS + line // (BLOCK_C * 2), line // 2 % BLOCK_C, line % 2
    t, h = row // (H // 2), row % (H // 2)
    start = ((c.to(tl.int64) * T + t) * H + 2 * h + i) * W
    tl.store(out + start + column, value, (row < token_rows) & (c < C) & (column < W))


def _grid(token_rows: int, W: int, strip: Strip) -> tuple[int, int]:
    return triton.cdiv(token_rows, strip.rows), triton.cdiv(W // 2, strip.tokens)


def patchify(z: Tensor, mask: Tensor, *, strip: Strip = PATCHIFY) -> Tensor:
    """z (C, T, H, W), mask (T,) -> (L, 4*(C+2))."""
    C, T, H, W = z.shape
    token_rows = T * (H // 2)
    out = z.new_empty(token_rows * (W // 2), 4 * (C + 2))
    if out.numel():
        with on_device_of(z):
            _patchify_kernel[_grid(token_rows, W, strip)](
                z, mask, out, token_rows, H, W, *z.stride(), mask.stride(0), C=C, BLOCK_C=triton.next_power_of_2(C),
                ROWS=strip.rows, TOKENS=strip.tokens, num_warps=strip.warps,
            )  # fmt: skip
    return out


def unpatchify(y: Tensor, T: int, H: int, W: int, *, strip: Strip = UNPATCHIFY) -> Tensor:
    """y (L, 4*C) -> (C, T, H, W)."""
    C, token_rows = y.shape[1] // 4, T * (H // 2)
    out = y.new_empty(C, T, H, W)
    if out.numel():
        with on_device_of(y):
            _unpatchify_kernel[_grid(token_rows, W, strip)](
                y, out, token_rows, T, H, W, *y.stride(), C=C, BLOCK_C=triton.next_power_of_2(C),
                ROWS=strip.rows, TOKENS=strip.tokens, num_warps=strip.warps,
            )  # fmt: skip
    return out
