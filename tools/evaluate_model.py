"""Measure the embedded model on held-out simulator clips: does it do what its controls and prompts say?

    python tools/evaluate_model.py OUT.json [--device cuda] [--clips 24] [--data FOLDER] [--workers 6]

Clips are those of tools/data from HELD_OUT on, which training never sees, at a look and layout of their own; they are
rendered into FOLDER unless they lie there. Every control runs alone at weight 1. It is compared with two baselines:
weight 0 (the prompt alone) and the control of another clip; and with a ceiling: what the same measure says of the real
clip after a pass through the video VAE, which no result can beat. Goals say how far a control must be from the better
baseline; the share of the way from there to the ceiling is recorded beside it. Depth and segments of a result are read by the probe of tools/train/probe.py and compared with
the simulator's truth; the ceiling then holds the probe's own error too. Prompts are held-out captions with the main
object's colour changed, so that the controls alone cannot give the answer. Beside OUT.json a picture of the seam of a
two-chunk clip is written. Exit 0 even if goals fail: the record says which. Runs on a CPU with --clips 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tools" / "train")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from adherence_jobs import (  # noqa: E402
    LONG,
    MEASURES,
    Job,
    Where,
    prepare,
    run_ceiling,
    run_job,
    run_seam,
    start,
    write_files,
)
from probe import WEIGHTS as PROBE  # noqa: E402

from cosmos_fast import embedded  # noqa: E402
from cosmos_fast.formats import CONTROLS  # noqa: E402
from tools.data.colours import PALETTE  # noqa: E402

LONG_CLIP = 998
"""Number of the clip of two chunks, apart from the others."""

SMALLER_IS_BETTER = {"depth_si_rmse"}

CLEARLY: dict[str, tuple[str, float]] = {
    "edge_f1": ("times", 2.0),
    "blur_ssim": ("above", 0.15),
    "depth_si_rmse": ("times", 0.6),
    "seg_miou": ("times", 1.5),
}
"""What a control must do to the better of its two baselines: multiply it by so much at least (at most, where smaller is
better), or lie above it by so much."""

GOALS: dict[str, tuple[str, float]] = {
    **{
        f"{control}.{CLEARLY[name][0]}": ("<=" if name in SMALLER_IS_BETTER else ">=", CLEARLY[name][1])
        for control, name in MEASURES.items()
    },
    "edge_distilled.times": (">=", CLEARLY["edge_f1"][1]),
    "distilled_over_base.edge_f1": (">=", 0.85),
    "prompt.base": (">=", 0.7),
    "prompt.distilled": (">=", 0.7),
    "vae_psnr_db": (">=", 28.0),
    "overlap_psnr_db": (">=", 26.0),
}
"""Goal by metric. Chance at a colour is 1 in 8."""


def jobs_of(count: int, prompts: int, steps: int | None) -> list[Job]:
    jobs = []
    every = tuple(MEASURES.values())
    for k in range(count):
        other = (k + 1) % count if count > 1 else LONG_CLIP
        for control in CONTROLS:
            name = MEASURES[control]
            jobs.append(Job(control, k, {control: 1.0}, (k, other), (name,), control, steps=steps))
        jobs.append(Job("edge", k, {"edge": 0.0}, (k,), every, "weight_0", steps=steps))
        jobs.append(Job("edge/distilled", k, {"edge": 1.0}, (k, other), ("edge_f1",), "edge_distilled"))
        jobs.append(Job("edge/distilled", k, {"edge": 0.0}, (k,), ("edge_f1",), "weight_0_distilled"))
        if k < max(1, count // 3):
            shares = dict.fromkeys(CONTROLS, 0.25)
            jobs.append(Job("multi", k, shares, (k, other), every, "multi", steps=steps))
    colours = list(PALETTE)
    for p in range(prompts):
        colour = colours[(p // count + 3 * p) % len(colours)]
        for model, tag in (("edge", "prompt.base"), ("edge/distilled", "prompt.distilled")):
            own = None if model.endswith("distilled") else steps
            jobs.append(Job(model, p % count, {"edge": 1.0}, (), (), tag, colour, steps=own))
    # A few clips at a time, so that a run cut short has measured whole clips; within them one network after the other.
    return sorted(jobs, key=lambda job: (job.clip // 8, job.model))


# --- from clips to the record ---


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def gain(value: float, baselines: Sequence[float], ceiling: float, name: str) -> float:
    """Share of the way from the better baseline to the ceiling; 0 where the ceiling is no better than a baseline.

    Such a ceiling says that the VAE or the probe, not the network, is what fails, and then nothing was shown.
    """
    sign = -1 if name in SMALLER_IS_BETTER else 1
    best = max(sign * value for value in baselines)
    room = sign * ceiling - best
    return (sign * value - best) / room if room > 1e-6 else 0.0


def summary(done: Sequence[Mapping[str, Any]], ceilings: Sequence[Mapping[str, Any]], seam: Mapping[str, float]) -> dict[str, Any]:  # fmt: skip
    """Means over clips: each control beside its baselines and ceiling, prompts, VAE, seam."""

    def of(tag: str, name: str, which: int = 0) -> list[float]:
        return [d["values"][which][name] for d in done if d["tag"] == tag]

    rows: dict[str, dict[str, float]] = {}
    table = {control: (control, "weight_0", MEASURES[control]) for control in CONTROLS}
    table["edge_distilled"] = ("edge_distilled", "weight_0_distilled", "edge_f1")
    table |= {f"multi_{control}": ("multi", "weight_0", MEASURES[control]) for control in CONTROLS}
    for row, (tag, zero, name) in table.items():
        ceiling = mean([c["ceiling"][name] for c in ceilings])
        value, off, other = mean(of(tag, name)), mean(of(zero, name)), mean(of(tag, name, 1))
        rows[row] = {"value": value, "weight_0": off, "shuffled": other, "ceiling": ceiling,
                     "gain": gain(value, (off, other), ceiling, name)}  # fmt: skip
    prompt = {
        tag: {"right": sum(d["colour"] == d["asked"] for d in done if d["tag"] == f"prompt.{tag}"),
              "of": sum(d["tag"] == f"prompt.{tag}" for d in done)}
        for tag in ("base", "distilled")
    }  # fmt: skip
    return {
        "controls": rows, "prompt": prompt,
        "prompt_judge_right": mean([float(c["colour"]) for c in ceilings]),
        "probe": {name: mean([c["probe"][name] for c in ceilings]) for name in ("depth_si_rmse", "seg_miou")},
        "vae_psnr_db": mean([c["vae_psnr_db"] for c in ceilings]), **seam,
    }  # fmt: skip


def over_baseline(row: Mapping[str, float], name: str) -> float:
    """A control's result over the better of its baselines, as CLEARLY counts it for this measure."""
    better = min if name in SMALLER_IS_BETTER else max
    base = better(row["weight_0"], row["shuffled"])
    return row["value"] - base if CLEARLY[name][0] == "above" else row["value"] / max(base, 1e-9)


def goals(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = found["controls"]
    named = {**MEASURES, "edge_distilled": "edge_f1"}
    values = {f"{row}.{CLEARLY[name][0]}": over_baseline(rows[row], name) for row, name in named.items()}
    values["distilled_over_base.edge_f1"] = rows["edge_distilled"]["value"] / max(rows["edge"]["value"], 1e-9)
    values |= {f"prompt.{tag}": n["right"] / max(n["of"], 1) for tag, n in found["prompt"].items()}
    values |= {name: found[name] for name in ("vae_psnr_db", "overlap_psnr_db")}
    return [
        {
            "metric": name,
            "rule": rule,
            "goal": goal,
            "value": values[name],
            "passed": bool(values[name] <= goal if rule == "<=" else values[name] >= goal),
        }
        for name, (rule, goal) in GOALS.items()
    ]


def environment(device: str) -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    is_gpu = device.startswith("cuda")
    return {
        "gpu": torch.cuda.get_device_name() if is_gpu else "cpu", "torch": torch.__version__, "cuda": torch.version.cuda,
        "commit": os.environ.get("COMMIT", commit), "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--prompts", type=int, help="default: 100 on a GPU, 2 on a CPU")
    parser.add_argument("--steps", type=int, help="steps of the base models; default: the model's own")
    parser.add_argument(
        "--data", type=Path, help="folder of rendered held-out clips; filled where it lacks some"
    )
    parser.add_argument("--workers", type=int, help="processes; default: 6 on a GPU, 1 on a CPU")
    parser.add_argument("--prepare", action="store_true", help="only render the clips into --data")
    parser.add_argument(
        "--model-folder", type=Path, help="packed model to measure; default: the one that ships"
    )
    parser.add_argument("--deadline-s", type=float, help="start no more clips after so many seconds")
    parser.add_argument("--probe", type=Path, default=PROBE, help="weights of the depth and segment probe")
    args = parser.parse_args(argv)
    is_gpu = args.device.startswith("cuda")
    began = time.time()
    with tempfile.TemporaryDirectory() as scratch:
        data, media = args.data or Path(scratch) / "data", Path(scratch) / "media"
        media.mkdir()
        prepare(data, args.clips)
        prepare(data, 1, LONG, first=LONG_CLIP)
        if args.prepare:
            return 0
        rendered = time.time()
        for k in (*range(args.clips), LONG_CLIP):
            write_files(data, media, k)
        where = Where(data, media, args.device, is_gpu, {"folder": args.model_folder, "probe": args.probe})
        jobs = jobs_of(args.clips, args.prompts or (100 if is_gpu else 2), args.steps)
        workers = args.workers or (6 if is_gpu else 1)
        seam_file = args.out.with_suffix(".jpg")
        with ProcessPoolExecutor(workers, get_context("spawn"), start, (where,)) as pool:
            seam = pool.submit(run_seam, LONG_CLIP, str(seam_file), args.steps)
            ceilings = [pool.submit(run_ceiling, k) for k in range(args.clips)]
            futures = [pool.submit(run_job, job) for job in jobs]
            wait(futures, timeout=None if args.deadline_s is None else began + args.deadline_s - time.time())
            left_out = sum(future.cancel() for future in futures)
            done = [future.result() for future in futures if not future.cancelled()]
            found = summary(done, [c.result() for c in ceilings], seam.result())
    record = {
        "kind": "embedded", "environment": environment(args.device), "clips": args.clips, "steps": args.steps, "left_out": left_out,
        "model": embedded_hashes(args.model_folder), "seconds": {"rendering": rendered - began, "measuring": time.time() - rendered},
        "embedded": found, "goals": goals(found), "per_clip": done,
    }  # fmt: skip
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    for goal in record["goals"]:
        print(
            f"{'pass' if goal['passed'] else 'FAIL'}  {goal['metric']:<30} {goal['value']:8.3f}  goal {goal['rule']} {goal['goal']}"
        )
    if left_out:
        print(f"{left_out} of {len(jobs)} clips were not made: the time was up")
    print(f"{args.out}, {seam_file}: {record['seconds']['measuring']:.0f} s")
    return 0


def embedded_hashes(folder: Path | None) -> dict[str, str]:
    if folder:
        embedded.FOLDER = folder  # type: ignore[misc]
    return {name: file["sha256"][:16] for name, file in embedded.index()["files"].items()}


if __name__ == "__main__":
    sys.exit(main())
