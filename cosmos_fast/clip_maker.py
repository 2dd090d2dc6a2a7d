"""The door for makers that need a whole clip: depth and segmentation, which cannot be made chunk by chunk.

A maker is a pure function of its task and its weights, so `makers` may keep what it made and never ask again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .formats import ClipError
from .video import Probe, Source

OnFrame = Callable[[int, int], None]
"""Called with (frames done, frames in all). May raise, to stop."""


class NothingFound(ClipError):
    """The words of a task match nothing in its clip. A control then fails its clip; a mask is left out."""


@dataclass(frozen=True)
class ClipTask:
    """What is to be made of one file.

    source: the input, of which every frame counts, also those beyond a request's max_frames. size: working
    (width, height) of the request, for makers whose result must be resized before it is rounded. text: what to
    segment, "" for depth.
    """

    source: Probe
    size: tuple[int, int]
    text: str = ""

    def open(self) -> Source:
        """The frames at their own size, to be read in order: `with task.open() as source: source.read(0, 32)`."""
        return Source(self.source)


@dataclass(frozen=True)
class MakerOptions:
    """Which models make controls. Each is a published id, a local file or folder, or None for the default."""

    depth_model: str | os.PathLike[str] | None = None
    detector_model: str | os.PathLike[str] | None = None
    tracker_model: str | os.PathLike[str] | None = None
    detect_every: int | None = None
    """Frames between two searches for new objects; None searches the first frame alone, as published."""


class ClipMaker(Protocol):
    """Makes one kind of control or mask.

    Its factory `(device: torch.device, options: MakerOptions) -> ClipMaker` looks for packages and raises
    EnvironmentProblem with the pip command; it reads no weights. Weights are found, and downloaded, by `locate`
    and loaded by the first `make`, since what is in the cache needs neither.
    """

    @property
    def identity(self) -> str:
        """Everything but the task that the result depends on: models, revisions, thresholds, version of the code."""
        ...

    def locate(self) -> None:
        """Find all weights, downloading what is missing. Raises CheckpointError or EnvironmentProblem."""
        ...

    def make(self, task: ClipTask, on_frame: OnFrame) -> Iterator[np.ndarray]:
        """Yield the whole clip in order, as windows (n, H, W, 3) uint8, n >= 1, at the source's size or `task.size`.

        Windows at the source's size are resized by the caller. A mask is 255 inside and 0 outside. Raises
        NothingFound, or ClipError for what goes wrong with this clip alone.
        """
        ...

    def close(self) -> None:
        """Free all memory; a later `make` loads again."""
        ...
