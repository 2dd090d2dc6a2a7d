"""What the files of one clip say about one chunk: frames, controls, masks, at model size and padded.

Files are streamed; nothing of a clip beyond the current chunk is held.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from . import controls as maker
from .chunking import Chunk, pad, read_label_mask
from .video import Probe, Source, probe, resize

if TYPE_CHECKING:
    from .clip_plan import ClipPlan


@dataclass(frozen=True)
class ChunkInputs:
    """One chunk, padded to its length F, at model size.

    Shapes: frames and each control (F, H, W, 3) uint8; masks (F, H, W) bool; guided (F, H, W) float32 in
    [0, 1] or None.
    """

    frames: np.ndarray
    controls: dict[str, np.ndarray]
    masks: dict[str, np.ndarray]
    guided: np.ndarray | None


class ClipInputs:
    """Opens the files of a planned clip; `read` gives one chunk at a time, in order. A context manager."""

    def __init__(self, clip: ClipPlan, makers: Mapping[str, maker.ControlMaker] = maker.MAKERS) -> None:
        self.clip, self._makers = clip, makers
        keep = max(clip.spec.num_conditional_frames, 1)
        limit = clip.frames

        def open_at(file: Probe, filter: str) -> Source:
            return Source(file, clip.model_size, filter, limit, keep=keep)

        self.source = open_at(clip.source, "area")
        self._controls = {n: open_at(p, maker.CONTROL_FILTER[n]) for n, p in clip.controls.items() if p}
        self._masks = {n: open_at(p, maker.MASK_FILTER) for n, p in clip.masks.items()}
        self._guided: Source | None = None
        self._labels: np.ndarray | None = None
        path = clip.spec.guided_generation_mask
        if path is not None and path.suffix.lower() == ".npz":
            self._labels = read_label_mask(path, clip.spec.guided_generation_foreground_labels)[:limit]
        elif path is not None:
            self._guided = open_at(probe(path), "area")

    def read(self, chunk: Chunk) -> ChunkInputs:
        """The chunk's inputs; controls without a file are made from its frames."""
        frames = self._window(self.source, chunk)
        made = {}
        for name, control in self.clip.spec.controls.items():
            if name in self._controls:
                made[name] = self._window(self._controls[name], chunk)
            else:
                made[name] = maker.find_maker(name, self._makers).make(
                    frames, control, source=self.clip.spec.video_path, start=chunk.start, stop=chunk.stop
                )
        masks = {name: maker.binary_mask(self._window(source, chunk)) for name, source in self._masks.items()}
        return ChunkInputs(frames, made, masks, self._guided_mask(chunk))

    def _window(self, source: Source, chunk: Chunk) -> np.ndarray:
        """A window of a file, extended by its own mirror; an image serves every frame."""
        if source.probe.kind == "image":
            return pad(source.read(0, 1), chunk.length)
        return pad(source.read(chunk.start, min(chunk.stop, source.frames)), chunk.length)

    def _guided_mask(self, chunk: Chunk) -> np.ndarray | None:
        if self._guided is not None:
            return self._window(self._guided, chunk)[..., 0].astype(np.float32) / 255
        if self._labels is None:
            return None
        window = self._labels[chunk.start : chunk.stop]
        resized = resize(np.repeat(window[..., None], 3, axis=3), self.clip.model_size, "linear")[..., 0]
        return pad(resized.astype(np.float32) / 255, chunk.length)

    def style_image(self) -> np.ndarray | None:
        """The style image (H, W, 3) uint8 at its own size, from a frame of the clip or a file; None if none."""
        style = self.clip.style
        if style is None:
            return None
        file, frame = (self.clip.source, style) if isinstance(style, int) else (style, 0)
        with Source(file) as source:
            return source.read(frame, frame + 1)[0]

    def close(self) -> None:
        for source in (self.source, *self._controls.values(), *self._masks.values(), self._guided):
            if source is not None:
                source.close()

    def __enter__(self) -> ClipInputs:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
