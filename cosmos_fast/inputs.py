"""What the files of one clip say about one chunk: frames, controls, masks, at model size and padded.

Files are streamed; nothing of a clip beyond the chunks asked for is held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .chunking import Chunk, mirror_index, pad, read_label_mask
from .controls import (
    CONTROL_FILTER,
    MAKERS,
    MASK_FILTER,
    ControlMaker,
    FrameMaker,
    binary_mask,
    find_maker,
    mask_prompt_problem,
)
from .formats import ClipError
from .rooms import Rooms
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
    """Opens the files of a planned clip; `read` gives one chunk at a time, in order. A context manager.

    rooms: where memory of chunks comes from, to share it with other clips; by default it is this clip's own.
    Raises EnvironmentProblem for a mask that is still words: a control without it would act everywhere.
    """

    def __init__(
        self, clip: ClipPlan, makers: Mapping[str, ControlMaker] = MAKERS, rooms: Rooms | None = None
    ) -> None:
        self.clip, self._makers, self._rooms = clip, makers, rooms or Rooms()
        for name, words in clip.masks_in_words.items():
            raise mask_prompt_problem(name, words)
        keep = max(clip.spec.num_conditional_frames, 1)
        limit = clip.frames

        def open_at(file: Probe, filter: str) -> Source:
            return Source(file, clip.model_size, filter, limit, keep=keep)

        self.source = open_at(clip.source, "area")
        self._controls = {n: open_at(p, CONTROL_FILTER[n]) for n, p in clip.controls.items() if p}
        self._masks = {n: open_at(p, MASK_FILTER) for n, p in clip.masks.items()}
        self._guided: Source | None = None
        self._labels: np.ndarray | None = None
        path = clip.spec.guided_generation_mask
        if path is not None and path.suffix.lower() == ".npz":
            self._labels = read_label_mask(path, clip.spec.guided_generation_foreground_labels)[:limit]
        elif path is not None:
            self._guided = open_at(probe(path), "area")

    def read(self, chunk: Chunk) -> ChunkInputs:
        """The chunk's inputs; controls without a file are made from its frames."""
        given = self.room(chunk)
        self.fill(chunk, given, 0, chunk.length)
        self.make(chunk, given, 0, chunk.length)
        return given

    def room(self, chunk: Chunk) -> ChunkInputs:
        """Arrays for a chunk's inputs, with anything in them yet."""
        width, height = self.clip.model_size
        size, take = (chunk.length, height, width), self._rooms.take
        has_guide = self._guided is not None or self._labels is not None
        return ChunkInputs(
            take((*size, 3), np.uint8),
            {name: take((*size, 3), np.uint8) for name in self.clip.spec.controls},
            {name: take(size, np.bool_) for name in self._masks},
            take(size, np.float32) if has_guide else None,
        )

    def fill(self, chunk: Chunk, given: ChunkInputs, start: int, stop: int) -> list[str]:
        """Read frames `start` to `stop` of the chunk from its files, behind those that are there.

        Returns the controls that are there now as well.
        """
        self._fill(given.frames, self.source, chunk, start, stop)
        for name, source in self._controls.items():
            self._fill(given.controls[name], source, chunk, start, stop)
        for name, source in self._masks.items():
            self._fill(given.masks[name], source, chunk, start, stop, binary_mask)
        if given.guided is not None and self._guided is not None:
            self._fill(
                given.guided, self._guided, chunk, start, stop, lambda x: x[..., 0].astype(np.float32) / 255
            )
        elif given.guided is not None and self._labels is not None and start == 0:
            window = self._labels[chunk.start : chunk.stop]
            resized = resize(np.repeat(window[..., None], 3, axis=3), self.clip.model_size, "linear")[..., 0]
            given.guided[:] = pad(resized.astype(np.float32) / 255, chunk.length)
        return list(self._controls)

    def make(self, chunk: Chunk, given: ChunkInputs, start: int, stop: int) -> list[str]:
        """Make frames `start` to `stop` of the controls that have no file, from frames that are there.

        Returns the controls that are there now as well: a maker that wants the whole chunk waits for its last frame.
        """
        there = []
        for name, control in self.clip.spec.controls.items():
            if name in self._controls:
                continue
            made, maker = given.controls[name], find_maker(name, self._makers)
            if isinstance(maker, FrameMaker):
                out = made[start:stop]
                _copy(out, maker.fill(given.frames[start:stop], control, out), name)
            elif stop == chunk.length:
                frames = maker.make(
                    given.frames,
                    control,
                    source=self.clip.spec.video_path,
                    start=chunk.start,
                    stop=chunk.stop,
                )
                _copy(made, frames, name)
            else:
                continue
            there.append(name)
        return there

    @staticmethod
    def _fill(
        out: np.ndarray, source: Source, chunk: Chunk, start: int, stop: int,
        convert: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:  # fmt: skip
        """Frames of a file, which goes on as its own mirror; an image serves every frame."""
        is_image = source.probe.kind == "image"
        first, last = (0, 1) if is_image else (chunk.start, min(chunk.stop, source.frames))
        there = min(stop, last - first)
        if start < there:
            if convert is None:
                source.read(first + start, first + there, out[start:there])
            else:
                out[start:there] = convert(source.read(first + start, first + there))
        for frame, same in enumerate(mirror_index(last - first, chunk.length)[:stop]):
            if frame >= max(start, there):
                out[frame] = out[same]

    def close(self) -> None:
        for source in (self.source, *self._controls.values(), *self._masks.values(), self._guided):
            if source is not None:
                source.close()

    def __enter__(self) -> ClipInputs:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def style_image(clip: ClipPlan) -> np.ndarray:
    """The style image (H, W, 3) uint8 of a clip that has one, at its own size, from a frame of the clip or a file."""
    assert clip.style is not None, "style_image: the clip has none"
    file, frame = (clip.source, clip.style) if isinstance(clip.style, int) else (clip.style, 0)
    with Source(file) as source:
        return source.read(frame, frame + 1)[0]


def _copy(out: np.ndarray, made: np.ndarray, name: str) -> None:
    if made.shape != out.shape or made.dtype != out.dtype:
        raise ClipError(
            f"{name}: its maker must return {out.dtype} {out.shape}, one control frame for each frame given, "
            f"got {made.dtype} {made.shape}."
        )
    if made is not out:
        out[:] = made
