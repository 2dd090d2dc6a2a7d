"""Segments as numbers: which boxes count, which are new, which colour is whose, what is painted over what.

NumPy and the standard library only. Boxes are (x0, y0, x1, y1) in pixels of the source, not clipped to it; masks
are (H, W) bool; letters: Q candidate boxes of the detector, N boxes or objects. An object's id counts from 0 in
the order of detection: by frame, then by score, best first.
"""

from __future__ import annotations

import colorsys
import random
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from .formats import EnvironmentProblem

BOX_THRESHOLDS: Final = (0.15, 0.10)
"""Scores a box must exceed: the first that any box exceeds counts.

The published thresholds for text, 0.25 and 0.10, only choose the words shown with a box, and no words are shown.
"""

MAX_OBJECTS: Final = 100
"""Objects drawn, best scores first, as published; the others are not even tracked, since no track sees another."""

SAME_OBJECT_IOU: Final = 0.5
"""A box found later belongs to a known object when it overlaps that object's mask or box by this much."""

COLOUR_SEED: Final = 0


# --- boxes ---


def detector_size(size: tuple[int, int], shortest: int, longest: int) -> tuple[int, int]:
    """(height, width) the detector sees for a frame of (width, height): short side `shortest`, long side at most `longest`."""
    width, height = size
    short, long = min(size), max(size)
    exact = longest * short / long if long / short * shortest > longest else shortest
    side = round(exact)
    if short == side:
        return height, width
    other = int(exact * long / short)
    return (other, side) if width < height else (side, other)


def pick_boxes(
    scores_Q: np.ndarray,
    boxes_Q4: np.ndarray,
    size: tuple[int, int],
    thresholds: Sequence[float] = BOX_THRESHOLDS,
) -> np.ndarray:
    """Boxes (N, 4) float32 worth tracking, by descending score; N is 0 when not even the last threshold helps.

    boxes_Q4: centre, width and height as fractions of the frame, as the detector gives them. size: (width,
    height). Nothing is suppressed for overlapping something better. Equal scores keep the detector's order.
    """
    best = np.argsort(-scores_Q, kind="stable")
    for threshold in thresholds:
        kept = best[scores_Q[best] > threshold]
        if len(kept):
            break
    centre, extent = boxes_Q4[kept, :2], boxes_Q4[kept, 2:]
    corners = np.concatenate([centre - extent / 2, centre + extent / 2], axis=1)
    return (corners * np.array([*size, *size])).astype(np.float32)


def box_of(mask_HW: np.ndarray) -> tuple[int, int, int, int] | None:
    """The smallest (x0, y0, x1, y1) around a mask, x1 and y1 exclusive; None for an empty mask."""
    ys, xs = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
    return (int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1) if len(ys) else None


def overlap(box_4: Sequence[float] | np.ndarray, boxes_N4: np.ndarray) -> np.ndarray:
    """Intersection over union (N,) of one box with others; 0 for boxes without area."""
    box, others = np.asarray(box_4, np.float64), np.asarray(boxes_N4, np.float64).reshape(-1, 4)
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=1)
    union = np.clip(box[2:] - box[:2], 0, None).prod() + np.clip(others[:, 2:] - others[:, :2], 0, None).prod(
        1
    )
    return shared / np.maximum(union - shared, np.finfo(np.float64).tiny)


def new_boxes(boxes_N4: np.ndarray, known: Sequence[Sequence[float] | np.ndarray]) -> np.ndarray:
    """Those of `boxes` (best first) that are no known object's, nor a double of a better new one."""
    held = [np.asarray(box, np.float64) for box in known]
    fresh = []
    for box in boxes_N4:
        if not held or overlap(box, np.stack(held)).max() < SAME_OBJECT_IOU:
            held.append(np.asarray(box, np.float64))
            fresh.append(box)
    return np.array(fresh, np.float32).reshape(-1, 4)


# --- colours ---


def colours(count: int, seed: int = COLOUR_SEED) -> np.ndarray:
    """(count, 3) uint8 RGB, row i for object i; the first rows are the same for every count.

    Hue is uniform in [0, 1], saturation in [0.1, 1], value in [0.2, 1], drawn in this order for object after
    object from Python's Mersenne Twister, then truncated to bytes. The published system draws the same way but
    from an unseeded generator, so its colours differ from run to run. No colour is black: value is at least 0.2.
    """
    draw = random.Random(seed)
    rows = [
        colorsys.hsv_to_rgb(draw.uniform(0, 1), draw.uniform(0.1, 1), draw.uniform(0.2, 1))
        for _ in range(count)
    ]
    return (np.array(rows).reshape(-1, 3) * 255).astype(np.uint8)


def painting_order(areas: Mapping[int, int]) -> list[int]:
    """Object ids in the order they are painted: most pixels over the whole clip first, so small ones stay visible.

    Of two equal ones the better detection is painted first.
    """
    return sorted(areas, key=lambda name: (-areas[name], name))


# --- masks of a clip ---


@dataclass(frozen=True)
class Patch:
    """One object in one frame: its mask (y1-y0, x1-x0) bool within the box around it."""

    name: int
    box: tuple[int, int, int, int]
    mask: np.ndarray


def paint(
    patches: Sequence[Patch], order: Sequence[int], palette_N3: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    """(H, W, 3) uint8: objects in their colours on black, in the given order."""
    frame = np.zeros((size[1], size[0], 3), np.uint8)
    here = {patch.name: patch for patch in patches}
    for name in order:
        if (patch := here.get(name)) is not None:
            x0, y0, x1, y1 = patch.box
            frame[y0:y1, x0:x1][patch.mask] = palette_N3[name]
    return frame


def union(patches: Sequence[Patch], size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8: 255 where any object is, else 0."""
    return paint(patches, [p.name for p in patches], np.full((MAX_OBJECTS, 3), 255, np.uint8), size)


class MaskStore:
    """Masks of a clip frame by frame, packed to bits and compressed in a nameless file of the temporary folder.

    The painting order needs every frame before the first is painted, and masks of a clip do not fit in memory:
    20 objects in 1000 frames of 1080p are 41 GB as bytes. `areas` counts pixels per object as frames arrive.
    Raises EnvironmentProblem when the disk cannot take more. A context manager; the file goes with it.
    """

    def __init__(self) -> None:
        self.areas: dict[int, int] = {}
        self._ends = [0]
        self._file = tempfile.TemporaryFile(prefix="cosmos-fast-masks-")

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, masks: Mapping[int, np.ndarray]) -> None:
        """Add the next frame: masks (H, W) bool by object id. Empty ones cost nothing."""
        heads, bodies = [], []
        for name, mask_HW in masks.items():
            self.areas[name] = self.areas.get(name, 0) + int(np.count_nonzero(mask_HW))
            if (box := box_of(mask_HW)) is not None:
                x0, y0, x1, y1 = box
                heads.append((name, *box))
                bodies.append(np.packbits(mask_HW[y0:y1, x0:x1]).tobytes())
        table = np.array([len(heads), *np.ravel(heads)], np.int32).tobytes()
        data = zlib.compress(table + b"".join(bodies), 1)
        try:
            self._file.seek(self._ends[-1])
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise EnvironmentProblem(
                f"segmentation: the temporary folder {tempfile.gettempdir()} must take {self._ends[-1] + len(data)} "
                f"bytes of masks, got: {error.strerror}. Free space, or point TMPDIR at a larger disk."
            ) from error
        self._ends.append(self._ends[-1] + len(data))

    def read(self, index: int) -> list[Patch]:
        """The objects of one frame, in the order they were given, without those that are not in it."""
        start, stop = self._ends[index], self._ends[index + 1]
        self._file.seek(start)
        data = zlib.decompress(self._file.read(stop - start))
        count = int(np.frombuffer(data, np.int32, 1)[0])
        rows = np.frombuffer(data, np.int32, 5 * count, offset=4).reshape(count, 5).tolist()
        return list(_patches(data, rows, 4 + 20 * count))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> MaskStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _patches(data: bytes, rows: list[list[int]], at: int) -> Iterator[Patch]:
    for name, x0, y0, x1, y1 in rows:
        pixels = (y1 - y0) * (x1 - x0)
        bits = np.frombuffer(data, np.uint8, (pixels + 7) // 8, offset=at)
        yield Patch(
            name, (x0, y0, x1, y1), np.unpackbits(bits, count=pixels).astype(bool).reshape(y1 - y0, -1)
        )
        at += len(bits)
