"""From noise to latents: the two sampling loops.

`sample` is the loop of the base model (UniPC order 2 with corrector, guidance), `sample_distilled` that
of the four-step model. Both are plain for-loops over a schedule that can be printed; the network is a
callable they are given. Everything that depends on the step alone is a Python float before the loop
starts, and nothing inside a loop waits for the device.

Letters: B C T H W are the axes of a latent (1, 16, latent frames, height / 8, width / 8).
Rectified flow: x = (1 - sigma) * x0 + sigma * noise, velocity v = noise - x0.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .formats import ClipError
from .ops import guided_unipc
from .schedule import (
    Schedule,
    StepCoefficients,
    base_schedule,
    base_times,
    check_kind,
    distilled_noise,
    distilled_schedule,
    distilled_times,
    noise,
    unipc_coefficients,
)

__all__ = [
    "Guide",
    "Known",
    "OnStep",
    "Pair",
    "Schedule",
    "StepCoefficients",
    "Velocity",
    "base_schedule",
    "base_times",
    "check_finite",
    "distilled_noise",
    "distilled_schedule",
    "distilled_times",
    "guided_unipc",
    "noise",
    "sample",
    "sample_distilled",
    "unipc_coefficients",
]

Velocity = Callable[[Tensor, int], Tensor]
"""(network input z_BCTHW, step index) -> v_BCTHW of one branch, fp32 or bf16. Must not write to z."""

Pair = Callable[[Tensor, int], tuple[Tensor, Tensor | None]]
"""(network input z_BCTHW, step index) -> (v_cond, v_uncond). v_uncond may be None if guidance is 0."""

OnStep = Callable[[int, int], None]
"""Called after every step with (index from 0, total). Raising from it ends the loop."""

# ---------------------------------------------------------------------- what the network gets to see


@dataclass(frozen=True)
class Known:
    """Latents of the first n frames, taken from the end of the previous chunk.

    Shapes: gt_BCTHW (1, 16, n, H, W) fp32; n may be 0 (first chunk). An image (T = 1) ignores it.
    """

    gt_BCTHW: Tensor

    @property
    def frames(self) -> int:
        return self.gt_BCTHW.shape[2]


@dataclass(frozen=True)
class Guide:
    """Anchors a region to the input clip by what the network sees; the solver state is untouched.

    Shapes: x0_BCTHW (1, 16, T, H, W) bf16; weight_THW fp32, 1 = anchored.
    threshold: last step index that is guided (inclusive).
    """

    x0_BCTHW: Tensor
    weight_THW: Tensor
    threshold: int

    def blend(self, x: Tensor, noise: Tensor, sigma: float) -> Tensor:
        """((1 - sigma) * x0 + sigma * noise) * weight + x * (1 - weight), fp32."""
        # The published order: 1 - sigma in fp32, its product with x0 rounded to the dtype of x0.
        clean = (self.x0_BCTHW * float(np.float32(1) - np.float32(sigma))).float()
        return (clean + noise * sigma) * self.weight_THW + x * (1 - self.weight_THW)


def _with_known(known: Known | None, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast for the network, the known frames put in place of the first ones."""
    if known is None:
        return y.to(dtype)
    return torch.cat([known.gt_BCTHW.to(dtype), y[:, :, known.frames :].to(dtype)], dim=2)


def check_finite(x: Tensor, where: str) -> None:
    """Raise ClipError if x holds a NaN or an infinity. Waits for the device."""
    if not bool(torch.isfinite(x).all()):
        raise ClipError(f"sample: latents must be finite, got a non-finite latent {where}.")


# ------------------------------------------------------------------------------------------- loops


@torch.no_grad()
def sample(
    pair: Pair,
    noise: Tensor,
    schedule: Schedule,
    *,
    guidance: float,
    known: Known | None = None,
    guide: Guide | None = None,
    dtype: torch.dtype = torch.bfloat16,
    on_step: OnStep | None = None,
    debug: bool = False,
) -> Tensor:
    """Sample one chunk with the base model; returns latents x0 (1, 16, T, H, W) fp32.

    pair: both velocities at a network input, which comes in `dtype`, known frames and guide applied.
    guidance: g in v = c + g (c - u); g = 0 is the conditional branch alone.
    noise: (1, 16, T, H, W) fp32 on the compute device; not modified.
    debug: check every step for non-finite values (waits for the device), not only the result.
    Known frames end at sigma_0 * gt + (1 - sigma_0) * noise, as published, not at gt.
    """
    check_kind("sample", schedule, "base")
    known = _checked_known("sample", known, noise)
    if guide is not None:
        _check_guide(guide, noise)
    known_v = None if known is None else noise[:, :, : known.frames] - known.gt_BCTHW
    x = last = m1 = m2 = noise
    for i, c in enumerate(unipc_coefficients(schedule)):
        y = guide.blend(x, noise, c.sigma) if guide is not None and i <= guide.threshold else x
        v_cond, v_uncond = pair(_with_known(known, y, dtype), i)
        if v_uncond is None and guidance != 0:
            raise ValueError(f"sample: guidance {guidance} needs v_uncond, got None at step {i}.")
        if known_v is not None:
            n = known_v.shape[2]
            v_cond = torch.cat([known_v, v_cond[:, :, n:]], dim=2)
            v_uncond = None if v_uncond is None else torch.cat([known_v, v_uncond[:, :, n:]], dim=2)
        x, m, last = guided_unipc(x, v_cond, v_uncond, m1, m2, last, guidance, c)
        m2, m1 = m1, m
        if debug:
            check_finite(x, f"at step {i}")
        if on_step is not None:
            on_step(i, schedule.steps)
    check_finite(x, f"after step {schedule.steps - 1}")
    return x


@torch.no_grad()
def sample_distilled(
    velocity: Velocity,
    noise: Tensor,
    schedule: Schedule,
    *,
    known: Known | None = None,
    dtype: torch.dtype = torch.bfloat16,
    on_step: OnStep | None = None,
    debug: bool = False,
) -> Tensor:
    """Sample one chunk with the distilled model; returns latents x0 (1, 16, T, H, W) fp32.

    Every step predicts x0 and returns to a lower level with the same initial noise. The state is fp64.
    Known frames end exactly at gt. A NaN in the result becomes 0, as published, with a RuntimeWarning;
    an infinity, or generated frames that are all NaN, raise ClipError.
    """
    check_kind("sample_distilled", schedule, "distilled")
    known = _checked_known("sample_distilled", known, noise)
    x = noise.double()
    for i in range(schedule.steps):
        sin, cos = math.sin(schedule.angles[i]), math.cos(schedule.angles[i])
        x32 = x.float()  # the published sampler rounds its fp64 state here; dropping it shows at 1e-7
        z = x32.double() * (1 / (cos + sin))
        v = velocity(_with_known(known, z, dtype), i)
        x = z - (sin / (cos + sin)) * v.float().double()
        if known is not None:
            x = torch.cat([known.gt_BCTHW.double(), x[:, :, known.frames :]], dim=2)
        if schedule.angles[i + 1] > 1e-5:
            x = math.cos(schedule.angles[i + 1]) * x + math.sin(schedule.angles[i + 1]) * noise.double()
        if debug:
            check_finite(x, f"at step {i}")
        if on_step is not None:
            on_step(i, schedule.steps)
    return _without_nan(x.float(), 0 if known is None else known.frames, schedule.steps - 1)


def _without_nan(x: Tensor, n_known: int, step: int) -> Tensor:
    missing = torch.isnan(x)
    count, generated = int(missing.sum()), x[:, :, n_known:].numel()
    if count == generated > 0:
        check_finite(x, f"after step {step}: every generated value is NaN")
    if count:
        warnings.warn(
            f"sample_distilled: {count} of {generated} latents were NaN and became 0.", RuntimeWarning, 3
        )
    x = torch.where(missing, 0.0, x)
    check_finite(x, f"after step {step}")
    return x


# ------------------------------------------------------------------------------------------ checks


def _checked_known(what: str, known: Known | None, noise: Tensor) -> Known | None:
    """None where nothing is to be replaced: no known frames, or an image."""
    if noise.ndim != 5 or noise.dtype != torch.float32:
        raise ValueError(
            f"{what}: noise must be (1, 16, T, H, W) fp32, got {tuple(noise.shape)} {noise.dtype}."
        )
    if known is None or known.frames == 0 or noise.shape[2] == 1:
        return None
    gt, frames = known.gt_BCTHW, noise.shape[2]
    if gt.dtype != torch.float32 or known.frames > frames or gt[:, :, :1].shape != noise[:, :, :1].shape:
        rule = f"fp32, at most {frames} frames of the noise's shape"
        raise ValueError(f"{what}: known frames must be {rule}, got {tuple(gt.shape)} {gt.dtype}.")
    return known


def _check_guide(guide: Guide, noise: Tensor) -> None:
    if guide.x0_BCTHW.shape != noise.shape or guide.weight_THW.shape != noise.shape[2:]:
        raise ValueError(
            f"sample: guide must have x0 {tuple(noise.shape)} and weight {tuple(noise.shape[2:])}, "
            f"got {tuple(guide.x0_BCTHW.shape)} and {tuple(guide.weight_THW.shape)}."
        )
