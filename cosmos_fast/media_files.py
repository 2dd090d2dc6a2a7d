"""The files that a clip leaves: its result, its controls, its masks. All appear complete or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import numpy as np

from . import controls
from .clip_parts import Opening, Window
from .clip_plan import ClipPlan
from .inputs import ClipInputs
from .outputs import ClipOutputs
from .video import Writer, resize, write_image


class Files:
    """Files of `frames` frames each, grown side by side: videos, or images where there is one frame.

    Leaving the `with` block before `close` aborts them all: no file appears under its final name.
    """

    def __init__(self, frames: int, fps: Fraction, codec: str) -> None:
        self.frames, self.fps, self.codec = frames, fps, codec
        self._open: dict[Path, Writer] = {}
        self._images: dict[Path, np.ndarray] = {}

    def append(self, path: Path, frames_FHW3: np.ndarray) -> None:
        if self.frames == 1:
            self._images[path] = frames_FHW3[0]
            return
        if path not in self._open:
            size = (frames_FHW3.shape[2], frames_FHW3.shape[1])
            self._open[path] = Writer(path, size, self.fps, codec=self.codec)
        self._open[path].write(frames_FHW3)

    def finish(self, keep: Path | None = None) -> None:
        """End and check every file but `keep`, so that publishing them takes no time later."""
        for path, writer in self._open.items():
            if path != keep:
                writer.finish()

    def publish(self, last: Path | None = None) -> list[Path]:
        """Give every file its name, `last` last, once all of them are reopened and counted; returns the others."""
        self.finish()
        beside = [path for path in (*self._open, *self._images) if path != last]
        for path in (*beside, *([] if last is None else [last])):
            if path in self._open:
                self._open[path].close()
            else:
                write_image(path, self._images[path])
        return beside

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            for writer in self._open.values():
                writer.abort()


@dataclass
class Pictures:
    """Some frames at output size, (F, H, W, 3) uint8: the result alone, the input, what the main file shows."""

    result: np.ndarray
    source: np.ndarray
    shown: np.ndarray


class Media(Files):
    """The files of one clip while they are written: the result, its controls and masks, its guided mask."""

    def __init__(self, clip: ClipPlan, outputs: ClipOutputs, codec: str) -> None:
        super().__init__(clip.frames, clip.fps, codec)
        self.clip, self.outputs = clip, outputs
        self.size = (clip.output_size[0] * (1 + clip.tiles), clip.output_size[1])
        self._result = outputs.media(clip.frames)
        self._opening: Opening | None = None
        self._controls: dict[str, np.ndarray] = {}

    def open(self, opening: Opening) -> None:
        """Begin a chunk: write what there is beside its result, which is to be made meanwhile."""
        self._opening, self._controls = opening, {}
        for name in opening.controls:
            frames = self._fit(self._shown(opening, name))
            self.append(self.outputs.control(name, self.clip.frames), frames)
            if self.clip.spec.show_control_condition:
                self._controls[name] = frames
        if opening.guided is not None:
            grey = (opening.guided * 255).round().astype(np.uint8)[..., None].repeat(3, axis=3)
            self.append(self.outputs.guided_mask(self.clip.frames), grey)
        for name, mask in from_words(self.clip, opening.masks).items():
            self.append(self.outputs.mask(name, self.clip.frames), as_frames(mask))
        if opening.chunk == self.clip.chunks[-1]:
            self.finish(keep=self._result)

    def pictures(self, window: Window) -> Pictures:
        """Frames of the chunk begun last as they will be written."""
        assert self._opening is not None, "pictures: a window came before its chunk's opening"
        at = slice(window.start, window.start + len(window.frames))
        result, source = self._fit(window.frames), self._fit(self._opening.source[at])
        panels = [frames[at] for frames in self._controls.values()]
        panels += [source] if self.clip.spec.show_input else []
        return Pictures(result, source, controls.side_by_side([*panels, result]))

    def write(self, pictures: Pictures) -> None:
        self.append(self._result, pictures.shown)

    @staticmethod
    def _shown(opening: Opening, name: str) -> np.ndarray:
        control, mask = opening.controls[name], opening.masks.get(name)
        return control if mask is None else controls.masked_preview(control, mask)

    def _fit(self, frames: np.ndarray) -> np.ndarray:
        return resize(frames, self.clip.output_size, "lanczos")

    def close(self) -> list[Path]:
        """Publish every file, the result last; returns those beside it."""
        return self.publish(self._result)

    def __enter__(self) -> Media:
        return self


class ControlFiles(Files):
    """The controls and masks of one clip alone, at working size, as `ClipInputs` reads or makes them.

    Controls are whole: a mask is a file of its own here, not painted into its control.
    """

    def __init__(self, clip: ClipPlan, outputs: ClipOutputs, codec: str) -> None:
        super().__init__(clip.frames, clip.fps, codec)
        self.clip, self.outputs = clip, outputs

    def save(self, on_chunk: Callable[[int, int], None]) -> list[Path]:
        """Write every file; `on_chunk` is called with (chunks done, chunks in all) and may raise, to stop."""
        with ClipInputs(self.clip) as inputs:
            for index, chunk in enumerate(self.clip.chunks, start=1):
                given = inputs.read(chunk)
                for name, frames in given.controls.items():
                    self.append(self.outputs.control(name, self.frames), frames[chunk.kept])
                for name, mask in given.masks.items():
                    self.append(self.outputs.mask(name, self.frames), as_frames(mask[chunk.kept]))
                on_chunk(index, len(self.clip.chunks))
        return self.publish()

    def __enter__(self) -> ControlFiles:
        return self


def from_words(clip: ClipPlan, masks: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of a clip's masks those that no file gave."""
    given = {name for name, control in clip.spec.controls.items() if control.mask_path is not None}
    return {name: mask for name, mask in masks.items() if name not in given}


def as_frames(mask_FHW: np.ndarray) -> np.ndarray:
    """Black and white frames (F, H, W, 3) uint8 of a bool mask."""
    return (mask_FHW[..., None] * np.uint8(255)).repeat(3, axis=3)
