"""Ops of the video VAE: rows of the table and public functions, as in `ops`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from . import attention, convolution, operands
from .dispatch import Candidate, define, triton
from .ops import HALF, HOPPER
from .ops_linear8 import ADA_UP, E4M3


def _frames(x: Tensor, O: int, sides: Iterable[int], dtype: torch.dtype | None = None) -> Tensor:  # noqa: E741
    """(B, O, F, H, W) in the layout of x. sides: F, H, W."""
    return convolution.frames_like(x, (x.shape[0], O, *sides), dtype)


def _valid(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, time_stride: int) -> Tensor:
    sides = [size - taps + 1 for size, taps in zip(x.shape[2:], weight.shape[2:], strict=True)]
    return _frames(x, weight.shape[0], ((sides[0] - 1) // time_stride + 1, *sides[1:]))


_conv3d = define(
    "conv3d(Tensor x, Tensor weight, Tensor bias, Tensor? residual, int time_stride) -> Tensor",
    operands.check_conv3d,
    _valid,
    triton("convolution", "conv3d", HALF, HOPPER),
    # torch leaves short windows to a direct loop on the CPU, however slow; oneDNN takes any size.
    Candidate("onednn", lambda: convolution.onednn, "cpu", dtypes=(torch.float32, torch.bfloat16)),
    Candidate("cudnn", lambda: convolution.conv3d, "cuda"),
)
_conv_half = define(
    "conv_half(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    operands.check_conv_half,
    lambda x, weight, bias: _frames(x, weight.shape[0], (x.shape[2], x.shape[3] // 2, x.shape[4] // 2)),
    triton("convolution", "conv_half", HALF, HOPPER),
    Candidate("library", lambda: convolution.conv_half),
)
_conv_double = define(
    "conv_double(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    operands.check_conv_double,
    lambda x, weight, bias: _frames(x, weight.shape[0], (x.shape[2], 2 * x.shape[3], 2 * x.shape[4])),
    triton("convolution", "conv_double", HALF, HOPPER),
    Candidate("library", lambda: convolution.conv_double),
)
_norm_silu = define(
    "norm_silu(Tensor x, Tensor gamma, Tensor? past, Tensor(a!)? keep) -> Tensor",
    operands.check_norm_silu,
    lambda x, *rest: _frames(x, x.shape[1], [size + 2 for size in x.shape[2:]]),
    triton("norm_silu", "norm_silu"),
    Candidate("composed", lambda: convolution.norm_silu),
)
_attention_wide = define(
    "attention_wide(Tensor q, Tensor k, Tensor v) -> Tensor",
    operands.check_attention,
    lambda q, k, v: q.new_empty(q.shape),
    triton("attention_wide", "attention_wide", HALF, HOPPER),
    Candidate("sdpa", lambda: attention.memory_efficient),
)


_conv3d_fp8 = define(
    "conv3d_fp8(Tensor x, Tensor weight, Tensor steps, Tensor bias, Tensor? residual, ScalarType out) -> Tensor",
    operands.check_conv3d_fp8,
    lambda x, weight, steps, bias, residual, out: _valid(x, weight, bias, residual, 1).to(out),
    triton("convolution", "conv3d_fp8", E4M3, HOPPER),
)
_norm_silu_fp8 = define(
    "norm_silu_fp8(Tensor x, Tensor gamma, float step, Tensor? past, Tensor(a!)? keep) -> Tensor",
    operands.check_norm_silu_fp8,
    lambda x, *rest: _frames(x, x.shape[1], [size + 2 for size in x.shape[2:]], torch.float8_e4m3fn),
    triton("norm_silu", "norm_silu_fp8", capability=ADA_UP),
)


def conv3d(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, time_stride: int = 1
) -> Tensor:
    """Convolution without padding, + bias, + residual: (B, C, F, H, W) -> (B, O, (F - t) // time_stride + 1, H - r + 1, W - s + 1).

    Shapes: weight (O, C, t, r, s), bias (O,), residual as the result. Products and sums in fp32.
    """
    return _conv3d(x, weight, bias, residual, time_stride)


def conv_half(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """3x3 with stride 2 on every frame, one zero row below and one zero column right: (B, C, F, H, W) -> (B, O, F, H/2, W/2)."""
    return _conv_half(x, weight, bias)


def conv_double(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Nearest neighbour x2 of every frame, then 3x3 with zero padding: (B, C, F, H, W) -> (B, O, F, 2H, 2W)."""
    return _conv_double(x, weight, bias)


def norm_silu(x: Tensor, gamma: Tensor, past: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
    """The input of a 3x3x3 conv: two past frames, then silu(RMS norm of x over channels), a border of zeros around each.

    Shapes: x (B, C, F, H, W); gamma, C values; past (B, C, 2, H, W), None for zeros -> (B, C, F+2, H+2, W+2). `keep`, which
    may be `past` itself, gets the last two frames without their border.
    """
    return _norm_silu(x, gamma, past, keep)


def attention_wide(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`ops.attention` for heads too wide for its kernels: (L, N, K), (S, N, K), (S, N, K) -> (L, N, K)."""
    return _attention_wide(q, k, v)


def conv3d_fp8(
    x: Tensor, weight: Tensor, steps: Tensor, bias: Tensor, residual: Tensor | None = None
) -> Tensor:
    """`conv3d` of e4m3 codes x and weight, stride 1: sums of output channel o are worth steps[o] each, (O,) fp32.

    bias and residual, and the result, are in the dtype that the codes stand for. A GPU sums in some 14 bits.
    """
    return _conv3d_fp8(x, weight, steps, bias, residual, bias.dtype)


def norm_silu_fp8(
    x: Tensor, gamma: Tensor, step: float, past: Tensor | None = None, keep: Tensor | None = None
) -> Tensor:
    """`norm_silu` as e4m3 codes worth `step` each, past and keep too. Values beyond 448 steps become 448 steps."""
    return _norm_silu_fp8(x, gamma, step, past, keep)
