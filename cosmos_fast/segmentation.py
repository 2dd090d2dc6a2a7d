"""Coloured segments, and masks from words: Grounding DINO finds what the words name, SAM 2 follows it.

    frame 0 -> boxes -> SAM 2, frame by frame -> masks, packed on disk -> colours, largest object first, or union

Frames go from the decoder to the networks as they are, with no JPEG between, and the result is handed on as it is.

Memory does not grow with the clip. On the device: the weights (1.8 GB in fp32), one frame, and for each object
what SAM 2 looks back on, 7 frames of memory and 16 object pointers, 11 MB at the published size. On the host: one
window of frames. Only the masks, packed and compressed, grow: on the disk.

Letters: H W pixels of the source, N objects.
"""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from . import registry
from .clip_maker import ClipTask, MakerOptions, NothingFound, OnFrame
from .formats import EnvironmentProblem, SpecError
from .segment_networks import DETECTOR_FILES, PACKAGE, TRACKER_FILES, Detector, Tracks, load_tracker
from .segments import (
    BOX_THRESHOLDS,
    MAX_OBJECTS,
    MaskStore,
    box_of,
    colours,
    new_boxes,
    paint,
    painting_order,
    pick_boxes,
    union,
)

DETECTOR: Final = "grounding-dino-base"
TRACKER: Final = "sam2.1-hiera-large"
VERSION: Final = 1
"""To be raised whenever this code makes other pixels from the same weights."""

_WINDOW_BYTES: Final = 64 << 20


def open_seg(device: torch.device, options: MakerOptions) -> Segmenter:
    """The maker of the seg control: one colour per object, on black."""
    return Segmenter(device, options, "seg")


def open_mask(device: torch.device, options: MakerOptions) -> Segmenter:
    """The maker of masks from words: 255 where any object is."""
    return Segmenter(device, options, "mask")


class Segmenter:
    """A ClipMaker for "seg" or "mask". Raises EnvironmentProblem without transformers, SpecError for options."""

    def __init__(self, device: torch.device, options: MakerOptions, kind: str) -> None:
        if importlib.util.find_spec("transformers") is None:
            raise EnvironmentProblem(
                f"{kind}: segmentation needs the package transformers, which is not installed. Run: {PACKAGE}"
            )
        every = options.detect_every
        if every is not None and (type(every) is not int or every < 1):
            raise SpecError(
                f"detect_every: must be a number of frames of at least 1, or null, got {every!r}."
            )
        self.kind, self.device, self.every = kind, device, every
        self._names = tuple(
            os.fspath(x) for x in (options.detector_model or DETECTOR, options.tracker_model or TRACKER)
        )
        self._folders: tuple[Path, Path] | None = None
        self._networks: tuple[Detector, Any] | None = None

    @property
    def identity(self) -> str:
        """Weights, rules and precision. A local folder is known by its files' sizes and times of change."""
        weights = (
            _identity(name, files) for name, files in zip(self._names, (DETECTOR_FILES, TRACKER_FILES))
        )
        rules = (VERSION, BOX_THRESHOLDS, MAX_OBJECTS, self.every, self.device.type)
        return "; ".join(["segmentation", self.kind, *weights, *map(str, rules)])

    def locate(self) -> None:
        """Find the weights of both networks, downloading what is missing."""
        detector, tracker = self._names
        self._folders = (
            registry.resolve_folder(detector, DETECTOR_FILES),
            registry.resolve_folder(tracker, TRACKER_FILES),
        )

    def make(self, task: ClipTask, on_frame: OnFrame) -> Iterator[np.ndarray]:
        """Windows (n, H, W, 3) uint8 at the source's size, once all frames are tracked. See ClipMaker."""
        if not task.text.strip():
            raise SpecError(f"words to segment: must not be blank, got {task.text!r}.")
        with MaskStore() as store:
            size = self._track(task, store, on_frame)
            per_window = max(1, min(32, _WINDOW_BYTES // (3 * size[0] * size[1])))
            order, palette = painting_order(store.areas), colours(MAX_OBJECTS)
            for start in range(0, len(store), per_window):
                window = [store.read(i) for i in range(start, min(start + per_window, len(store)))]
                if self.kind == "mask":
                    yield np.stack([union(patches, size) for patches in window])
                else:
                    yield np.stack([paint(patches, order, palette, size) for patches in window])

    def close(self) -> None:
        """Free both networks; a later `make` loads them again."""
        self._networks = None
        gc.collect()  # modules are full of cycles
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _track(self, task: ClipTask, store: MaskStore, on_frame: OnFrame) -> tuple[int, int]:
        """First pass: masks of every object in every frame into `store`; gives the source's (width, height)."""
        detector, network = self._load()
        with task.open() as source:
            tracks = Tracks(network, source.size, source.frames, self.device)
            for index in range(source.frames):
                frame_HW3 = source.read(index, index + 1)[0]
                masks = tracks.advance(frame_HW3)
                if index % (self.every or source.frames) == 0:
                    # Once there are objects, weak boxes of later frames are more often doubles than finds.
                    thresholds = BOX_THRESHOLDS[:1] if tracks.objects else BOX_THRESHOLDS
                    boxes_N4 = pick_boxes(*detector(frame_HW3, task.text), source.size, thresholds)
                    if index > 0:
                        boxes_N4 = new_boxes(boxes_N4, [box for m in masks.values() if (box := box_of(m))])
                    masks |= tracks.add(boxes_N4[: MAX_OBJECTS - tracks.objects])
                if not tracks.objects and self.every is None:
                    raise self._nothing(task, "the first frame")
                store.append(masks)
                on_frame(index + 1, source.frames)
            if not tracks.objects:
                raise self._nothing(task, f"any frame searched (every {self.every})")
            if not any(store.areas.values()):
                raise NothingFound(
                    f"words to segment: must match pixels, got {tracks.objects} boxes for {task.text!r} but no pixel "
                    f"from the tracker. {self._hint}"
                )
            return source.size

    def _nothing(self, task: ClipTask, where: str) -> NothingFound:
        """Names no file: the verdict is kept for every copy of it."""
        first, second = BOX_THRESHOLDS
        return NothingFound(
            f"words to segment: must match something in {where}, got no box above {first}, nor above {second}, "
            f"for {task.text!r}. {self._hint}"
        )

    @property
    def _hint(self) -> str:
        key = "control_prompt" if self.kind == "seg" else "mask_prompt"
        path = "control_path" if self.kind == "seg" else "mask_path"
        return f"Name in {key} what is visible, such as 'car. person. road.', or give a {path}."

    def _load(self) -> tuple[Detector, Any]:
        if self._folders is None:
            self.locate()
        assert self._folders is not None
        if self._networks is None:
            detector, tracker = self._folders
            self._networks = (
                Detector(detector, self.device),
                load_tracker(tracker, self.device),
            )
        return self._networks


def _identity(name: str, files: tuple[str, ...]) -> str:
    if published := registry.find_folder(name):
        return f"{published.repo}@{published.revision}"
    folder = registry.resolve_folder(name, files).resolve()
    stats = [(folder / file).stat() for file in files]
    return f"{folder} {[(s.st_size, s.st_mtime_ns) for s in stats]}"
