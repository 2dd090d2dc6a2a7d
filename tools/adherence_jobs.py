"""The clips that tools/evaluate_model.py asks for and what is measured of each, in a process of its own or in many.

`start` says where things lie; after it come `run_job` (one generated clip), `run_ceiling` (a real clip through the VAE)
and `run_seam` (a clip of two chunks). All return plain dictionaries.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tools" / "train")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from adherence import blur_ssim, edge_f1, main_colour, mean_iou, psnr, recoloured  # noqa: E402
from probe import CLASSES, Probe, aligned_error, class_table  # noqa: E402

from cosmos_fast import embedded, testing, video  # noqa: E402
from cosmos_fast.engine import Engine  # noqa: E402
from cosmos_fast.recipe import Plan, Recipe  # noqa: E402
from cosmos_fast.spec import Spec  # noqa: E402

FRAMES, LONG, FPS = 17, 33, 10
HELD_OUT = 1_000_000
SEED = 0
MEASURES = {"edge": "edge_f1", "vis": "blur_ssim", "depth": "depth_si_rmse", "seg": "seg_miou"}


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
    if where.settings["folder"]:
        embedded.FOLDER = where.settings["folder"]  # type: ignore[misc]
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


@dataclass
class _Watched:
    """A stage of the VAE whose decoding somebody watches."""

    stage: Any
    decode: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stage, name)


def run_seam(k: int, picture: str, steps: int | None) -> dict[str, float]:
    """A clip of two chunks: do the frames that both chunks make agree, and does the seam stand out?"""
    assert _where is not None
    made: list[np.ndarray] = []
    base = engine("edge")
    stage = base._vae

    def watched(*asked: Any) -> Iterator[np.ndarray]:
        """The VAE's decoding of one chunk, kept whole: the clip itself has the shared frame once."""
        windows = []
        for window in stage.decode(*asked):
            windows.append(window.copy())
            yield window
        made.append(np.concatenate(windows))

    base._vae = _Watched(stage, watched)  # type: ignore[assignment]
    try:
        job = Job("edge", k, {"edge": 1.0}, (), (), "seam", steps=steps)
        frames = base.generate(spec_of(job, frames=LONG)).frames
    finally:
        base._vae = stage
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
