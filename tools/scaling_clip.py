"""The distilled clip for bench_scaling.py: weights and a moving picture of the published sizes, and clips made of them.

python tools/scaling_clip.py FOLDER [--smoke]       makes the files; `ready` lies there when they are whole
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT)]

import make_checkpoint  # noqa: E402

from cosmos_fast.text import write_embeddings  # noqa: E402
from cosmos_fast.video import Writer  # noqa: E402

PROMPT = "A busy street in warm evening light, photorealistic."
READY, CLIP, TEXT, MODELS = "ready", "street.mp4", "text.safetensors", "models"
FRAMES, SMOKE_FRAMES = 93, 5


def make(folder: Path, *, smoke: bool, device: str = "cpu") -> None:
    """Random weights and embeddings of the published shapes, and a moving picture."""
    size = "tiny" if smoke else "2b"
    make_checkpoint.make(folder / MODELS, "distilled", size, with_vae=True, device=device)
    config = make_checkpoint.config_of("distilled", size)
    generator = torch.Generator().manual_seed(0)
    embedded = torch.randn(config.text_tokens, config.text_width, generator=generator)
    write_embeddings(folder / TEXT, {PROMPT: embedded.bfloat16()})
    write_clip(folder / CLIP, smoke=smoke)
    (folder / READY).touch()


def write_clip(path: Path, *, smoke: bool) -> None:
    """A moving picture."""
    frames, width, height = (SMOKE_FRAMES, 256, 256) if smoke else (FRAMES, 1280, 704)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    with Writer(path, (width, height), 16) as writer:
        for i in range(frames):
            wave = np.sin((x + 9 * i) / 37) * np.cos((y - 5 * i) / 53)
            planes = 127 + 120 * wave, 127 - 90 * wave, (x + 3 * i) % 256
            writer.write(np.stack(planes, -1).astype(np.uint8))


def await_files(folder: Path, limit_s: float) -> None:
    """Until another process has made them. Raises TimeoutError."""
    until = time.monotonic() + limit_s
    while not (folder / READY).exists():
        if time.monotonic() > until:
            raise TimeoutError(f"{folder}: must hold the files of a clip within {limit_s:.0f} s, got none.")
        time.sleep(0.2)


def fields(folder: Path, *, smoke: bool) -> dict[str, Any]:
    """Keys of the request."""
    return {
        "prompt": PROMPT, "video_path": str(folder / CLIP), "edge": {},
        "num_video_frames_per_chunk": SMOKE_FRAMES if smoke else FRAMES, "resolution": "256" if smoke else "720",
    }  # fmt: skip


def open_engine(folder: Path, mesh: Any, *, smoke: bool) -> Any:
    """An Engine for the clip, its work shared as `mesh` says."""
    from cosmos_fast.engine import Engine
    from cosmos_fast.recipe import Plan

    return Engine(
        folder / MODELS, model="edge/distilled", text=folder / TEXT, guardrails=False, mesh=mesh,
        plan=Plan(device=mesh.device.type, context=mesh.context.size),
        chunk_lengths=(SMOKE_FRAMES, 1) if smoke else None,
    )  # fmt: skip


def stages_of(engine: Any) -> dict[str, dict[str, Any]]:
    """Of the engine's last clip, by stage: seconds, peak bytes, and seconds of what ran beside."""
    stages = {name: stage for name, stage in engine.stages.record().items() if name != "load"}
    return {
        "stages": {name: stage["seconds"] for name, stage in stages.items()},
        "peak_bytes": {name: stage["peak_bytes"] for name, stage in stages.items()},
        "beside_s": {name: stage["beside_s"] for name, stage in stages.items() if "beside_s" in stage},
    }


def frames_of(engine: Any, steps: int, given: dict[str, Any]) -> list[np.ndarray]:
    """One clip, its frames on the host."""
    from cosmos_fast.spec import Spec

    return [part.frames for part in engine.stream(Spec(name="clip", num_steps=steps, **given))]


def difference(found: list[np.ndarray], wanted: list[np.ndarray]) -> dict[str, float]:
    """Codes of two clips: their largest difference, its mean, and the share that differs."""
    gaps = [np.abs(x.astype(np.int16) - y) for x, y in zip(found, wanted, strict=True)]
    count = sum(gap.size for gap in gaps)
    return {
        "most": int(max(gap.max() for gap in gaps)), "mean": float(sum(gap.sum() for gap in gaps) / count),
        "share": float(sum(np.count_nonzero(gap) for gap in gaps) / count),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    make(args.folder, smoke=args.smoke)


if __name__ == "__main__":
    main()
