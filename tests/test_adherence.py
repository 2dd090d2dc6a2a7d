"""The measures of tools/evaluate_model.py: right on what is known, worse where the picture is worse, blind to what they must not see."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tools" / "train")]

from adherence import blur_ssim, edge_f1, main_colour, mean_iou, psnr, recoloured, ssim  # noqa: E402
from evaluate_model import CONTROLS, GOALS, gain, goals, jobs_of, summary  # noqa: E402
from probe import CLASSES, Probe, aligned_error, class_table, loss_of  # noqa: E402


def boxes(shift: int = 0, colour: tuple[int, int, int] = (220, 30, 30)) -> np.ndarray:
    frames = np.full((2, 96, 128, 3), 40, np.uint8)
    frames[:, 30 + shift : 60 + shift, 40 + shift : 80 + shift] = colour
    return frames


def test_edges_may_move_by_the_tolerance_and_no_more() -> None:
    assert edge_f1(boxes(), boxes()) == 1.0
    assert edge_f1(boxes(2), boxes()) > 0.95
    assert edge_f1(boxes(8), boxes()) < 0.35
    assert edge_f1(boxes(colour=(30, 200, 30)), boxes()) > 0.95  # colour is the prompt's business
    noisy = np.random.default_rng(0).integers(0, 256, boxes().shape, dtype=np.uint8)
    assert edge_f1(noisy, boxes()) < 0.25  # edges everywhere are no answer
    blank = np.full_like(boxes(), 40)
    assert edge_f1(blank, boxes()) == 0.0 and edge_f1(blank, blank) == 1.0 and edge_f1(boxes(), blank) == 0.0


def test_similarity_and_noise_in_known_cases() -> None:
    x = boxes()
    assert ssim(x, x) == pytest.approx(1.0) and blur_ssim(x, x) == pytest.approx(1.0)
    assert blur_ssim(boxes(6), x) < 0.99 < blur_ssim(boxes(1), x) and ssim(255 - x, x) < 0.5
    assert psnr(x, x) == 99.0
    assert psnr(np.full((1, 4, 4, 3), 110, np.uint8), np.full((1, 4, 4, 3), 100, np.uint8)) == pytest.approx(
        28.13, abs=0.01
    )


def test_depth_counts_after_the_best_fit_but_never_upside_down() -> None:
    truth = np.linspace(0, 1, 1000).reshape(1, 20, 50)
    assert aligned_error(3 * truth - 7, truth) < 1e-6
    assert aligned_error(-truth, truth) == pytest.approx(truth.std())
    assert aligned_error(np.zeros_like(truth), truth) == pytest.approx(truth.std())


def test_classes_and_their_overlap() -> None:
    table = class_table(["sky", "table", "robot arm", "mug", "tree 3", "oncoming car 1"], [0])
    named = [CLASSES[table[k]] for k in range(6)]
    assert named == ["background", "surface", "robot arm", "thing", "roadside", "thing"]
    truth = np.array([[0, 0, 1, 1]])
    assert mean_iou(truth, truth, 5) == 1.0
    assert mean_iou(np.array([[0, 0, 0, 0]]), truth, 5) == pytest.approx((0.5 + 0) / 2)


def test_colour_of_the_main_object_and_prompts_with_another() -> None:
    mask = np.zeros((2, 96, 128), bool)
    mask[:, 30:60, 40:80] = True
    assert main_colour(boxes(), mask) == "red" and main_colour(boxes(colour=(20, 60, 220)), mask) == "blue"
    assert recoloured("A red mug on a table.", "red", "orange") == "An orange mug on a table."
    assert recoloured("It lifts an orange ball; orange.", "orange", "blue") == "It lifts a blue ball; orange."
    assert recoloured("A striped red mug.", "red", "white") == "A striped white mug."
    with pytest.raises(ValueError, match="must name green"):
        recoloured("A coloured mug, greenish.", "green", "red")
    with pytest.raises(ValueError, match="must be one of"):
        recoloured("A red mug.", "red", "pink")


def test_probe_learns_depth_and_classes_of_a_picture() -> None:
    torch.manual_seed(0)
    probe = Probe()
    truth = torch.linspace(0, 1, 32)[None, :, None].expand(2, 32, 32)
    classes = (truth > 0.5).long()
    x = truth[:, None].expand(2, 3, 32, 32) * 2 - 1
    optimiser = torch.optim.AdamW(probe.parameters(), lr=3e-3)
    first = None
    for _ in range(20):
        loss = loss_of(*probe(x), truth, classes)
        first = first or float(loss.detach())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.6 * first
    depth, kinds = probe.eval().read(((x + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    assert depth.shape == kinds.shape == (2, 32, 32)
    assert mean_iou(kinds, classes.numpy(), 2) > 0.6


def test_gain_is_the_way_from_the_better_baseline_and_nothing_below_it() -> None:
    assert gain(0.8, (0.2, 0.4), 0.9, "edge_f1") == pytest.approx(0.8)
    assert gain(0.12, (0.3, 0.2), 0.1, "depth_si_rmse") == pytest.approx(0.8)
    assert gain(0.3, (0.2, 0.4), 0.9, "edge_f1") < 0 and gain(0.25, (0.3, 0.2), 0.1, "depth_si_rmse") < 0
    assert gain(0.3, (0.2, 0.4), 0.35, "edge_f1") == 0.0  # a ceiling below a baseline measures nothing
    assert gain(0.1, (0.2, 0.2), 0.3, "depth_si_rmse") == 0.0


def done(jobs: list, value: float, other: float, right: bool) -> list[dict]:
    return [
        {"tag": job.tag, "clip": job.clip, "asked": job.colour, "colour": job.colour if right else "none",
         "values": [dict.fromkeys(job.measures, value if k == 0 else other) for k in range(len(job.against))]}
        for job in jobs
    ]  # fmt: skip


def test_every_job_counts_once_and_goals_fail_where_results_are_no_better_than_baselines() -> None:
    jobs = jobs_of(3, 8, None)
    tags = [job.tag for job in jobs]
    assert {tag: tags.count(tag) for tag in ("edge", "seg", "weight_0", "multi", "prompt.base")} == {
        "edge": 3, "seg": 3, "weight_0": 3, "multi": 1, "prompt.base": 8,
    }  # fmt: skip
    assert len({job.colour for job in jobs if job.tag == "prompt.base"}) >= 6
    assert all(job.against[1] != job.clip for job in jobs if len(job.against) == 2)
    best = {"edge_f1": 0.9, "blur_ssim": 0.9, "depth_si_rmse": 0.1, "seg_miou": 0.9}
    ceilings = [{"ceiling": best, "probe": best, "vae_psnr_db": 31.0, "colour": True}]
    seam = {"overlap_psnr_db": 30.0, "seam_change_over_median": 1.0}

    def passed(made: list[dict]) -> dict[str, bool]:
        return {goal["metric"]: goal["passed"] for goal in goals(summary(made, ceilings, seam))}

    zero = [job for job in jobs if job.tag.startswith("weight_0")]
    others = [job for job in jobs if not job.tag.startswith("weight_0")]
    good = passed(done(zero, 0.4, 0.4, True) + done(others, 0.8, 0.4, True))
    assert set(good) == set(GOALS)
    clear = {name for name in GOALS if name.endswith((".times", ".above"))}
    assert {name for name in clear if not good[name]} == {"depth.times"}  # 0.8 is far for an error
    assert len(clear) == len(CONTROLS) + 1
    bad = passed(done(zero, 0.4, 0.4, False) + done(others, 0.4, 0.4, False))
    assert not any(bad[name] for name in bad if name in clear or name.startswith("prompt"))
    assert bad["vae_psnr_db"] and bad["overlap_psnr_db"]
