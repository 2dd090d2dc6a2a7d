"""Control signals made from frames: edges and blur, with the door for makers of depth and segmentation.

Frames are uint8 RGB (F, H, W, 3), already at model size and padded to the chunk. Results depend on the frames
alone: not on the number of threads and not on how a clip was cut into calls.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Protocol

import cv2
import numpy as np
import torch
from torch.nn.functional import interpolate

from .formats import CONTROLS, EnvironmentProblem, MediaError, SpecError

PRESETS: Final = ("very_low", "low", "medium", "high", "very_high")

EDGE_THRESHOLDS: Final = MappingProxyType(
    {
        "very_low": (20, 50),
        "low": (50, 100),
        "medium": (100, 200),
        "high": (200, 300),
        "very_high": (300, 400),
    }
)
"""Canny thresholds (low, high) by preset."""

BLUR_FACTORS: Final = MappingProxyType(
    {"very_low": (1, 4), "low": (4, 4), "medium": (2, 10), "high": (1, 16), "very_high": (4, 16)}
)
"""(shrink before the bilateral filter, shrink of the bicubic pass) by preset. The first is not monotone: the
networks were trained with exactly these pairs."""

BILATERAL: Final = {"d": 30, "sigmaColor": 150, "sigmaSpace": 100}

CONTROL_FILTER: Final = MappingProxyType(
    {"edge": "linear", "vis": "area", "depth": "linear", "seg": "nearest"}
)
"""Filter that brings a given control file to model size."""

MASK_FILTER: Final = "linear"
"""Filter that brings a control mask to model size."""

GUIDED_FILTER: Final = MappingProxyType({".mp4": "area", ".npz": "linear"})
"""Filter that brings a guided mask to model size, by kind of file."""

BATCH: Final = 1
"""Frames a worker handles at once, so that a few frames already keep all workers busy."""

WORKERS: Final = min(8, os.cpu_count() or 1)
"""Threads that make controls by default, and go on living for the next ones."""


# -------------------------------------------------------------------------------------- edge and vis


def edge(
    frames: np.ndarray, preset: str = "medium", *, threads: int | None = None, out: np.ndarray | None = None
) -> np.ndarray:
    """Canny edges, 255 on 0, the same in all three channels.

    Works on the three RGB channels directly; at each pixel the channel with the steepest gradient counts, so
    neither a grey conversion nor BGR order gives the same edges. Aperture 3, L1 gradient.

    Shapes: frames (F, H, W, 3) uint8; returns the same, in `out` if given. `threads`: default WORKERS, the result is the
    same.
    """
    low, high = _preset(EDGE_THRESHOLDS, preset, "preset_edge_threshold")

    def detect(part: np.ndarray, out: np.ndarray) -> None:
        for frame, result in zip(part, out, strict=True):
            cv2.cvtColor(cv2.Canny(frame, low, high), cv2.COLOR_GRAY2RGB, result)

    return _map_frames(detect, frames, threads, out)


def vis(
    frames: np.ndarray, preset: str = "medium", *, threads: int | None = None, out: np.ndarray | None = None
) -> np.ndarray:
    """Blurred frames: area shrink, bilateral filter, linear enlargement, antialiased bicubic down and up.

    Every stage is rounded to uint8. Each frame is handled by itself.

    Shapes: frames (F, H, W, 3) uint8, H and W at least 4 to 16 by preset; returns the same, in `out` if given.
    `threads`: default WORKERS, the result is the same.
    """
    before, after = _preset(BLUR_FACTORS, preset, "preset_blur_strength")
    _check(frames, "vis")
    height, width = frames.shape[1:3]
    if min(height, width) < max(before, after):
        raise MediaError(
            f"vis: preset {preset} needs at least {max(before, after)} pixels, got {width}x{height}."
        )

    def blur(part: np.ndarray, out: np.ndarray) -> None:
        for frame, result in zip(part, out, strict=True):
            small = cv2.resize(frame, (width // before, height // before), interpolation=cv2.INTER_AREA)
            small = cv2.bilateralFilter(small, **BILATERAL)
            result[:] = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)
        x = torch.from_numpy(out).permute(0, 3, 1, 2).contiguous()
        x = _bicubic(x, (height // after, width // after))
        out[:] = _bicubic(x, (height, width)).permute(0, 2, 3, 1).numpy()

    return _map_frames(blur, frames, threads, out)


def _bicubic(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Antialiased bicubic resize of uint8 (F, 3, H, W), in fp32, rounded half to even."""
    y = interpolate(x.float(), size=size, mode="bicubic", antialias=True, align_corners=False)
    return y.clamp_(0, 255).round_().to(torch.uint8)


def _map_frames(
    work: Callable[[np.ndarray, np.ndarray], None],
    frames: np.ndarray,
    threads: int | None,
    out: np.ndarray | None,
) -> np.ndarray:
    """Run `work(part, out)` over batches of frames in a pool; OpenCV and torch release the GIL."""
    _check(frames, "controls")
    made = np.empty_like(frames, order="C") if out is None else out
    parts = [slice(start, start + BATCH) for start in range(0, len(frames), BATCH)]

    def run(pool: ThreadPoolExecutor) -> None:
        for _ in pool.map(lambda part: work(frames[part], made[part]), parts):
            pass

    with _one_thread_a_call():
        if threads is None:
            run(_workers())
        else:
            with ThreadPoolExecutor(min(threads, len(parts))) as pool:
                run(pool)
    return made


_callers, _outside, _counting = 0, 0, threading.Lock()


@contextmanager
def _one_thread_a_call() -> Iterator[None]:
    """Within, OpenCV computes in the thread that calls it: with a pool of its own under ours it takes 40 % more of the
    cores, which ranks that read the same clip lack. The number of its threads is the process's, and comes back."""
    global _callers, _outside
    with _counting:
        if _callers == 0:
            _outside = cv2.getNumThreads()
            cv2.setNumThreads(1)
        _callers += 1
    try:
        yield
    finally:
        with _counting:
            _callers -= 1
            if _callers == 0:
                cv2.setNumThreads(_outside)


@functools.cache
def _workers() -> ThreadPoolExecutor:
    """To start eight threads for every eight frames takes longer than some frames do."""
    return ThreadPoolExecutor(WORKERS, "controls")


os.register_at_fork(after_in_child=_workers.cache_clear)  # a child has none of its parent's threads


def _check(frames: np.ndarray, what: str) -> None:
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or len(frames) == 0:
        raise MediaError(f"{what}: frames must be uint8 (F, H, W, 3), got {frames.dtype} {frames.shape}.")


def _preset(table: Mapping[str, tuple[int, int]], preset: str, field: str) -> tuple[int, int]:
    if preset not in table:
        raise SpecError(f"{field}: must be one of {', '.join(table)}, got {preset!r}.")
    return table[preset]


# ------------------------------------------------------------------------------------------- makers


class ControlMaker(Protocol):
    """Makes one control from the clip when the request gives no file for it."""

    @property
    def name(self) -> str:
        """The control this makes."""
        ...

    def make(
        self, frames: np.ndarray, control: Any, *, source: Path | None, start: int, stop: int
    ) -> np.ndarray:
        """Return the control, uint8 (F, H, W, 3), for one chunk.

        `frames`: the chunk, (F, H, W, 3) uint8 at model size, padded. `control`: the control of the request,
        with its presets and prompts. `source`, `start`, `stop`: the source file and the frames the chunk was
        read from, before padding, for makers that work at the source's own size or on the whole clip.
        """
        ...


@dataclass(frozen=True)
class FrameMaker:
    """A control that needs nothing but the frames, one by one, and one preset of the request."""

    name: str
    field: str
    function: Callable[..., np.ndarray]
    """(frames, preset, out=array to write to or None) -> the control."""

    def make(
        self, frames: np.ndarray, control: Any, *, source: Path | None = None, start: int = 0, stop: int = 0
    ) -> np.ndarray:
        return self.fill(frames, control, None)

    def fill(self, frames: np.ndarray, control: Any, out: np.ndarray | None) -> np.ndarray:
        """Make it where it is to be, if that is given."""
        return self.function(frames, getattr(control, self.field), out=out)


MAKERS: Final[Mapping[str, ControlMaker]] = MappingProxyType(
    {
        "edge": FrameMaker("edge", "preset_edge_threshold", edge),
        "vis": FrameMaker("vis", "preset_blur_strength", vis),
    }
)
"""Controls made here. For more, pass `{**MAKERS, "depth": my_maker}` wherever `makers` is taken."""


def find_maker(name: str, makers: Mapping[str, ControlMaker] = MAKERS) -> ControlMaker:
    """The maker of a control, or EnvironmentProblem saying which file to give instead."""
    if name not in CONTROLS:
        raise SpecError(f"controls: must be one of {', '.join(CONTROLS)}, got {name!r}.")
    if name in makers:
        return makers[name]
    kind = {"depth": "a depth", "seg": "a segmentation"}.get(name, f"a {name}")
    raise EnvironmentProblem(
        f"{name}: a control without a file needs a maker, got none for {name}. "
        f"Give {name}.control_path {kind} video."
    )


def mask_prompt_problem(name: str, prompt: str) -> EnvironmentProblem:
    """The problem to raise for a mask that is still words where frames are read: no maker has seen it."""
    return EnvironmentProblem(
        f"{name}.mask_prompt: a mask from words needs a maker, got none for {prompt!r}. "
        f"Give {name}.mask_path a mask video, white where the control is to act."
    )


# -------------------------------------------------------------------------------- masks and pictures


def binary_mask(frames: np.ndarray) -> np.ndarray:
    """Mask frames uint8 (F, H, W, 3) to bool (F, H, W): true where the first channel is above 127.5."""
    _check(frames, "mask")
    return frames[..., 0] > 127


def masked_preview(control: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The control (F, H, W, 3) with everything outside mask bool (F, H, W) black, for saving and looking at.

    The network gets the unmasked control; its mask acts through the weight maps.
    """
    if mask.dtype != np.bool_ or mask.shape != control.shape[:3]:
        raise ValueError(f"mask: must be bool {control.shape[:3]}, got {mask.dtype} {mask.shape}.")
    return control * mask[..., None]


def side_by_side(clips: Sequence[np.ndarray]) -> np.ndarray:
    """Clips (F, H, W, 3) of one length and height next to each other, left to right."""
    shapes = [(len(clip), clip.shape[1]) for clip in clips]
    if len(set(shapes)) != 1:
        raise ValueError(f"side_by_side: clips must share frames and height, got {shapes}.")
    return np.concatenate(clips, axis=2)


PALETTE: Final = np.array(
    [
        [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255], [255, 0, 255], [255, 140, 0],
        [255, 105, 180], [0, 0, 139], [0, 128, 128], [75, 0, 130], [128, 0, 128], [255, 69, 0], [34, 139, 34],
        [128, 128, 0], [70, 130, 180], [255, 215, 0], [255, 222, 173], [144, 238, 144], [255, 99, 71],
        [221, 160, 221], [0, 255, 127], [255, 255, 255],
    ], dtype=np.uint8,
)  # fmt: skip
"""The 23 segmentation colours (RGB) of the published system."""
PALETTE.flags.writeable = False


def color_masks(masks: np.ndarray, colors: np.ndarray = PALETTE) -> np.ndarray:
    """Paint object masks onto black: the largest object first, so that smaller ones stay visible.

    Shapes: masks (N, F, H, W), nonzero inside the object; colors (at least one, 3) uint8 RGB, used in turn;
    returns (F, H, W, 3) uint8. Size is counted over the whole clip, ties keep their order.
    """
    if masks.ndim != 4:
        raise ValueError(f"color_masks: masks must be (N, F, H, W), got {masks.shape}.")
    out = np.zeros((*masks.shape[1:], 3), np.uint8)
    for n in np.argsort([-np.count_nonzero(mask) for mask in masks], kind="stable"):
        out[masks[n] != 0] = colors[n % len(colors)]
    return out
