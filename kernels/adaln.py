"""Residual stream and modulated LayerNorm in one pass: `residual_adaln`, and its two halves alone.

    x' = x + gate[frame] * branch + sum_j w_j * hint_j        rounded to x's dtype; J = 0..4 hints
    h  = (x' - mean) * rsqrt(var + eps) * (1 + scale[frame]) + shift[frame]      statistics of the rounded x'

`adaln_fp8` and `residual_adaln_fp8` give h as e4m3 codes and a step for each row, its norm over 448: the row is in registers.

Shapes: x, branch, hint_j, x', h (L, D); step (L,) fp32; gate, shift, scale (R, D), rows may be strided; w (J, 1) or (J, L)
fp32; frame = (token_offset + token) // tokens_per_frame.

Bytes in bf16 at L 84480, D 2048 (346 MB per tensor) and floor at 2.98 TB/s, the assumed copy of one H100:
    adaln            x, h                  0.69 GB   0.232 ms
    residual         x, branch, x'         1.04 GB   0.348 ms
    residual_adaln   x, branch, x', h      1.38 GB   0.464 ms
    each hint        hint_j                0.35 GB   0.116 ms more
    ..._fp8          h of half the bytes   0.17 GB   0.058 ms less
The tables stay in L2. One program holds one row in fp32 registers from its only read to its only write, so
J costs loads in flight but no registers that live on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from cosmos_fast.kernels.launch import Config, on_device_of
from cosmos_fast.kernels.quantise import step_of
from torch import Tensor

MAX_HINTS = 4


def _config(D: int) -> Config:
    """The whole row in one program; 16 values a thread (two 16-byte loads per bf16 tensor) at width 2048.

    Within 3 % of the best of a sweep on compute capability 9.0,
    bench/results/nvidia-h100-80gb-hbm3/2026-11-22-077d881-kernels.json.
    """
    block = triton.next_power_of_2(D)
    return Config(block, min(max(block // 512, 1), 8))


@triton.jit
def _add_hint(total, hint, weights, row, start, cols, keep, stride_row):
    weight = tl.load(weights + row * stride_row)
    return total + weight * tl.load(hint + start + cols, keep, 0.0, eviction_policy="evict_first").to(
        tl.float32
    )


@triton.jit
def _adaln_kernel(
    x, branch, gate, hint_0, hint_1, hint_2, hint_3, weights, shift, scale, x_out, h_out, step_out,
    tokens_per_frame, token_offset, gate_stride, shift_stride, scale_stride, weight_stride_hint, weight_stride_row, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, J: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr,
    CODES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    frame = (row + token_offset) // tokens_per_frame
    start = row * D
    cols = tl.arange(0, BLOCK)
    keep = cols < D
    total = tl.load(x + start + cols, keep, 0.0, eviction_policy="evict_first").to(tl.float32)
    if RESIDUAL:
        added = tl.load(branch + start + cols, keep, 0.0, eviction_policy="evict_first").to(tl.float32)
        amount = tl.load(gate + frame * gate_stride + cols, keep, 0.0, eviction_policy="evict_last")
        total += amount.to(tl.float32) * added
        if J > 0:
            total = _add_hint(total, hint_0, weights, row, start, cols, keep, weight_stride_row)
        if J > 1:
            at = weights + weight_stride_hint
            total = _add_hint(total, hint_1, at, row, start, cols, keep, weight_stride_row)
        if J > 2:
            at = weights + 2 * weight_stride_hint
            total = _add_hint(total, hint_2, at, row, start, cols, keep, weight_stride_row)
        if J > 3:
            at = weights + 3 * weight_stride_hint
            total = _add_hint(total, hint_3, at, row, start, cols, keep, weight_stride_row)
        rounded = total.to(x_out.dtype.element_ty)
        tl.store(x_out + start + cols, rounded, keep)
        total = rounded.to(tl.float32)
    if NORM:
        mean = tl.sum(total, axis=0) / D
        # Deviations in a second pass over registers: exact for rows with a large mean.
        deviation = tl.where(keep, total - mean, 0.0)
        variance = tl.sum(deviation * deviation, axis=0) / D
        rstd = tl.rsqrt(variance + eps)
        gain = tl.load(scale + frame * scale_stride + cols, keep, 0.0, eviction_policy="evict_last")
        bias = tl.load(shift + frame * shift_stride + cols, keep, 0.0, eviction_policy="evict_last")
        h = deviation * rstd * (1.0 + gain.to(tl.float32)) + bias.to(tl.float32)
        if CODES:
            step = step_of(h)  # columns beyond D are zeros: so are their deviation and bias
            tl.store(step_out + row, step)
            h *= 1.0 / step
        tl.store(h_out + start + cols, h.to(h_out.dtype.element_ty), keep)


def _launch(
    x: Tensor, branch: Tensor, gate: Tensor, hints: Sequence[Tensor], weights: Tensor | None, shift: Tensor, scale: Tensor,
    x_out: Tensor, h_out: Tensor, tokens_per_frame: int, token_offset: int, eps: float,
    residual: bool, norm: bool, config: Config | None, steps: Tensor | None = None,
) -> None:  # fmt: skip
    if len(hints) > MAX_HINTS:
        raise ValueError(f"residual: at most {MAX_HINTS} hints, got {len(hints)}. One per control branch.")
    L, D = x.shape
    if L == 0:
        return
    config = config or _config(D)
    padded = (*hints, *(x for _ in range(MAX_HINTS - len(hints))))
    w = x if weights is None else weights
    w_strides = (0, 0) if weights is None else (w.stride(0), 0 if w.shape[1] == 1 else w.stride(1))
    with on_device_of(x):
        _adaln_kernel[(L,)](
            x, branch, gate, *padded, w, shift, scale, x_out, h_out, x_out if steps is None else steps,
            tokens_per_frame, token_offset, gate.stride(0), shift.stride(0), scale.stride(0), *w_strides, eps,
            D=D, BLOCK=config.block, J=len(hints), RESIDUAL=residual, NORM=norm,
            CODES=steps is not None, num_warps=config.warps,
        )  # fmt: skip


def adaln(
    x: Tensor, shift: Tensor, scale: Tensor, tokens_per_frame: int, token_offset: int, eps: float, out: torch.dtype,
    *, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """ln(x) * (1 + scale[frame]) + shift[frame], in dtype `out`. Shapes as above."""
    h = torch.empty_like(x, dtype=out)
    _launch(
        x, x, shift, (), None, shift, scale, x, h, tokens_per_frame, token_offset, eps, False, True, config
    )
    return h


def residual(
    x: Tensor, branch: Tensor, gate: Tensor, hints: Sequence[Tensor], hint_weights: Tensor | None,
    tokens_per_frame: int, token_offset: int, *, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """x + gate[frame] * branch + sum_j w_j * hint_j. Shapes as above; ValueError beyond four hints."""
    x_out = torch.empty_like(x)
    _launch(
        x, branch, gate, hints, hint_weights, gate, gate, x_out, x_out, tokens_per_frame, token_offset, 0.0, True, False,
        config,
    )  # fmt: skip
    return x_out


def residual_adaln(
    x: Tensor, branch: Tensor, gate: Tensor, hints: Sequence[Tensor], hint_weights: Tensor | None, shift: Tensor,
    scale: Tensor, tokens_per_frame: int, token_offset: int, eps: float, out: torch.dtype, *, config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(x', h) as above; ValueError beyond four hints."""
    x_out, h = torch.empty_like(x), torch.empty_like(x, dtype=out)
    _launch(
        x, branch, gate, hints, hint_weights, shift, scale, x_out, h, tokens_per_frame, token_offset, eps, True, True,
        config,
    )  # fmt: skip
    return x_out, h


def _empty_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[0], dtype=torch.float32)


def adaln_fp8(
    x: Tensor, shift: Tensor, scale: Tensor, tokens_per_frame: int, token_offset: int, eps: float,
    *, config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes and steps of `adaln`. Shapes as above."""
    codes, steps = _empty_codes(x)
    _launch(
        x,
        x,
        shift,
        (),
        None,
        shift,
        scale,
        x,
        codes,
        tokens_per_frame,
        token_offset,
        eps,
        False,
        True,
        config,
        steps,
    )
    return codes, steps


def residual_adaln_fp8(
    x: Tensor, branch: Tensor, gate: Tensor, hints: Sequence[Tensor], hint_weights: Tensor | None, shift: Tensor,
    scale: Tensor, tokens_per_frame: int, token_offset: int, eps: float, *, config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x', and codes and steps of h; ValueError beyond four hints."""
    x_out, (codes, steps) = torch.empty_like(x), _empty_codes(x)
    _launch(
        x, branch, gate, hints, hint_weights, shift, scale, x_out, codes, tokens_per_frame, token_offset, eps, True, True,
        config, steps,
    )  # fmt: skip
    return x_out, codes, steps
