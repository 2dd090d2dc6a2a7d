"""Pillow's resize, bit for bit, as two matrix products: what published models expect in front of them.

OpenCV's filters of the same names do not widen when they shrink, so they are no substitute.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

_BITS: Final = 22
"""Fraction bits of Pillow's 8-bit path: weights are integers of this scale, sums are rounded once per pass."""


def _lanczos(x: float) -> float:
    """Lanczos window of three lobes."""
    if not -3 <= x < 3:
        return 0.0
    return _sinc(x) * _sinc(x / 3)


def _sinc(x: float) -> float:
    return 1.0 if x == 0 else math.sin(x * math.pi) / (x * math.pi)


def _bicubic(x: float) -> float:
    """Keys' cubic with a = -0.5."""
    x, a = abs(x), -0.5
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


FILTERS: Final[dict[str, tuple[Callable[[float], float], float]]] = {
    "lanczos": (_lanczos, 3.0),
    "bicubic": (_bicubic, 2.0),
}


@functools.lru_cache(maxsize=16)
def _weights(before: int, after: int, filter: str) -> Tensor:
    """(after, before) float64 matrix of whole numbers: row i weighs the pixels that make new pixel i."""
    shape, reach = FILTERS[filter]
    scale = before / after
    widened = max(scale, 1.0)
    matrix = torch.zeros(after, before, dtype=torch.float64)
    for i in range(after):
        center = (i + 0.5) * scale
        first = max(int(center - reach * widened + 0.5), 0)
        last = min(int(center + reach * widened + 0.5), before)
        row = [shape((j - center + 0.5) * (1.0 / widened)) for j in range(first, last)]
        total = sum(row)
        for j, weight in zip(range(first, last), row):
            scaled = weight / total * (1 << _BITS)
            matrix[i, j] = int(scaled + math.copysign(0.5, scaled))
    return matrix


def _apply(matrix: Tensor, x: Tensor) -> Tensor:
    # Whole numbers below 2**53: float64 products and sums are exact, on every device and in any order.
    summed = matrix @ x.to(torch.float64)
    return ((summed + (1 << (_BITS - 1))) / (1 << _BITS)).floor_().clamp_(0, 255)


def pillow_resize(frames_FHW3: Tensor, size: tuple[int, int], filter: str) -> Tensor:
    """Frames at size (width, height) as Pillow's `Image.resize` makes them, on the device of `frames`.

    Shapes: frames (F, H, W, 3) uint8, returns (F, height, width, 3) uint8. filter: "lanczos" or "bicubic".
    Raises ValueError for other input.
    """
    if frames_FHW3.ndim != 4 or frames_FHW3.shape[3] != 3 or frames_FHW3.dtype != torch.uint8:
        raise ValueError(
            f"pillow_resize: frames must be (F, H, W, 3) uint8, got {tuple(frames_FHW3.shape)} {frames_FHW3.dtype}."
        )
    if filter not in FILTERS or min(size) < 1:
        raise ValueError(
            f"pillow_resize: needs a positive size and a filter of {', '.join(FILTERS)}, got {size}, {filter!r}."
        )
    (width, height), device = size, frames_FHW3.device
    x = frames_FHW3
    if x.shape[2] != width:
        x = _apply(_weights(x.shape[2], width, filter).to(device), x)
    if x.shape[1] != height:
        rows = x.flatten(2)
        x = _apply(_weights(x.shape[1], height, filter).to(device), rows).unflatten(2, (width, 3))
    return x.to(torch.uint8)
