"""What tools/report.py says of the model inside the package: the `embedded` part of a record of tools/evaluate_model.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SCORES = {
    "edge": "edge F1", "vis": "SSIM of the blur", "depth": "depth si-RMSE (less is better)", "seg": "segments, mean IoU",
    "edge_distilled": "edge F1, four steps", "multi_edge": "edge F1, all four controls at 0.25",
    "multi_vis": "SSIM of the blur, all four", "multi_depth": "depth si-RMSE, all four", "multi_seg": "mean IoU, all four",
}  # fmt: skip
FIGURES = {"edge": "edge_f1", "vis": "blur_ssim", "depth": "depth_si_rmse", "seg": "seg_miou"}
MODELS = {"base": "base", "distilled": "four steps"}
DECIBELS = {"vae_psnr_db": "VAE, PSNR dB", "overlap_psnr_db": "frame that two chunks share, PSNR dB"}
Table = tuple[list[str], list[list[str]]]


def tables(clips: int, one: Mapping[str, Any]) -> tuple[Table, Table]:
    """(head, rows) of adherence beside its baselines and ceiling, then of all else."""
    head = [f"{clips} held-out clips", "result", "without control", "control of another clip",
            "real clip through the VAE", "% of the way"]  # fmt: skip
    parts = ("value", "weight_0", "shuffled", "ceiling")
    scores = ((title, one["controls"][key]) for key, title in SCORES.items() if key in one["controls"])
    rows = [
        [title, *(f"{score[part]:.3f}" for part in parts), f"{100 * score['gain']:.0f}"]
        for title, score in scores
    ]
    counts = ((title, one["prompt"][model]) for model, title in MODELS.items())
    other = [[f"colour asked for, {title}", f"{n['right']} of {n['of']}"] for title, n in counts]
    other += [[title, f"{one[key]:.1f}"] for key, title in DECIBELS.items()]
    return (head, rows), (["", "result"], other)


def verdict(goals: Sequence[Mapping[str, Any]]) -> str:
    missed = [goal["metric"] for goal in goals if not goal["passed"]]
    return f"Goals missed: {', '.join(missed)}." if missed else f"All {len(goals)} goals are met."


def figures(one: Mapping[str, Any]) -> Iterator[tuple[str, float, str]]:
    """(key, value, unit): edge_f1.base, edge_f1.distilled, edge_gain.base, ..., prompt.base, vae_psnr_db, overlap_psnr_db."""
    for row, values in one["controls"].items():
        lead, _, rest = row.partition("_")
        control, model = (rest, "multi") if lead == "multi" else (lead, rest or "base")
        yield f"{FIGURES[control]}.{model}", values["value"], "1"
        yield f"{control}_gain.{model}", values["gain"], "1"
    for model, counts in one["prompt"].items():
        yield f"prompt.{model}", counts["right"] / max(counts["of"], 1), "1"
    for key in DECIBELS:
        yield key, one[key], "dB"
