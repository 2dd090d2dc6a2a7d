"""RMS norm over channels, SiLU, and the frames before them: what a conv of the video VAE reads, in one pass.

    out = past, then silu(x / max(|x|, 1e-12) * sqrt(C) * gamma); one row and column of zeros around every frame
    keep <- the last two frames of that, without the zeros

Shapes: x (B, C, F, H, W); gamma C values; past and keep (B, C, 2, H, W), may be the same memory, None for zeros and for
nothing to keep; out (B, C, F+2, H+2, W+2), channels last. The others are copied unless their channels are last too; x's
frames and rows may lie at any distance. fp32 inside, one rounding: to x's dtype, or to e4m3 codes in `norm_silu_fp8`.

Bytes in bf16 for 4 frames of 704x1280 and 96 channels: x, out, past twice and once more into out 2.42 GB, 0.81 ms
at the 2.98 TB/s of a copy on one H100.
A program owns a run of pixels and walks through their frames, so that it has read a pixel's history before it writes it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from cosmos_fast.kernels.launch import Config, on_device_of
from torch import Tensor


def _config(C: int) -> Config:
    """block: pixels of a program; 32 values a thread."""
    return Config(max(4096 // triton.next_power_of_2(C), 1), 4)


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit(do_not_specialize=["F", "H", "W"])
def _norm_silu_kernel(
    x, gamma, past, keep, out, F, H, W, x_frame, x_row, x_pixel, past_frame, out_frame, root, inverse,
    CODES: tl.constexpr, PAST: tl.constexpr, KEEP: tl.constexpr, C: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Channels as LOW and, if HIGH, HIGH more: 96 is no power of two, 64 and 32 are, so no lane is idle."""
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    h, w = pixel // (W + 2) - 1, pixel % (W + 2) - 1
    there = pixel < (H + 2) * (W + 2)
    inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
    low, high = tl.arange(0, LOW)[None, :], LOW + tl.arange(0, HIGH if HIGH else 1)[None, :]
    take_low, take_high = inside[:, None] & (low < C), inside[:, None] & (high < C)
    put_low, put_high = there[:, None] & (low < C), there[:, None] & (high < C)
    gain_low = tl.load(gamma + low, low < C, 0.0).to(tl.float32)
    gain_high = tl.load(gamma + high, high < C, 0.0).to(tl.float32)
    frames = tl.zeros_like(pixel)[:, None] + F
    # Pointers walk from frame to frame: a clip may have more than 2**31 values.
    x += h.to(tl.int64)[:, None] * x_row + w[:, None] * x_pixel
    out += pixel.to(tl.int64)[:, None] * C
    in_past = (h.to(tl.int64) * W + w)[:, None] * C
    past += in_past
    keep += in_past
    for i in tl.static_range(2):
        a, b = (
            tl.zeros((BLOCK, LOW), out.dtype.element_ty),
            tl.zeros((BLOCK, HIGH if HIGH else 1), out.dtype.element_ty),
        )
        if PAST:
            a = tl.load(past + i * past_frame + low, take_low, 0.0)
            b = tl.load(past + i * past_frame + high, take_high, 0.0)
        if KEEP:
            if i == 1:  # after a single new frame this is the earlier one of the two before the next
                tl.store(keep + low, a, take_low & (frames == 1))
                tl.store(keep + high, b, take_high & (frames == 1))
        tl.store(out + low, a, put_low)
        tl.store(out + high, b, put_high)
        out += out_frame
    for f in range(F):
        a = tl.load(x + low, take_low, 0.0, eviction_policy="evict_first").to(tl.float32)
        b = tl.load(x + high, take_high, 0.0, eviction_policy="evict_first").to(tl.float32)
        total = tl.sum(a * a, axis=1, keep_dims=True) + tl.sum(b * b, axis=1, keep_dims=True)
        scale = root / tl.maximum(tl.sqrt(total), 1e-12)
        a, b = _silu(a * scale * gain_low), _silu(b * scale * gain_high)
        if CODES:
            a, b = a * inverse, b * inverse
        a, b = a.to(out.dtype.element_ty), b.to(out.dtype.element_ty)
        tl.store(out + low, a, put_low)
        tl.store(out + high, b, put_high)
        if KEEP:
            slot = f + 2 - frames  # less than 0: no one needs it later
            tl.store(keep + slot * past_frame + low, a, take_low & (slot >= 0))
            tl.store(keep + slot * past_frame + high, b, take_high & (slot >= 0))
        x += x_frame
        out += out_frame


def _last(x: Tensor, dense: bool) -> Tensor:
    """(B, F, H, W, C) of x, a view if its channels are last; of dense frames if `dense`."""
    rows = x.permute(0, 2, 3, 4, 1)
    return rows if rows.is_contiguous() or (not dense and rows.stride(-1) == 1) else rows.contiguous()


def norm_silu(
    x: Tensor, gamma: Tensor, past: Tensor | None, keep: Tensor | None, *, config: Config | None = None
) -> Tensor:  # fmt: skip
    """History, then silu of the norm, with zero borders: (B, C, F, H, W) -> (B, C, F+2, H+2, W+2); fills `keep`."""
    return _norm_silu(x, gamma, None, past, keep, config)


def norm_silu_fp8(
    x: Tensor, gamma: Tensor, step: float, past: Tensor | None, keep: Tensor | None, *, config: Config | None = None
) -> Tensor:  # fmt: skip
    """The same as e4m3 codes of `step` each, past and keep too. No value may exceed 448 steps."""
    return _norm_silu(x, gamma, step, past, keep, config)


def _norm_silu(
    x: Tensor, gamma: Tensor, step: float | None, past: Tensor | None, keep: Tensor | None, config: Config | None
) -> Tensor:  # fmt: skip
    B, C, F, H, W = x.shape
    kind = x.dtype if step is None else torch.float8_e4m3fn
    out = x.new_empty(B, F + 2, H + 2, W + 2, C, dtype=kind)
    if B == 0 or C == 0:
        return out.permute(0, 4, 1, 2, 3)
    config = config or _config(C)
    low = triton.next_power_of_2(C)
    if 4 * C == 3 * low:  # 96, 192, 384
        low //= 2
    rows = _last(x, False)
    old = out if past is None else _last(past, True)
    new = out if keep is None else _last(keep, True)
    with on_device_of(x):
        for clip in range(B):
            _norm_silu_kernel[(triton.cdiv((H + 2) * (W + 2), config.block),)](
                rows[clip], gamma.reshape(-1), old[clip], new[clip], out[clip], F, H, W, *rows.stride()[1:4], H * W * C,
                (H + 2) * (W + 2) * C, C**0.5, 1 / (step or 1.0), CODES=step is not None, PAST=past is not None, KEEP=keep is not None, C=C, LOW=low,
                HIGH=max(C - low, 0), BLOCK=config.block, num_warps=config.warps,
            )  # fmt: skip
    if keep is not None and new.data_ptr() != keep.data_ptr():
        keep.copy_(new.permute(0, 4, 1, 2, 3))
    return out.permute(0, 4, 1, 2, 3)
