"""What an engine tells while it makes a clip: steps, and the parts that chunks add to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from .chunking import Chunk
from .clip_plan import ClipPlan
from .guardrails import Watch
from .inputs import ChunkInputs

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
    All but `frames` may be the memory of other ranks as well: read it, copy what is to be changed.
    """

    chunk: Chunk
    seed: int
    frames: np.ndarray
    source: np.ndarray
    controls: dict[str, np.ndarray]
    masks: dict[str, np.ndarray]
    guided: np.ndarray | None


@dataclass(frozen=True)
class Opening:
    """What is known of a chunk's part before it is made: a Part without its frames."""

    chunk: Chunk
    seed: int
    source: np.ndarray
    controls: dict[str, np.ndarray]
    masks: dict[str, np.ndarray]
    guided: np.ndarray | None

    @classmethod
    def of(cls, chunk: Chunk, seed: int, given: ChunkInputs) -> Opening:
        kept = chunk.kept
        return cls(
            chunk, seed, given.frames[kept],
            {name: frames[kept] for name, frames in given.controls.items()},
            {name: mask[kept] for name, mask in given.masks.items()},
            None if given.guided is None else given.guided[kept],
        )  # fmt: skip


@dataclass(frozen=True)
class Window:
    """Frames (f, H, W, 3) uint8 of the part opened before it, from its frame `start` on, as the VAE decodes them."""

    start: int
    frames: np.ndarray


Piece = Opening | Window
"""A chunk's part as it comes: its opening, then windows until all of `chunk.keep` frames are there."""


def last_frames(before: np.ndarray | None, frames: np.ndarray, count: int) -> np.ndarray:
    """The last `count` frames of `before` and `frames`, fewer if there are no more."""
    if before is not None and len(frames) < count:
        frames = np.concatenate((before, frames))
    return frames[max(0, len(frames) - count) :]


def joined(pieces: Iterable[Piece]) -> Iterator[Part]:
    """The parts that pieces make up, each as soon as its last window is there.

    A window is copied to its place when it comes, while the device makes the next.
    """
    opening: Opening | None = None
    frames: np.ndarray | None = None
    for piece in pieces:
        if isinstance(piece, Opening):
            opening, frames = piece, None
            continue
        assert opening is not None, "pieces: a window came before its opening"
        if frames is None:
            frames = np.empty((opening.chunk.keep, *piece.frames.shape[1:]), piece.frames.dtype)
        stop = piece.start + len(piece.frames)
        frames[piece.start : stop] = piece.frames
        if stop == opening.chunk.keep:
            yield Part(frames=frames, **vars(opening))


@dataclass(frozen=True)
class Result:
    """A finished clip in memory: frames (F, H, W, 3) uint8 at model size, and how it was made."""

    clip: ClipPlan
    frames: np.ndarray
    stages: dict[str, dict[str, float | int | None]]


def screened(part: Part, watch: Watch | None) -> Part:
    """The part as guardrails let it pass, itself without them. Raises Refused."""
    return part if watch is None else replace(part, frames=watch.screen(part.frames))
