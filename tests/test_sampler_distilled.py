"""The distilled loop, and what both loops promise: callback, isolation, no host reads, finite results."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cosmos_fast.formats import ClipError
from cosmos_fast.sampler import (
    Guide,
    Known,
    base_schedule,
    check_finite,
    distilled_schedule,
    sample,
    sample_distilled,
)

SHAPE = (1, 16, 3, 4, 6)
FP32 = torch.float32
NAN = float("nan")


def randn(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def toy_velocity(z: Tensor, step: int) -> Tensor:
    return torch.tanh(z.float() * 1.3) - 0.4 * torch.cos(3 * z.float() + step)


# ---------------------------------------------------------------------------------------- distilled


def rf_velocity(z: Tensor, t: float) -> Tensor:
    return torch.tanh(z * (1.5 - t)) * 0.8 - 0.3 * torch.cos(2 * z + t)


@pytest.mark.parametrize("n_known", [0, 1])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 8])
def test_distilled_equals_its_rectified_flow_form(steps: int, n_known: int) -> None:
    noise, gt = randn(0), randn(5, (1, 16, n_known, 4, 6))
    uniform = [(steps - k) / steps for k in range(steps)] if steps > 4 else [1, 0.75, 0.5, 0.25][:steps]
    times = [*(5 * u / (1 + 4 * u) for u in uniform), 0.0]
    z = noise.double()
    for t, t_next in itertools.pairwise(times):
        shown = torch.cat([gt.double(), z[:, :, n_known:]], 2)
        x0 = torch.cat([gt.double(), (z - t * rf_velocity(shown, t))[:, :, n_known:]], 2)
        z = (1 - t_next) * x0 + t_next * noise.double()
    schedule = distilled_schedule(steps)
    seen: list[Tensor] = []

    def velocity(z: Tensor, step: int) -> Tensor:
        seen.append(z)
        # In fp64, so that what is compared is the sampler and not the rounding of the toy field.
        return rf_velocity(z.double(), times[step]).float()

    result = sample_distilled(velocity, noise, schedule, known=Known(gt), dtype=FP32)
    assert result.dtype == FP32 and len(seen) == steps
    assert (result.double() - z).abs().max() <= 5e-7 * max(1.0, z.abs().max().item())
    assert torch.equal(result[:, :, :n_known], gt)
    assert all(torch.equal(z[:, :, :n_known], gt) for z in seen)


def test_distilled_state_is_rounded_to_fp32_before_every_step() -> None:
    """Bit for bit in the trigonometric form; an unrounded state differs in the last place."""
    noise, schedule = randn(0), distilled_schedule(4)

    def expected(rounded: bool) -> Tensor:
        x = noise.double()
        for step, (angle, lower) in enumerate(itertools.pairwise(schedule.angles)):
            x32 = x.float().double() if rounded else x
            q = math.cos(angle) + math.sin(angle)
            f = toy_velocity((x32 / q).float(), step).double()
            x0 = x32 / q - math.sin(angle) / q * f
            x = math.cos(lower) * x0 + math.sin(lower) * noise.double() if lower > 0 else x0
        return x.float()

    result = sample_distilled(toy_velocity, noise, schedule, dtype=FP32)
    assert (result != expected(rounded=True)).float().mean() < 0.01  # fp64 rounding may flip a tie
    assert (result != expected(rounded=False)).float().mean() > 0.1


def test_distilled_with_one_step_is_one_prediction_from_pure_noise() -> None:
    noise, v = randn(0), randn(1)
    seen: list[Tensor] = []
    result = sample_distilled(lambda z, i: seen.append(z) or v, noise, distilled_schedule(1))
    assert len(seen) == 1 and seen[0].dtype == torch.bfloat16 and torch.equal(seen[0], noise.bfloat16())
    assert torch.equal(result, (noise.double() - v.double()).float())


def test_distilled_returns_to_the_same_noise() -> None:
    """With v = noise - x0 the prediction is x0 at every step, whatever the level."""
    noise, x0 = randn(0), randn(1)
    seen: list[Tensor] = []
    schedule = distilled_schedule(4)
    result = sample_distilled(lambda z, i: seen.append(z) or (noise - x0), noise, schedule, dtype=FP32)
    assert (result - x0).abs().max() < 1e-6
    for z, t in zip(seen, (1, 15 / 16, 5 / 6, 5 / 8), strict=True):
        assert (z - ((1 - t) * x0 + t * noise)).abs().max() < 1e-6


def test_distilled_nan_becomes_zero_and_says_so() -> None:
    noise, schedule = randn(0), distilled_schedule(1)
    v = randn(1)
    clean = sample_distilled(lambda z, i: v, noise, schedule)
    spoiled = v.clone()
    spoiled[0, 3, 1, 2] = NAN
    with pytest.warns(RuntimeWarning, match="6 of 1152 latents were NaN"):
        result = sample_distilled(lambda z, i: spoiled, noise, schedule)
    assert not result[0, 3, 1, 2].any() and torch.equal(result[:, :, 2], clean[:, :, 2])
    all_nan = torch.full_like(v, NAN)
    known = Known(randn(5, (1, 16, 1, 4, 6)))
    for options in ({}, {"known": known}):
        with pytest.raises(ClipError, match="every generated value is NaN"):
            sample_distilled(lambda z, i: all_nan, noise, schedule, **options)  # type: ignore[arg-type]
    with pytest.raises(ClipError, match="non-finite latent after step 0"):
        sample_distilled(lambda z, i: v / 0, noise, schedule)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gt = known.gt_BCTHW
        assert torch.equal(sample_distilled(lambda z, i: v, noise, schedule, known=known)[:, :, :1], gt)


# -------------------------------------------------------------------------------- loop and its edges


def run_base(pair: Callable[[Tensor, int], Tensor], noise: Tensor, **options: object) -> Tensor:
    def both(z: Tensor, step: int) -> tuple[Tensor, Tensor]:
        v = pair(z, step)
        return v, 0.5 * v

    return sample(both, noise, base_schedule(4), guidance=1, **options)  # type: ignore[arg-type]


def run_distilled(velocity: Callable[[Tensor, int], Tensor], noise: Tensor, **options: object) -> Tensor:
    return sample_distilled(velocity, noise, distilled_schedule(4), **options)  # type: ignore[arg-type]


both_loops = pytest.mark.parametrize("run", [run_base, run_distilled])


@both_loops
def test_callback_sees_every_step_and_can_abort(run: Callable[..., Tensor]) -> None:
    calls: list[int] = []
    steps: list[tuple[int, int]] = []

    def velocity(z: Tensor, step: int) -> Tensor:
        calls.append(step)
        return toy_velocity(z, step)

    run(velocity, randn(0), on_step=lambda i, total: steps.append((i, total)))
    assert steps == [(0, 4), (1, 4), (2, 4), (3, 4)] and calls == [0, 1, 2, 3]

    class Stop(Exception):
        pass

    def stop(step: int, total: int) -> None:
        if step == 1:
            raise Stop

    calls.clear()
    with pytest.raises(Stop):
        run(velocity, randn(0), on_step=stop)
    assert calls == [0, 1]


@both_loops
def test_runs_leave_no_trace_on_each_other_or_on_the_noise(run: Callable[..., Tensor]) -> None:
    def velocity(z: Tensor, step: int) -> Tensor:
        return toy_velocity(z, step)

    noise, known = randn(0), Known(randn(5, (1, 16, 1, 4, 6)))
    kept, kept_gt = noise.clone(), known.gt_BCTHW.clone()
    first = run(velocity, noise, known=known)
    run(velocity, randn(9))
    again = run(velocity, noise, known=known)
    assert torch.equal(first, again)
    assert torch.equal(noise, kept) and torch.equal(known.gt_BCTHW, kept_gt)


@both_loops
def test_loop_never_waits_for_the_device(run: Callable[..., Tensor]) -> None:
    class Reads(TorchDispatchMode):
        """Counts what reads a tensor's value on the host: .item(), bool(), data-dependent shapes."""

        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            name = func.name()
            self.count += "_local_scalar_dense" in name or "nonzero" in name or "is_nonzero" in name
            return func(*args, **(kwargs or {}))

    in_loop: list[int] = []
    with Reads() as reads:
        known = Known(randn(5, (1, 16, 1, 4, 6)))
        options = (
            {"guide": Guide(randn(8).bfloat16(), torch.full(SHAPE[2:], 0.5), 1)} if run is run_base else {}
        )
        run(
            toy_velocity,
            randn(0),
            known=known,
            on_step=lambda i, n: in_loop.append(reads.count),
            **options,
        )
        before = in_loop[0]
        assert in_loop == [before] * 4
        assert reads.count > before  # the check of the result does read


@both_loops
def test_non_finite_latents_end_the_clip(run: Callable[..., Tensor]) -> None:
    def velocity(z: Tensor, step: int) -> Tensor:
        v = toy_velocity(z, step)
        v[0, 0, 0, 0, 0] = math.inf if step == 2 else 0.0
        return v

    with pytest.raises(ClipError, match="non-finite latent at step 2"):
        run(velocity, randn(0), debug=True)
    if run is run_base:  # the distilled sampler turns the NaN into 0 and warns
        with pytest.raises(ClipError, match="non-finite latent after step 3"):
            run(velocity, randn(0))


def test_check_finite() -> None:
    check_finite(torch.ones(3), "here")
    for bad in (NAN, math.inf, -math.inf):
        with pytest.raises(ClipError, match="got a non-finite latent here"):
            check_finite(torch.tensor([1.0, bad]), "here")


@both_loops
def test_gradients_are_not_recorded(run: Callable[..., Tensor]) -> None:
    gain = torch.ones(1, requires_grad=True)
    assert not run(lambda z, i: toy_velocity(z, i) * gain, randn(0)).requires_grad
