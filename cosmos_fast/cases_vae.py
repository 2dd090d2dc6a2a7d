"""The inputs of every op of the video VAE, as in `cases`. Letters: B clips, C and O channels, F frames, H rows, W columns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .drawn import Args, Case, Random


def _conv3d(
    r: Random, C: int, O: int, F: int, H: int, W: int, B: int = 1, t: int = 3, s: int = 3, stride: int = 1,
    added: int = 0, last: int = 0,
) -> Args:  # noqa: E741  # fmt: skip
    """t x s x s taps; F, H and W of the result, without its stride. added: with a residual. last: channels last."""
    x, weight = (
        r.normal(B, C, F + t - 1, H + s - 1, W + s - 1),
        r.normal(O, C, t, s, s) * (t * s * s * C) ** -0.5,
    )
    residual = r.normal(B, O, (F - 1) // stride + 1, H, W) if added else None
    if last:
        x, weight = (part.contiguous(memory_format=torch.channels_last_3d) for part in (x, weight))
    return x, weight, r.normal(O), residual, stride


def _conv2d(r: Random, C: int, O: int, F: int, H: int, W: int, B: int = 1, last: int = 0) -> Args:  # noqa: E741
    x = r.normal(B, C, F, H, W)
    x = x.contiguous(memory_format=torch.channels_last_3d) if last else x
    return x, r.normal(O, C, 3, 3) * (9 * C) ** -0.5, r.normal(O)


def _norm_silu(r: Random, C: int, F: int, H: int, W: int, B: int = 1, alone: int = 0, last: int = 0) -> Args:
    x, past, keep = (
        r.normal(B, C, F, H, W),
        r.normal(B, C, 2, H, W),
        torch.zeros_like(r.normal(B, C, 2, H, W)),
    )
    if last:
        x, past, keep = (part.contiguous(memory_format=torch.channels_last_3d) for part in (x, past, keep))
    return x, r.normal(C, 1, 1, 1), *((None, None) if alone else (past, keep))


def _conv3d_fp8(r: Random, C: int, O: int, F: int, H: int, W: int, **more: int) -> Args:  # noqa: E741
    x, weight, bias, residual, _ = _conv3d(r, C, O, F, H, W, **more)
    step = weight.float().abs().amax(dim=(1, 2, 3, 4)).clamp_min(1e-20) / 448
    codes = _codes(weight.float() / step.view(-1, 1, 1, 1, 1))
    return _codes(x.float() * 16), codes, step / 16, bias, residual, r.dtype


def _norm_silu_fp8(r: Random, C: int, F: int, H: int, W: int, **more: int) -> Args:
    x, gamma, *frames = _norm_silu(r, C, F, H, W, **more)
    past, keep = (None if part is None else _codes(part.float() * 8) for part in frames)
    return x, gamma, float(gamma.abs().max()) * C**0.5 / 448, past, keep


def _attention_wide(r: Random, L: int, N: int, K: int, S: int | None = None, side: int = 0) -> Args:
    """side: q, k and v side by side in one tensor, as the VAE's projection gives them."""
    if side:
        q, k, v = r.normal(L, 3, N, K).unbind(1)
        return q, k, v
    return r.normal(L, N, K), r.normal(S or L, N, K), r.normal(S or L, N, K)


def _codes(x: Tensor) -> Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn)


MAKERS: dict[str, Callable[..., Args]] = {
    "conv3d": _conv3d, "conv_half": _conv2d, "conv_double": _conv2d, "norm_silu": _norm_silu,
    "conv3d_fp8": _conv3d_fp8, "norm_silu_fp8": _norm_silu_fp8, "attention_wide": _attention_wide,
}  # fmt: skip

_WIDE = {"C": 96, "F": 4, "H": 704, "W": 1280}

CASES: dict[str, tuple[Case, ...]] = {
    "conv3d": (
        Case("720p", "production", "a frame of the widest stage", {**_WIDE, "F": 1, "O": 96, "last": 1, "added": 1}),
        Case("720p half", "production", "the stage before it", {"C": 192, "O": 192, "F": 2, "H": 352, "W": 640, "last": 1, "added": 1}),
        Case("720p out", "production", "to pixels", {**_WIDE, "O": 3, "last": 1}),
        Case("small", "small", "a short window, as a block calls it", {"C": 16, "O": 24, "F": 2, "H": 3, "W": 5, "added": 1, "last": 1}),
        Case("to pixels", "small", "four frames to 3 channels", {"C": 16, "O": 3, "F": 4, "H": 2, "W": 4, "last": 1}),
        Case("to pixels, two", "small", "two frames to 3 channels", {"C": 16, "O": 3, "F": 2, "H": 2, "W": 4, "last": 1}),
        Case("time", "small", "3x1x1", {"C": 16, "O": 32, "F": 2, "H": 2, "W": 4, "s": 1}),
        Case("time stride", "odd", "3x1x1, every other frame", {"C": 8, "O": 8, "F": 3, "H": 2, "W": 3, "s": 1, "stride": 2, "B": 2}),
        Case("point", "odd", "1x1x1, channels no power of two", {"C": 24, "O": 40, "F": 2, "H": 2, "W": 3, "s": 1, "t": 1}),
        Case("one frame", "odd", "frame 0 alone, one pixel, channels the copy engine cannot read", {"C": 3, "O": 5, "F": 1, "H": 1, "W": 1}),
        Case("empty", "empty", "no clip", {"C": 4, "O": 4, "F": 1, "H": 4, "W": 4, "B": 0}),
    ),
    "conv_half": (
        Case("720p", "production", "the encoder's widest stage", {**_WIDE, "F": 1, "O": 96, "last": 1}),
        Case("small", "small", "two frames", {"C": 16, "O": 16, "F": 2, "H": 4, "W": 6, "last": 1}),
        Case("odd", "odd", "the result has odd sides; two clips, channels first", {"C": 3, "O": 5, "F": 1, "H": 7, "W": 2, "B": 2}),
        Case("empty", "empty", "no clip", {"C": 4, "O": 4, "F": 1, "H": 4, "W": 4, "B": 0}),
    ),
    "conv_double": (
        Case("720p", "production", "to the decoder's widest stage", {"C": 192, "O": 96, "F": 1, "H": 352, "W": 640, "last": 1}),
        Case("small", "small", "two frames", {"C": 16, "O": 8, "F": 2, "H": 3, "W": 4, "last": 1}),
        Case("one pixel", "odd", "two clips, channels first", {"C": 3, "O": 5, "F": 1, "H": 1, "W": 1, "B": 2}),
        Case("empty", "empty", "no clip", {"C": 4, "O": 4, "F": 1, "H": 4, "W": 4, "B": 0}),
    ),
    "norm_silu": (
        Case("720p", "production", "four frames of the widest stage", {**_WIDE, "last": 1}),
        Case("small", "small", "a window of two", {"C": 96, "F": 2, "H": 3, "W": 5, "last": 1}),
        Case("one frame", "small", "the history moves by one", {"C": 16, "F": 1, "H": 2, "W": 3, "last": 1}),
        Case("alone", "odd", "no history, five channels, two clips", {"C": 5, "F": 3, "H": 1, "W": 1, "B": 2, "alone": 1}),
        Case("rows", "odd", "channels first", {"C": 12, "F": 3, "H": 3, "W": 2}),
        Case("empty", "empty", "no clip", {"C": 4, "F": 1, "H": 4, "W": 4, "B": 0}),
    ),
    "attention_wide": (
        Case("720p", "production", "a latent frame", {"L": 14080, "N": 1, "K": 384, "side": 1}),
        Case("small", "small", "more queries than a tile has", {"L": 150, "N": 1, "K": 384, "side": 1}),
        Case("heads", "small", "two heads, fewer keys", {"L": 70, "N": 2, "K": 192, "S": 33}),
        Case("ends", "odd", "queries, keys and head end inside a tile", {"L": 133, "N": 1, "K": 200, "S": 45}),
        Case("one key", "odd", "softmax of one value, a narrow head", {"L": 5, "N": 1, "K": 24, "S": 1}),
        Case("one query", "odd", "L = 1, three heads", {"L": 1, "N": 3, "K": 136, "S": 67}),
        Case("empty", "empty", "no query", {"L": 0, "N": 1, "K": 384, "S": 3}),
        Case("no head", "empty", "N = 0", {"L": 2, "N": 0, "K": 8}),
    ),
    "conv3d_fp8": (
        Case("720p", "production", "a frame of the widest stage", {**_WIDE, "F": 1, "O": 96, "last": 1, "added": 1}),
        Case("small", "small", "a short window, as a block calls it", {"C": 32, "O": 24, "F": 2, "H": 3, "W": 5, "added": 1, "last": 1}),
        Case("odd", "odd", "frame 0 alone, channels the copy engine cannot read", {"C": 5, "O": 7, "F": 1, "H": 1, "W": 2, "B": 2}),
        Case("empty", "empty", "no clip", {"C": 4, "O": 4, "F": 1, "H": 4, "W": 4, "B": 0}),
    ),
    "norm_silu_fp8": (
        Case("720p", "production", "two frames of the widest stage", {**_WIDE, "F": 2, "last": 1}),
        Case("small", "small", "a window of two", {"C": 96, "F": 2, "H": 3, "W": 5, "last": 1}),
        Case("one frame", "small", "the history moves by one, channels first", {"C": 16, "F": 1, "H": 2, "W": 3}),
        Case("alone", "odd", "no history, five channels, two clips", {"C": 5, "F": 3, "H": 1, "W": 1, "B": 2, "alone": 1}),
        Case("empty", "empty", "no clip", {"C": 4, "F": 1, "H": 4, "W": 4, "B": 0}),
    ),
}  # fmt: skip
