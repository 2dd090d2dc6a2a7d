"""The whole system at its smallest: networks, VAE and text encoder of random weights, short clips, the command line."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import media
import numpy as np
from click.testing import CliRunner, Result

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import make_checkpoint  # noqa: E402

from cosmos_fast.cli import main  # noqa: E402
from cosmos_fast.config import NetworkConfig  # noqa: E402
from cosmos_fast.engine import Engine  # noqa: E402
from cosmos_fast.recipe import Recipe  # noqa: E402
from cosmos_fast.spec import Spec  # noqa: E402
from cosmos_fast.text import TinyText  # noqa: E402
from cosmos_fast.vae_keys import VAEConfig  # noqa: E402

CHUNK = 5
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def smallest(kind: str, size: str = "tiny") -> NetworkConfig:
    """One head, four blocks: a step of a 256 x 256 chunk takes tens of milliseconds."""
    config = make_checkpoint.config_of(kind, size)
    image = {"image_width": 32, "image_tokens": 4} if config.image_width else {}
    return replace(
        config, width=64, heads=1, blocks=4, control_every=2, adaln_rank=16, text_width=64, text_dim=32,
        text_tokens=8, **image,
    )  # fmt: skip


def make_models(folder: Path, chunk: int = CHUNK) -> Path:
    """A folder laid out like the published files: four controls, the few-step edge network, VAE, text encoder."""
    kept = make_checkpoint.config_of, VAEConfig.tiny
    configs = {kind: smallest(kind) for kind in make_checkpoint.KINDS}
    make_checkpoint.config_of = lambda kind, size: configs[kind]
    VAEConfig.tiny = classmethod(lambda cls: cls(base=4))  # type: ignore[method-assign, assignment]
    try:
        make_checkpoint.make(folder, "multi", with_vae=True, device="cpu")
        make_checkpoint.make(folder, "distilled", device="cpu")
    finally:
        make_checkpoint.config_of, VAEConfig.tiny = kept
    TinyText(width=64, tokens=8).save(folder / "text.safetensors")
    (folder / "model.json").write_text(json.dumps({"chunk_frames": [chunk, 1]}))
    return folder


def open_engine(models: Path, model: str = "edge", **changes: Any) -> Engine:
    defaults: dict[str, Any] = {
        "model": model, "text": TinyText.load(models / "text.safetensors"), "recipe": Recipe.fp32(),
        "chunk_lengths": (CHUNK, 1),
    }  # fmt: skip
    return Engine(models, **(defaults | changes))


def fields(video: Path | str, **changes: Any) -> dict[str, Any]:
    """Keys of a small request; edge unless `changes` name a control."""
    controls = {} if {"edge", "vis", "depth", "seg"} & set(changes) else {"edge": {}}
    return {
        "video_path": str(video), "prompt": "A busy street.", "resolution": "256", "num_steps": 1,
        "num_video_frames_per_chunk": CHUNK, **controls, **changes,
    }  # fmt: skip


def request(video: Path, name: str = "clip", **changes: Any) -> Spec:
    return Spec(name=name, **fields(video, **changes))


def write_spec(folder: Path, name: str, video: Path | str, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(fields(video, **changes)))
    return path


@dataclass
class Run:
    """What a call of the command line gave back."""

    code: int
    out: str
    err: str

    @classmethod
    def of(cls, result: Result) -> Run:
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return cls(result.exit_code, result.stdout, result.stderr)

    @property
    def paths(self) -> list[Path]:
        return [Path(line) for line in self.out.splitlines()]


def call(*arguments: str | Path) -> Run:
    return Run.of(CliRunner().invoke(main, [str(argument) for argument in arguments]))


def generate_arguments(models: Path, out: Path, *more: str | Path) -> list[str]:
    call = ["generate", "-o", out, "--checkpoint", models, "--recipe", "fp32", "--device", "cpu", *more]
    return [str(argument) for argument in call]


def generate(models: Path, out: Path, *more: str | Path) -> Run:
    return call(*generate_arguments(models, out, *more))


def digests(folder: Path, suffixes: Sequence[str] = (".mp4", ".jpg")) -> dict[str, str]:
    """File name -> SHA-256 of every result in a folder."""
    files = sorted(path for path in folder.iterdir() if path.suffix in suffixes)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def leftovers(folder: Path) -> list[str]:
    """Half-written files and claims."""
    return sorted(
        path.name for path in folder.iterdir() if ".part" in path.name or path.name.endswith(".claim")
    )


def clip_of(path: Path, frames: int, size: tuple[int, int] = (64, 64), shift: int = 0) -> Path:
    """A clip with edges that move, so that every control has something to say."""
    pixels = media.pattern(frames + shift, size)[shift:].copy()
    for index, frame in enumerate(pixels):
        left = 4 + 3 * (index + shift) % (size[0] // 2)
        frame[size[1] // 4 : size[1] // 2, left : left + size[0] // 4] = (240, 240, 20)
    return media.write(path, np.ascontiguousarray(pixels), size=size)
