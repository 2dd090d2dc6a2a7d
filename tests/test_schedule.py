"""Time grids, initial noise and solver coefficients against golden data and worked values."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from cosmos_fast.formats import SpecError
from cosmos_fast.schedule import (
    base_schedule,
    base_times,
    distilled_noise,
    distilled_schedule,
    distilled_times,
    noise,
    unipc_coefficients,
)

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def unipc() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "unipc.npz") as data:
        return {key: data[key] for key in data if not key.startswith("kerras")}


# --------------------------------------------------------------------------------------- time grids


@pytest.mark.parametrize("steps", [1, 4, 10, 35])
def test_base_schedule_equals_golden(unipc: dict[str, np.ndarray], steps: int) -> None:
    schedule = base_schedule(steps)
    assert np.array_equal(np.array(schedule.sigmas, np.float32), unipc[f"n{steps}_sigmas"])
    assert list(schedule.timesteps) == unipc[f"n{steps}_timesteps"].tolist()
    assert all(float(np.float32(s)) == s for s in schedule.sigmas)
    times = base_times(schedule)
    assert times.dtype == torch.int64 and times.shape == (steps, 1)
    assert times[:, 0].tolist() == list(schedule.timesteps)


def test_base_schedule_is_usable_up_to_its_limit() -> None:
    for steps in range(1, 251):
        schedule = base_schedule(steps)
        assert schedule.steps == len(schedule.timesteps) == len(schedule.sigmas) - 1 == steps
        assert all(a > b for a, b in itertools.pairwise(schedule.sigmas))
        # A repeated first timestep is what breaks the published solver.
        assert schedule.timesteps.count(schedule.timesteps[0]) == 1
        assert schedule.sigmas[-1] == 0


@pytest.mark.parametrize("steps", [0, -1, 251, 2.0, True, "4"])
def test_base_schedule_rejects(steps: object) -> None:
    with pytest.raises(ValueError, match=r"steps must be an integer in 1\.\.250, got"):
        base_schedule(steps)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [0, -3, 1.5, False])
def test_distilled_schedule_rejects(steps: object) -> None:
    with pytest.raises(SpecError, match="steps must be an integer >= 1, got"):
        distilled_schedule(steps)  # type: ignore[arg-type]


def test_distilled_schedule_takes_the_trained_angles() -> None:
    angles = (math.pi / 2, math.atan(15), math.atan(5), math.atan(5 / 3))
    times = (1.0, 15 / 16, 5 / 6, 5 / 8)
    for steps in (1, 2, 3, 4):
        schedule = distilled_schedule(steps)
        assert schedule.angles == (*angles[:steps], 0.0)
        assert schedule.sigmas == (*(float(np.float32(t)) for t in times[:steps]), 0.0)
        assert schedule.timesteps == (1.0, 0.9375, 0.83203125, 0.625)[:steps]


def test_distilled_schedule_beyond_four_steps_is_the_shifted_uniform_grid() -> None:
    schedule = distilled_schedule(6)
    # u = 1, 5/6, 2/3, 1/2, 1/3, 1/6 under t = 5u / (1 + 4u)
    expected = (1, 25 / 26, 10 / 11, 5 / 6, 5 / 7, 1 / 2, 0)
    np.testing.assert_allclose(schedule.sigmas, expected, atol=1e-7)
    np.testing.assert_allclose(np.tan(schedule.angles[1:6]), (25, 10, 5, 2.5, 1), rtol=2e-6)
    assert schedule.angles[0] == math.pi / 2 and schedule.angles[6] == 0
    assert distilled_schedule(35).steps == 35


def test_distilled_times_are_bf16_per_frame() -> None:
    times = distilled_times(distilled_schedule(4), 3, 1)
    assert times.dtype == torch.bfloat16 and times.shape == (4, 3)
    expected = [1.0, 0.9375, 0.83203125, 0.625]
    assert times[:, 1].tolist() == times[:, 2].tolist() == expected
    clean = torch.tensor(1e-4 / (1 + 1e-4)).bfloat16().item()
    assert times[:, 0].tolist() == [clean] * 4 and abs(clean - 1.0014e-4) < 1e-8
    assert distilled_times(distilled_schedule(4), 3, 0)[:, 0].tolist() == expected
    assert distilled_times(distilled_schedule(4), 1, 1)[:, 0].tolist() == expected  # an image
    with pytest.raises(ValueError, match=r"n_known must be in 0\.\.3, got 4"):
        distilled_times(distilled_schedule(4), 3, 4)


def test_schedules_print_and_are_not_mixed_up() -> None:
    assert "0.999799848  t 999" in str(base_schedule(2)) and "2 steps" in str(base_schedule(2))
    assert "0.833333313  t 0.83203125" in str(distilled_schedule(4))
    base, distilled = base_schedule(2), distilled_schedule(2)
    calls = (
        lambda: base_times(distilled),
        lambda: distilled_times(base, 3, 0),
        lambda: unipc_coefficients(distilled),
    )
    for call in calls:
        with pytest.raises(ValueError, match="schedule must be of kind"):
            call()


# ------------------------------------------------------------------------------------------- noise


def test_noise_equals_golden() -> None:
    with np.load(GOLDEN / "noise.npz") as data:
        for key in data:
            seed = int(key.split("_")[0].removeprefix("seed"))
            drawn = noise(seed, data[key].shape)
            assert drawn.dtype == torch.float32 and np.array_equal(drawn.numpy(), data[key])


def test_noise_check_values_at_full_size() -> None:
    drawn = noise(584845, (1, 16, 24, 88, 160))
    flat = drawn.flatten()
    expected = [0.32049167, 0.5134776, -2.5528393, 0.15180087, -0.73744297]
    assert flat[:5].numpy().tobytes() == np.array(expected, np.float32).tobytes()
    assert flat[-1].item() == np.float32(0.77362579)
    assert abs(drawn.double().mean().item() + 6.6397e-4) < 5e-9
    assert abs(drawn.double().std().item() - 1.00032) < 5e-6
    assert abs(drawn.double().abs().sum().item() - 4316300.608) < 5e-3
    with pytest.raises(ValueError, match="seed must be in"):
        noise(-1, (1,))


def test_distilled_noise_is_seeded_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (distilled_noise(seed, (1, 16, 3, 4, 6), "cpu") for seed in (7, 7, 8))
    assert first.dtype == torch.float32 and first.shape == (1, 16, 3, 4, 6)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------ solver coefficients


def test_coefficients_match_the_worked_values_of_step_two() -> None:
    c = unipc_coefficients(base_schedule(35))[2]
    sigma, gain = 0.987816691, -(1 - 0.987816691) * -0.5063515
    rho1, rho2, r = 0.0283172, 0.5300276, -4.8373938
    expected = (0.987816691 / 0.993948400, gain * rho2, gain * (1 - rho1 / r - rho2), gain * rho1 / r)
    np.testing.assert_allclose(c[:5], (sigma, *expected), rtol=5e-6)
    gain, r = -(1 - 0.981384158) * -0.3498028, -1.6398728
    expected_p = (0.981384158 / 0.987816691, gain * (1 - 0.5 / r), gain * 0.5 / r)
    np.testing.assert_allclose(c[5:], expected_p, rtol=5e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 35, 250])
def test_coefficients_keep_a_straight_line_straight(steps: int) -> None:
    """On x = (1 - sigma) m + sigma e with constant m every step must land on the same line."""
    schedule = base_schedule(steps)
    sigmas = schedule.sigmas
    for i, c in enumerate(unipc_coefficients(schedule)):
        assert all(math.isfinite(value) for value in c)
        assert c.predictor_x * sigmas[i] == pytest.approx(sigmas[i + 1], abs=1e-15)
        assert c.predictor_x * (1 - sigmas[i]) + c.predictor_m + c.predictor_m1 == pytest.approx(
            1 - sigmas[i + 1], abs=1e-13
        )
        if i == 0:
            assert c[1:5] == (1, 0, 0, 0)
        else:
            moved = c.corrector_last * (1 - sigmas[i - 1])
            moved += c.corrector_m + c.corrector_m1 + c.corrector_m2
            assert moved == pytest.approx(1 - sigmas[i], abs=1e-13)
    assert (c.predictor_x, c.predictor_m, c.predictor_m1) == (0, 1, 0)
