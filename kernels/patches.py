"""Latent to patch vectors and back: `patchify`, `unpatchify`. Both only move values.

    patchify     token (t, h, w), feature (c, i, j) <- z[c, t, 2h + i, 2w + j]; then mask[t] and zeros as channels C, C+1
    unpatchify   z[c, t, 2h + i, 2w + j] <- token (t, h, w), feature (i, j, c)

Shapes: z (C, T, H, W) of any strides, mask (T,), vectors (L, 4*(C+2)) or (L, 4*C), L = T * H/2 * W/2.
Bytes at C 16, T 24, H 88, W 160: patchify bf16 23 MB, unpatchify fp32 43 MB; floors 0.008 and 0.015 ms at
2.98 TB/s, the assumed copy of one H100: launches, next to blocks of milliseconds. Writes are coalesced; reads of
neighbouring lanes share sectors that L1 keeps.
"""

from __future__ import annotations

import triton
import triton.language as tl
from cosmos_fast.kernels.launch import Config, on_device_of
from torch import Tensor

# block: tokens, and columns. Swept like adaln's.
PATCHIFY, UNPATCHIFY = Config(32, 4), Config(128, 4)


@triton.jit
def _patchify_kernel(
    z, mask, out, tokens, h_tokens, w_tokens, c_stride, t_stride, h_stride, w_stride, mask_stride,
    C: tl.constexpr, BLOCK: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    FEATURES: tl.constexpr = 4 * (C + 2)
    token = (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[:, None]
    feature = tl.arange(0, BLOCK_F)[None, :]
    keep = (token < tokens) & (feature < FEATURES)
    c, i, j = feature // 4, feature // 2 % 2, feature % 2
    t, h, w = token // (h_tokens * w_tokens), token // w_tokens % h_tokens, token % w_tokens
    source = c.to(tl.int64) * c_stride + t * t_stride + (2 * h + i) * h_stride + (2 * w + j) * w_stride
    value = tl.load(z + source, keep & (c < C), 0.0)
    known = tl.load(mask + t * mask_stride + feature * 0, keep & (c == C), 0.0)
    tl.store(out + token * FEATURES + feature, tl.where(c == C, known.to(value.dtype), value), keep)


@triton.jit
def _unpatchify_kernel(
    y, out, T, H, W, token_stride, feature_stride, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr
):
    line = tl.program_id(0).to(tl.int64)  # t * H + h
    t, h = line // H, line % H
    c = tl.arange(0, BLOCK_C)[:, None]
    w = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    keep = (c < C) & (w < W)
    token = (t * (H // 2) + h // 2) * (W // 2) + w // 2
    feature = (h % 2 * 2 + w % 2) * C + c
    value = tl.load(y + token * token_stride + feature * feature_stride, keep)
    tl.store(out + ((c.to(tl.int64) * T + t) * H + h) * W + w, value, keep)


def patchify(z: Tensor, mask: Tensor, *, config: Config = PATCHIFY) -> Tensor:
    """z (C, T, H, W), mask (T,) -> (L, 4*(C+2))."""
    C, T, H, W = z.shape
    tokens, features = T * (H // 2) * (W // 2), 4 * (C + 2)
    out = z.new_empty(tokens, features)
    if tokens:
        with on_device_of(z):
            _patchify_kernel[(triton.cdiv(tokens, config.block),)](
                z, mask, out, tokens, H // 2, W // 2, *z.stride(), mask.stride(0), C=C, BLOCK=config.block,
                BLOCK_F=triton.next_power_of_2(features), num_warps=config.warps,
            )  # fmt: skip
    return out


def unpatchify(y: Tensor, T: int, H: int, W: int, *, config: Config = UNPATCHIFY) -> Tensor:
    """y (L, 4*C) -> (C, T, H, W)."""
    C = y.shape[1] // 4
    out = y.new_empty(C, T, H, W)
    if out.numel():
        with on_device_of(y):
            _unpatchify_kernel[(T * H, triton.cdiv(W, config.block))](
                y, out, T, H, W, *y.stride(), C=C, BLOCK_C=triton.next_power_of_2(C), BLOCK=config.block,
                num_warps=config.warps,
            )  # fmt: skip
    return out
