"""What an engine tells while it makes a clip: steps, and the parts that chunks add to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .chunking import Chunk
from .clip_plan import ClipPlan
from .guardrails import Watch

Progress = Callable[["Step"], None]


@dataclass(frozen=True)
class Step:
    """Where a clip is: called after every denoising step. `stage` names what just ended."""

    name: str
    stage: str
    chunk: int
    chunks: int
    step: int
    steps: int


@dataclass(frozen=True)
class Part:
    """What one chunk adds to the finished clip, at model size.

    Shapes: frames, source and each control (F, H, W, 3) uint8; masks (F, H, W) bool; guided (F, H, W) float.
    """

    chunk: Chunk
    seed: int
    frames: np.ndarray
    source: np.ndarray
    controls: dict[str, np.ndarray]
    masks: dict[str, np.ndarray]
    guided: np.ndarray | None


@dataclass(frozen=True)
class Result:
    """A finished clip in memory: frames (F, H, W, 3) uint8 at model size, and how it was made."""

    clip: ClipPlan
    frames: np.ndarray
    stages: dict[str, dict[str, float | int | None]]


def screened(part: Part, watch: Watch | None) -> Part:
    """The part as guardrails let it pass, itself without them. Raises Refused."""
    return part if watch is None else replace(part, frames=watch.screen(part.frames))
