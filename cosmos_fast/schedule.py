"""Everything of a sampling run that is known before it starts: times, initial noise, solver coefficients.

The results are plain numbers and small CPU tensors, so a schedule can be printed and tables over all
steps can be built ahead of the loop. The loops are in `sampler.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .formats import SpecError

MAX_STEPS = 250
"""From 251 steps on the first two integer timesteps coincide, which the published solver cannot run."""

SHIFT = 5.0
_CLEAN_TIME = 1e-4 / (1 + 1e-4)  # the time the distilled network is told for frames that are already known
_TRAINED_ANGLES = (math.pi / 2, math.atan(15), math.atan(5), math.atan(5 / 3))


# --------------------------------------------------------------------------------------- time grids


@dataclass(frozen=True)
class Schedule:
    """The times of one chunk; `print(schedule)` shows them.

    sigmas: noise levels rounded to fp32, one per step and a trailing 0.
    timesteps: what the network is told. Base: integers, truncated 1000 * sigma. Distilled: the noise
    level rounded to bf16.
    angles: distilled only, one exact TrigFlow angle per step and a trailing 0, radians.
    """

    kind: Literal["base", "distilled"]
    sigmas: tuple[float, ...]
    timesteps: tuple[int, ...] | tuple[float, ...]
    angles: tuple[float, ...] = ()

    @property
    def steps(self) -> int:
        """Network evaluations per branch."""
        return len(self.timesteps)

    def __str__(self) -> str:
        rows = [f"{i:4d}  sigma {self.sigmas[i]:.9f}  t {t}" for i, t in enumerate(self.timesteps)]
        return "\n".join([f"{self.kind} schedule, {self.steps} steps", *rows])


def base_schedule(steps: int) -> Schedule:
    """Linear grid from 0.999 shifted by 5: sigma = 5 s / (1 + 4 s). 1 <= steps <= 250, else SpecError."""
    _check_steps("base_schedule", steps, MAX_STEPS)
    s = np.linspace(float(np.float32(0.999)), 0.0, steps + 1)[:-1]
    sigma = SHIFT * s / (1 + (SHIFT - 1) * s)
    # Truncated from the fp64 sigma: the network's time and the solver's sigma differ by up to 1e-3.
    timesteps = tuple(int(t) for t in (1000 * sigma).astype(np.int64))
    return Schedule("base", (*(float(v) for v in sigma.astype(np.float32)), 0.0), timesteps)


def distilled_schedule(steps: int) -> Schedule:
    """The trained angles for steps <= 4, else a uniform grid shifted by 5. steps < 1 raises SpecError."""
    _check_steps("distilled_schedule", steps, None)
    if steps <= len(_TRAINED_ANGLES):
        angles: tuple[float, ...] = _TRAINED_ANGLES[:steps]
    else:
        uniform = torch.linspace(1 / steps, 1, steps, dtype=torch.float32).flip(0).tolist()
        times = [SHIFT * u / (1 + (SHIFT - 1) * u) for u in uniform]
        angles = tuple(math.pi / 2 if t >= 1 else math.atan(t / (1 - t)) for t in times)
    exact = [math.sin(a) / (math.cos(a) + math.sin(a)) for a in angles]
    told = torch.tensor(exact, dtype=torch.float32).to(torch.bfloat16).tolist()
    return Schedule("distilled", (*(float(np.float32(t)) for t in exact), 0.0), tuple(told), (*angles, 0.0))


def base_times(schedule: Schedule) -> Tensor:
    """Times for the network's tables, (steps, 1) int64: one value for all frames."""
    check_kind("base_times", schedule, "base")
    return torch.tensor(schedule.timesteps, dtype=torch.int64)[:, None]


def distilled_times(schedule: Schedule, frames: int, n_known: int) -> Tensor:
    """Times for the network's tables, (steps, T) bf16 in [0, 1]; the first n_known frames are told 1e-4.

    frames: T, latent frames. A single image (T = 1) has no known frames, whatever n_known is.
    """
    check_kind("distilled_times", schedule, "distilled")
    if not 0 <= n_known <= frames:
        raise ValueError(f"distilled_times: n_known must be in 0..{frames}, got {n_known}.")
    times = torch.tensor(schedule.timesteps, dtype=torch.float32)[:, None].repeat(1, frames)
    if frames > 1:
        times[:, :n_known] = _CLEAN_TIME
    return times.to(torch.bfloat16)


# ------------------------------------------------------------------------------------------- noise


def noise(seed: int, shape: Sequence[int]) -> Tensor:
    """Initial noise of the base model, fp32 on the CPU: the same bytes on every machine.

    seed: chunk seed, 0 <= seed < 2**32. Drawn in fp64 by NumPy's legacy stream, last axis fastest.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"noise: seed must be in 0..2**32-1, got {seed}.")
    drawn = np.random.RandomState(seed).standard_normal(tuple(shape))
    return torch.from_numpy(drawn.astype(np.float32))


def distilled_noise(seed: int, shape: Sequence[int], device: torch.device | str) -> Tensor:
    """Initial noise of the distilled model, fp32, from the generator of `device`.

    A CUDA device and the CPU give different noise for one seed; only CUDA matches the published system.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, device=device, dtype=torch.float32)


# ------------------------------------------------------------------------------------------- UniPC


class StepCoefficients(NamedTuple):
    """Every scalar of one UniPC step; a tuple of floats, so it goes to `guided_unipc` as it is.

    m = x - sigma * v
    corrected = corrector_last * last + corrector_m * m + corrector_m1 * m1 + corrector_m2 * m2
    x_next = predictor_x * corrected + predictor_m * m + predictor_m1 * m1

    A coefficient of 0 means its tensor is not read.
    """

    sigma: float
    corrector_last: float
    corrector_m: float
    corrector_m1: float
    corrector_m2: float
    predictor_x: float
    predictor_m: float
    predictor_m1: float


def unipc_coefficients(schedule: Schedule) -> list[StepCoefficients]:
    """Coefficients of all steps, computed in fp64 from the fp32 sigmas.

    UniPC of order 2 with B2(h) = exp(h) - 1, data prediction and corrector; lambda = log((1-sigma)/sigma).
    The first and last predictors are of order 1, and a corrector has the order of the predictor before it.
    """
    check_kind("unipc_coefficients", schedule, "base")
    sigmas = schedule.sigmas
    lam = [math.log((1 - s) / s) for s in sigmas[:-1]]
    return [
        StepCoefficients(sigmas[i], *_corrector(sigmas, lam, i), *_predictor(sigmas, lam, i))
        for i in range(schedule.steps)
    ]


def _corrector(sigmas: Sequence[float], lam: list[float], i: int) -> tuple[float, float, float, float]:
    """Factors on (last, m, m1, m2) that redo the step i-1 -> i, knowing m."""
    if i == 0:
        return 1.0, 0.0, 0.0, 0.0  # nothing to correct; the loop passes last = x
    h = lam[i] - lam[i - 1]
    e = math.expm1(-h)
    gain, keep = -(1 - sigmas[i]) * e, sigmas[i] / sigmas[i - 1]
    if i == 1:
        return keep, gain / 2, gain / 2, 0.0
    r = (lam[i - 2] - lam[i - 1]) / h
    k1 = -e / h - 1
    b1 = k1 / e
    b2 = 2 * (-k1 / h - 0.5) / e
    rho1 = (b1 - b2) / (1 - r)
    rho2 = b1 - rho1
    return keep, gain * rho2, gain * (1 - rho1 / r - rho2), gain * rho1 / r


def _predictor(sigmas: Sequence[float], lam: list[float], i: int) -> tuple[float, float, float]:
    """Factors on (corrected, m, m1) of the step i -> i+1."""
    if sigmas[i + 1] == 0:
        return 0.0, 1.0, 0.0  # lambda is infinite: the result is m, exactly
    h = lam[i + 1] - lam[i]
    gain, keep = -(1 - sigmas[i + 1]) * math.expm1(-h), sigmas[i + 1] / sigmas[i]
    if i == 0:
        return keep, gain, 0.0
    r = (lam[i - 1] - lam[i]) / h
    return keep, gain * (1 - 0.5 / r), gain * 0.5 / r


# ------------------------------------------------------------------------------------------ checks


def check_kind(what: str, schedule: Schedule, kind: str) -> None:
    """Raise ValueError unless the schedule is of the kind the caller runs."""
    if schedule.kind != kind:
        raise ValueError(f"{what}: schedule must be of kind {kind!r}, got {schedule.kind!r}.")


def _check_steps(what: str, steps: int, most: int | None) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1 or (most and steps > most):
        limit = f"an integer in 1..{most}" if most else "an integer >= 1"
        raise SpecError(f"{what}: steps must be {limit}, got {steps!r}.")
