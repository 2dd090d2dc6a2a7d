"""The base loop: golden trajectories, an independent scheduler, guidance, known frames, guides."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cosmos_fast.sampler import (
    Guide,
    Known,
    Schedule,
    base_schedule,
    distilled_schedule,
    guided_unipc,
    sample,
    sample_distilled,
    unipc_coefficients,
)

GOLDEN = Path(__file__).parent / "golden"
SHAPE = (1, 16, 3, 4, 6)
FP32 = torch.float32
NAN = float("nan")


@pytest.fixture(scope="module")
def unipc() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "unipc.npz") as data:
        return {key: data[key] for key in data if not key.startswith("kerras")}


def randn(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def toy_velocity(x: Tensor, timestep: int) -> Tensor:
    """The field behind the golden trajectories."""
    tau = float(np.float32(timestep) * np.float32(0.001))
    return x * (0.5 + 0.3 * math.sin(3 * tau)) - torch.tanh(x + 2 * tau) + 0.1 * torch.cos(5 * x)


class ToyPair:
    """The toy field for both branches; keeps every network input it was given."""

    def __init__(self, schedule: Schedule, branch: Callable[[Tensor], Tensor] = lambda v: v) -> None:
        self.schedule, self.branch, self.seen = schedule, branch, []

    def __call__(self, z: Tensor, step: int) -> tuple[Tensor, Tensor]:
        assert step == len(self.seen)
        self.seen.append(z.clone())
        v = toy_velocity(z.float(), self.schedule.timesteps[step])
        return v, self.branch(v)


# ------------------------------------------------------------------------------------------- UniPC


@pytest.mark.parametrize("steps", [1, 4, 10, 35])
def test_trajectory_equals_golden(unipc: dict[str, np.ndarray], steps: int) -> None:
    schedule, trajectory = base_schedule(steps), unipc[f"n{steps}_traj"]
    pair = ToyPair(schedule)
    result = sample(pair, torch.from_numpy(unipc["x_init"]), schedule, guidance=0, dtype=FP32)
    ours = torch.stack([*pair.seen, result]).numpy()
    assert np.abs(ours - trajectory).max() <= 2e-6
    assert np.array_equal(ours[0], trajectory[0])


def exact_run(noise: Tensor, schedule: Schedule) -> Tensor:
    """The same formulas in fp64: what both fp32 runs are measured against."""
    x = last = m1 = m2 = noise.double()
    for t, c in zip(schedule.timesteps, unipc_coefficients(schedule), strict=True):
        m = x - c.sigma * toy_velocity(x, t)
        last = c.corrector_last * last + c.corrector_m * m + c.corrector_m1 * m1 + c.corrector_m2 * m2
        x = c.predictor_x * last + c.predictor_m * m + c.predictor_m1 * m1
        m2, m1 = m1, m
    return x


def test_agrees_with_an_independent_scheduler() -> None:
    diffusers = pytest.importorskip("diffusers")
    for steps in (1, 2, 3, 4, 5, 10, 11, 35, 100, 250):
        schedule, noise = base_schedule(steps), randn(steps)
        other = diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        )
        other.set_timesteps(sigmas=np.linspace(0.9990000128746033, 0, steps + 1)[:-1])
        assert other.sigmas.tolist() == list(schedule.sigmas)
        assert other.timesteps.tolist() == list(schedule.timesteps)
        theirs = noise
        for t in other.timesteps:
            theirs = other.step(toy_velocity(theirs, int(t)), t, theirs).prev_sample
        ours = sample(ToyPair(schedule), noise, schedule, guidance=0, dtype=FP32)
        if steps <= 35:
            assert (ours - theirs).abs().max() <= 2e-6, steps
        # fp32 rounding grows with the number of steps, so beyond 35 the rule is: no worse than they are.
        exact = exact_run(noise, schedule)
        assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-6, steps


def test_constant_velocity_is_followed_exactly() -> None:
    noise, v = randn(0), randn(1)
    for steps in (1, 2, 3, 7, 35):
        schedule = base_schedule(steps)
        seen: list[Tensor] = []

        def pair(z: Tensor, step: int, seen: list[Tensor] = seen) -> tuple[Tensor, Tensor]:
            seen.append(z)
            return v, v

        result = sample(pair, noise, schedule, guidance=3, dtype=FP32)
        for sigma, x in zip(schedule.sigmas, [*seen, result], strict=True):
            expected = noise.double() + (sigma - schedule.sigmas[0]) * v.double()
            assert (x - expected).abs().max() < 3e-6


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_result_is_the_last_data_prediction_bit_for_bit(steps: int) -> None:
    schedule = base_schedule(steps)
    pair = ToyPair(schedule)
    result = sample(pair, randn(3), schedule, guidance=0, dtype=FP32)
    z, sigma = pair.seen[-1], schedule.sigmas[steps - 1]
    assert torch.equal(result, z - sigma * toy_velocity(z, schedule.timesteps[-1]))


def test_guided_unipc_returns_new_tensors_and_skips_what_has_no_weight() -> None:
    assert list(inspect.signature(guided_unipc).parameters) == (
        "x v_cond v_uncond m1 m2 last guidance coefficients".split()
    )
    x, c, u = randn(0), randn(1), randn(2)
    nan = torch.full_like(x, NAN)
    coefficients = unipc_coefficients(base_schedule(4))
    x_next, m, corrected = guided_unipc(x, c, u, nan, nan, x, 2.0, tuple(coefficients[0]))
    assert torch.equal(corrected, x) and corrected.data_ptr() != x.data_ptr()
    assert torch.equal(m, x - coefficients[0].sigma * (c + 2.0 * (c - u)))
    assert torch.isfinite(x_next).all()
    # The last step does not depend on history at all.
    x_next, m, _ = guided_unipc(x, c, None, nan, nan, nan, 0.0, tuple(coefficients[3]))
    assert torch.equal(x_next, m) and x_next.data_ptr() != m.data_ptr()
    # bf16 velocities: arithmetic in fp32
    half = guided_unipc(x, c.bfloat16(), u.bfloat16(), x, x, x, 3.0, coefficients[0])
    full = guided_unipc(x, c.bfloat16().float(), u.bfloat16().float(), x, x, x, 3.0, coefficients[0])
    assert all(a.dtype == FP32 and torch.equal(a, b) for a, b in zip(half, full, strict=True))


# ---------------------------------------------------------------------------------------- guidance


def test_guidance_is_c_plus_g_times_c_minus_u() -> None:
    schedule, noise = base_schedule(6), randn(0)
    cond, uncond = randn(1), randn(2)

    def run(g: float, c: Tensor, u: Tensor | None) -> Tensor:
        return sample(
            lambda z, i: (c * (i + 1), None if u is None else u * (i + 1)), noise, schedule, guidance=g
        )

    for g in (1, 3, 7):
        combined = run(0, (1 + g) * cond - g * uncond, None)
        torch.testing.assert_close(run(g, cond, uncond), combined, atol=2e-4, rtol=1e-5)
        assert not torch.allclose(run(g, cond, uncond), run(g - 1, cond, uncond), atol=1e-2)
    assert torch.equal(run(0, cond, uncond), run(0, cond, None))
    with pytest.raises(ValueError, match="guidance 3 needs v_uncond, got None at step 0"):
        run(3, cond, None)


# ------------------------------------------------------------------------------------ known frames


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP32])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_known_frames_follow_a_line_and_end_slightly_noisy(dtype: torch.dtype, n: int) -> None:
    schedule, noise, gt = base_schedule(10), randn(0), randn(5, (1, 16, n, 4, 6))
    pair = ToyPair(schedule, lambda v: v * 0.5)

    def spoiled(z: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Whatever the network says about known frames must not count."""
        v_cond, v_uncond = pair(z, step)
        v_cond[:, :, :n], v_uncond[:, :, :n] = NAN, 1e9
        return v_cond, v_uncond

    result = sample(spoiled, noise, schedule, guidance=3, known=Known(gt), dtype=dtype)
    sigma = schedule.sigmas[0]
    expected = sigma * gt.double() + (1 - sigma) * noise[:, :, :n].double()
    assert (result[:, :, :n] - expected).abs().max() < 3e-6
    assert (result[:, :, :n] - gt).abs().max() > 1e-4  # not gt: the published model leaves 0.02 % noise
    for z in pair.seen:
        assert z.dtype == dtype and torch.equal(z[:, :, :n], gt.to(dtype))
    free = ToyPair(schedule, lambda v: v * 0.5)
    alone = sample(free, noise, schedule, guidance=3, dtype=dtype)
    assert torch.equal(result[:, :, n:], alone[:, :, n:])  # the toy field does not mix frames
    assert torch.equal(free.seen[0], noise.to(dtype))


def test_no_known_frames_and_images_change_nothing() -> None:
    schedule, noise = base_schedule(4), randn(0)
    plain = sample(ToyPair(schedule), noise, schedule, guidance=1)
    empty = Known(torch.empty(1, 16, 0, 4, 6))
    assert torch.equal(plain, sample(ToyPair(schedule), noise, schedule, guidance=1, known=empty))
    image = noise[:, :, :1].contiguous()
    known = Known(randn(5, tuple(image.shape)))
    distilled = distilled_schedule(4)

    def velocity(z: Tensor, step: int) -> Tensor:
        return toy_velocity(z.float(), 500)

    assert torch.equal(
        sample(ToyPair(schedule), image, schedule, guidance=1),
        sample(ToyPair(schedule), image, schedule, guidance=1, known=known),
    )
    assert torch.equal(
        sample_distilled(velocity, image, distilled),
        sample_distilled(velocity, image, distilled, known=known),
    )


def test_wrong_inputs_are_named() -> None:
    schedule, noise = base_schedule(2), randn(0)

    def run(noise: Tensor = noise, **options: object) -> Tensor:
        return sample(ToyPair(schedule), noise, schedule, guidance=0, **options)  # type: ignore[arg-type]

    for gt in (randn(0, (1, 16, 4, 4, 6)), randn(0, (1, 16, 1, 4, 5)), randn(0, (1, 16, 1, 4, 6)).bfloat16()):
        with pytest.raises(ValueError, match=r"known frames must be .*, got \(1, 16, "):
            run(known=Known(gt))
    with pytest.raises(ValueError, match=r"noise must be \(1, 16, T, H, W\) fp32, got .*bfloat16"):
        run(noise.bfloat16())
    with pytest.raises(ValueError, match="noise must be"):
        run(noise[0])
    for x0, weight in ((noise[:, :, :2], noise[0, 0]), (noise, noise[0, 0, :2])):
        with pytest.raises(ValueError, match="guide must have x0"):
            run(guide=Guide(x0, weight, 3))


# --------------------------------------------------------------------------------- guided generation


def make_guide(threshold: int) -> Guide:
    weight = torch.zeros(SHAPE[2:])
    weight[:, :, 2:4], weight[:, :, 4:] = 0.25, 1.0
    return Guide(randn(8).bfloat16(), weight, threshold)


@pytest.mark.parametrize("threshold", [-1, 0, 2, 5, 99])
def test_guide_shows_the_blend_to_the_network_but_not_to_the_solver(threshold: int) -> None:
    schedule, noise, guide = base_schedule(6), randn(0), make_guide(threshold)
    velocities = [randn(20 + i) for i in range(6)]
    seen: dict[bool, list[Tensor]] = {True: [], False: []}

    def run(guided: bool) -> Tensor:
        def pair(z: Tensor, step: int) -> tuple[Tensor, Tensor]:
            seen[guided].append(z)
            return velocities[step], velocities[step]

        return sample(pair, noise, schedule, guidance=3, guide=guide if guided else None, dtype=FP32)

    # The velocities ignore what the network sees, so the solver must not notice the guide.
    assert torch.equal(run(True), run(False))
    for i, (z, x) in enumerate(zip(seen[True], seen[False], strict=True)):
        if i > threshold:
            assert torch.equal(z, x)
            continue
        sigma = torch.tensor(schedule.sigmas[i], dtype=FP32)
        clean = (guide.x0_BCTHW.float() * (1 - sigma)).bfloat16().float()
        w = guide.weight_THW.expand(SHAPE)
        assert torch.equal(z, (clean + noise * sigma) * w + x * (1 - w))
        assert torch.equal(z[..., :2], x[..., :2])  # weight 0
        assert i == 0 or not torch.allclose(z[..., 4:], x[..., 4:], atol=1e-2)


def test_known_frames_win_over_the_guide() -> None:
    schedule, noise, gt = base_schedule(3), randn(0), randn(5, (1, 16, 1, 4, 6))
    pair, plain = ToyPair(schedule), ToyPair(schedule)
    sample(pair, noise, schedule, guidance=0, guide=make_guide(99), known=Known(gt))
    sample(plain, noise, schedule, guidance=0, guide=make_guide(99))
    for z, unknown in zip(pair.seen, plain.seen, strict=True):
        assert z.dtype == torch.bfloat16 and torch.equal(z[:, :, :1], gt.bfloat16())
        assert torch.equal(z[:, :, 1:], unknown[:, :, 1:])


def test_guide_works_for_an_image() -> None:
    schedule, noise = base_schedule(3), randn(0, (1, 16, 1, 4, 6))
    guide = Guide(randn(1, (1, 16, 1, 4, 6)).bfloat16(), torch.ones(1, 4, 6), 0)
    pair = ToyPair(schedule)
    sample(pair, noise, schedule, guidance=0, guide=guide, dtype=FP32)
    sigma = schedule.sigmas[0]
    assert (pair.seen[0] - (sigma * noise + (1 - sigma) * guide.x0_BCTHW.float())).abs().max() < 2e-6
