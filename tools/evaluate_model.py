"""Measure the embedded model on held-out simulator clips: does it do what its controls and prompts say?

    python tools/evaluate_model.py OUT.json [--device cuda] [--clips 24] [--data FOLDER] [--workers 6]

Clips are those of tools/data from HELD_OUT on, which training never sees, at a look and layout of their own; they are
rendered into FOLDER unless they lie there. Every control runs alone at weight 1. It is compared with two baselines:
weight 0 (the prompt alone) and the control of another clip; and with a ceiling: what the same measure says of the real
clip after a pass through the video VAE, which no result can beat. What counts is the share of the way from the better
baseline to that ceiling. Depth and segments of a result are read by the probe of tools/train/probe.py and compared with
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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tools" / "train")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from adherence import blur_ssim, edge_f1, main_colour, mean_iou, psnr, recoloured  # noqa: E402
from probe import CLASSES, Probe, aligned_error, class_table  # noqa: E402
from probe import WEIGHTS as PROBE  # noqa: E402

from cosmos_fast import embedded, testing, video  # noqa: E402
from cosmos_fast.chunking import Chunk  # noqa: E402
from cosmos_fast.engine import Engine  # noqa: E402
from cosmos_fast.formats import CONTROLS  # noqa: E402
from cosmos_fast.recipe import Plan, Recipe  # noqa: E402
from cosmos_fast.spec import Spec  # noqa: E402
from tools.data.colours import PALETTE  # noqa: E402

FRAMES, LONG, FPS = 17, 33, 10
HELD_OUT = 1_000_000
LONG_CLIP = 998
"""Number of the clip of two chunks, apart from the others."""

SEED = 0
MEASURES = {"edge": "edge_f1", "vis": "blur_ssim", "depth": "depth_si_rmse", "seg": "seg_miou"}
SMALLER_IS_BETTER = {"depth_si_rmse"}

GOALS: dict[str, tuple[str, float]] = {
    **{f"gain.{control}": (">=", 0.5) for control in CONTROLS},
    "gain.edge_distilled": (">=", 0.5),
    "distilled_over_base.edge_f1": (">=", 0.85),
    "prompt.base": (">=", 0.8),
    "prompt.distilled": (">=", 0.68),
    "vae_psnr_db": (">=", 28.0),
    "overlap_psnr_db": (">=", 26.0),
}
"""Goal by metric. gain: share of the way from the better baseline to the ceiling. Chance at a colour is 1 in 8."""


# --- held-out clips ---


@dataclass(frozen=True)
class Held:
    """One held-out clip: rgb (F, H, W, 3), depth (F, H, W) inverse, labels (F, H, W), seg (F, H, W, 3), all uint8."""

    rgb: np.ndarray
    depth: np.ndarray
    labels: np.ndarray
    seg: np.ndarray
    caption: str
    attributes: Mapping[str, Any]

    @property
    def classes(self) -> np.ndarray:
        return class_table(self.attributes["labels"], self.attributes["background"])[self.labels]

    @property
    def main(self) -> np.ndarray:
        return self.labels == self.attributes["main"]


def npz(folder: Path, k: int) -> Path:
    return folder / f"held_out_{k:03d}.npz"


def prepare(folder: Path, count: int, frames: int = FRAMES, first: int = 0) -> None:
    """Render the clips that the folder lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(first, first + count):
        if npz(folder, k).exists():
            continue
        from tools.data.render import render_clip

        clip = render_clip(HELD_OUT + k, SEED, frames)
        told = json.dumps({"caption": clip.caption, "attributes": clip.attributes})
        part = folder / f".{k}.npz"
        np.savez_compressed(
            part, rgb=clip.rgb, depth=clip.depth8, labels=clip.labels, seg=clip.seg, told=told
        )
        part.replace(npz(folder, k))


@cache
def held(folder: Path, k: int) -> Held:
    """Clip k, its pictures also as lossless files beside it, which is what requests take."""
    with np.load(npz(folder, k), allow_pickle=False) as file:
        told = json.loads(str(file["told"]))
        clip = Held(
            *(file[name] for name in ("rgb", "depth", "labels", "seg")), told["caption"], told["attributes"]
        )
    return clip


def write_files(folder: Path, media: Path, k: int) -> None:
    clip = held(folder, k)
    pictures = {"rgb": clip.rgb, "depth": np.repeat(clip.depth[..., None], 3, axis=3), "seg": clip.seg}
    for name, frames in pictures.items():
        size = (frames.shape[2], frames.shape[1])
        with video.Writer(media / f"{k}_{name}.mkv", size, FPS, codec="ffv1") as writer:
            writer.write(frames)


# --- jobs ---


@dataclass(frozen=True)
class Job:
    """One generated clip. `against`: clips whose truth it is measured by, its own first. colour: asked for, if any."""

    model: str
    clip: int
    controls: Mapping[str, float]
    against: tuple[int, ...]
    measures: tuple[str, ...]
    tag: str
    colour: str = ""
    steps: int | None = None


@dataclass
class Where:
    data: Path
    media: Path
    device: str
    graphs: bool
    settings: dict[str, Any] = field(default_factory=dict)


_where: Where | None = None
_engines: dict[str, Engine] = {}


def start(where: Where) -> None:
    global _where
    _where = where
    torch.set_num_threads(1 if where.device.startswith("cuda") else (os.cpu_count() or 1))
    testing.kernels_from_checkout()


def engine(model: str) -> Engine:
    assert _where is not None
    if model not in _engines:
        recipe = Recipe.exact() if _where.device.startswith("cuda") else Recipe.fp32()
        _engines[model] = Engine(
            model=model, recipe=recipe, plan=Plan(device=_where.device, graphs=_where.graphs)
        )
    return _engines[model]


@cache
def probe() -> Probe:
    assert _where is not None
    return Probe.load(_where.settings["probe"], _where.device)


def spec_of(job: Job, name: str = "x", frames: int | None = None) -> Spec:
    assert _where is not None
    own, media = held(_where.data, job.clip), _where.media
    prompt = recoloured(own.caption, own.attributes["colour"], job.colour) if job.colour else own.caption
    fields: dict[str, Any] = {
        "prompt": prompt,
        "video_path": media / f"{job.clip}_rgb.mkv",
        "seed": 2025 + job.clip,
    }
    for control, weight in job.controls.items():
        fields[control] = {"control_weight": weight}
        if control in ("depth", "seg"):
            fields[control]["control_path"] = media / f"{job.clip}_{control}.mkv"
    if job.steps:
        fields["num_steps"] = job.steps
    return Spec(name=name, max_frames=frames, **fields)


def measured(frames: np.ndarray, truth: Held, names: Sequence[str]) -> dict[str, float]:
    values: dict[str, float] = {}
    if "edge_f1" in names:
        values["edge_f1"] = edge_f1(frames, truth.rgb[: len(frames)])
    if "blur_ssim" in names:
        values["blur_ssim"] = blur_ssim(frames, truth.rgb[: len(frames)])
    if {"depth_si_rmse", "seg_miou"} & set(names):
        depth, classes = probe().read(frames)
        if "depth_si_rmse" in names:
            values["depth_si_rmse"] = aligned_error(
                depth, truth.depth[: len(frames)].astype(np.float32) / 255
            )
        if "seg_miou" in names:
            values["seg_miou"] = mean_iou(classes, truth.classes[: len(frames)], len(CLASSES))
    return values


def run_job(job: Job) -> dict[str, Any]:
    """Generate one clip and measure it; {"tag", "values": one dict per clip of `against`, "colour"}."""
    assert _where is not None
    frames = engine(job.model).generate(spec_of(job)).frames
    own = held(_where.data, job.clip)
    return {
        "tag": job.tag, "clip": job.clip, "asked": job.colour,
        "values": [measured(frames, held(_where.data, k), job.measures) for k in job.against],
        "colour": main_colour(frames, own.main) if job.colour else None,
    }  # fmt: skip


def run_ceiling(k: int) -> dict[str, Any]:
    """What the measures say of a real clip after a pass through the VAE, and of the clip itself."""
    assert _where is not None
    own = held(_where.data, k)
    frames = through_vae(engine("edge"), own.rgb)
    names = tuple(MEASURES.values())
    raw = {
        name: value
        for name, value in measured(own.rgb, own, names).items()
        if name in ("depth_si_rmse", "seg_miou")
    }
    return {
        "ceiling": measured(frames, own, names), "probe": raw, "vae_psnr_db": psnr(frames, own.rgb),
        "colour": main_colour(own.rgb, own.main) == own.attributes["colour"],
    }  # fmt: skip


@torch.inference_mode()
def through_vae(engine: Engine, rgb: np.ndarray) -> np.ndarray:
    from cosmos_fast import ops

    x = ops.normalized(torch.from_numpy(rgb).to(engine.device), engine.dtype)
    z = engine.vae.encode(x, engine.plan.vae_encode_window)
    parts = [ops.pixels(p).cpu() for p in engine.vae.decode_stream(z, engine.plan.vae_decode_window)]
    return torch.cat(parts).numpy()


def run_seam(k: int, picture: str, steps: int | None) -> dict[str, float]:
    """A clip of two chunks: do the frames that both chunks make agree, and does the seam stand out?"""
    assert _where is not None
    made: list[np.ndarray] = []

    class Watched(Engine):
        def _part(self, chunk: Chunk, seed: int, decoded: np.ndarray, given: Any) -> Any:
            made.append(decoded)
            return super()._part(chunk, seed, decoded, given)

    base = engine("edge")
    watched = Watched.__new__(Watched)
    watched.__dict__ = base.__dict__
    frames = watched.generate(
        spec_of(Job("edge", k, {"edge": 1.0}, (), (), "seam", steps=steps), frames=LONG)
    ).frames
    overlap = psnr(made[0][-1], made[1][0])
    change = np.abs(np.diff(frames.astype(np.float32), axis=0)).mean((1, 2, 3))
    inside = np.delete(change, FRAMES - 1)
    source = held(_where.data, k).rgb
    columns = range(FRAMES - 3, FRAMES + 3)
    rows = [np.concatenate([clip[i] for i in columns], axis=1) for clip in (source, frames)]
    video.write_image(Path(picture), np.concatenate(rows))
    return {
        "overlap_psnr_db": overlap,
        "seam_change_over_median": float(change[FRAMES - 1] / np.median(inside)),
    }


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
    # One network after the other, so that few workers load more than one.
    return sorted(jobs, key=lambda job: job.model)


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


def goals(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = found["controls"]
    values = {f"gain.{name}": rows[name]["gain"] for name in (*CONTROLS, "edge_distilled")}
    values["distilled_over_base.edge_f1"] = rows["edge_distilled"]["value"] / max(rows["edge"]["value"], 1e-9)
    values |= {f"prompt.{tag}": n["right"] / max(n["of"], 1) for tag, n in found["prompt"].items()}
    values |= {name: found[name] for name in ("vae_psnr_db", "overlap_psnr_db")}
    return [
        {
            "metric": name,
            "rule": rule,
            "goal": goal,
            "value": values[name],
            "passed": bool(values[name] >= goal),
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
        with ProcessPoolExecutor(workers, get_context("spawn"), _begin, (where,)) as pool:
            seam = pool.submit(run_seam, LONG_CLIP, str(seam_file), args.steps)
            ceilings = [pool.submit(run_ceiling, k) for k in range(args.clips)]
            futures = [pool.submit(run_job, job) for job in jobs]
            done = [future.result() for future in futures]
            found = summary(done, [c.result() for c in ceilings], seam.result())
    record = {
        "kind": "embedded", "environment": environment(args.device), "clips": args.clips, "steps": args.steps,
        "model": embedded_hashes(args.model_folder), "seconds": {"rendering": rendered - began, "measuring": time.time() - rendered},
        "embedded": found, "goals": goals(found), "per_clip": done,
    }  # fmt: skip
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    for goal in record["goals"]:
        print(
            f"{'pass' if goal['passed'] else 'FAIL'}  {goal['metric']:<30} {goal['value']:8.3f}  goal {goal['rule']} {goal['goal']}"
        )
    print(f"{args.out}, {seam_file}: {record['seconds']['measuring']:.0f} s")
    return 0


def embedded_hashes(folder: Path | None) -> dict[str, str]:
    if folder:
        embedded.FOLDER = folder  # type: ignore[misc]
    return {name: file["sha256"][:16] for name, file in embedded.index()["files"].items()}


def _begin(where: Where) -> None:
    if where.settings["folder"]:
        embedded.FOLDER = where.settings["folder"]  # type: ignore[misc]
    start(where)


if __name__ == "__main__":
    sys.exit(main())
