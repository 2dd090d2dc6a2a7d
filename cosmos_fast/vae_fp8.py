"""Convs of the video VAE in 8 bits: the 3x3x3 ones of the residual blocks, nine tenths of its arithmetic.

    silu(rms(x)) ~ code * step,    step = sqrt(C) * max |gamma| / 448

The norm makes the step: divided by its norm over the channels a value is at most 1, so nothing behind it exceeds
sqrt(C) * |gamma|, and the step is known before any frame is. No second pass looks for a largest value, none is forgotten
between windows, and windows of any size stay the same function. The bound is rarely reached, which costs no digits: e4m3 is
floating point, and at 384 channels of one gain a sixteenth of the rms is still 90 times the smallest normal code. Weights
have a step per output channel; sums are fp32, scaled once. Histories are codes too, in half the memory.

What stays in 16 bits: the first and the last convs, where the reading takes the time and errors are seen at once, those
that change height, width or time, and attention.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops_vae
from .dispatch import required
from .formats import EnvironmentProblem
from .fp8_weights import quantised_rows
from .vae import VAE, CausalConv, Norm, Residual, Stream

E4M3, TOP = torch.float8_e4m3fn, 448.0
PAIRS = (("0", "2"), ("3", "6"))
"""Norms of a residual block and the convs behind them."""
WORST = 0.01
"""Largest relative error of the proof. bf16 rounding gives 0.002, sums of 14 bits as much, noise 1."""


class Fp8Conv(nn.Module):
    """A `CausalConv` behind a norm of this gain: weight codes e4m3, steps (O,) fp32, bias; in and out as before."""

    def __init__(self, conv: CausalConv, gamma: Tensor) -> None:
        super().__init__()
        codes, scale = quantised_rows(conv.weight.flatten(1))
        is_last = conv.weight.stride(1) == 1
        layout = torch.channels_last_3d if is_last else torch.contiguous_format
        self.step = max(float(gamma.abs().max()), 1e-20) * gamma.numel() ** 0.5 / TOP
        self.register_buffer("weight", codes.view(conv.weight.shape).contiguous(memory_format=layout))
        self.register_buffer("steps", scale * self.step)
        self.bias = conv.bias

    def normed(self, x: Tensor, gamma: Tensor, stream: Stream) -> Tensor:
        """As `CausalConv.normed`, in codes; the history too."""
        past = stream.past(self, x, dtype=E4M3)
        return ops_vae.norm_silu_fp8(x, gamma, self.step, past, past)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        weight, steps, bias = cast(Tensor, self.weight), cast(Tensor, self.steps), cast(Tensor, self.bias)
        return ops_vae.conv3d_fp8(x, weight, steps, bias, residual)


def in_8_bits(vae: VAE) -> VAE:
    """Put 8-bit convs in the place of those of all residual blocks; weights must be there, in their final layout."""
    for block in [module for module in vae.modules() if isinstance(module, Residual)]:
        for norm, conv in PAIRS:
            parts = block.residual
            parts[conv] = Fp8Conv(cast(CausalConv, parts[conv]), cast(Norm, parts[norm]).gamma)
    return vae


def prove(device: torch.device) -> None:
    """A small conv of codes through the implementation that will run, against fp64: what returns noise is refused.

    Raises EnvironmentProblem, also where a GPU has no such conv and the reference would take its place.
    """
    needs, instead = "a GPU of compute capability 9.0 and Triton", "Use a recipe with vae bf16."
    required("norm_silu_fp8", device, torch.bfloat16, needs, instead)
    name = required("conv3d_fp8", device, E4M3, needs, instead)
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(shape, generator=generator) for shape in ((1, 64, 3, 6, 18), (96, 64, 3, 3, 3)))
    (codes, scale), bias = quantised_rows(w.flatten(1)), torch.zeros(96)
    pixels = (x * 16).clamp(-TOP, TOP).to(E4M3)
    exact = F.conv3d(pixels.double(), codes.view(w.shape).double()) * scale.double().view(-1, 1, 1, 1)
    found = ops_vae.conv3d_fp8(
        pixels.to(device), codes.view(w.shape).to(device), scale.to(device), bias.to(device, torch.bfloat16)
    )
    error = float((found.cpu().double() - exact).norm() / exact.norm())
    if not error <= WORST:
        raise EnvironmentProblem(
            f"conv3d_fp8: {name} must agree with fp64 within {WORST} on this "
            f"machine, got {error:.3g}. Use a recipe with vae bf16."
        )
