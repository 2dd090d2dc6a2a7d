"""Tiles of the kernels in `convolution`, and which are fastest for the convs of the published VAE."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True)
class Tiles:
    """One program's tile: m pixels, low + high output channels (two accumulators), k input channels a step.

    parts: pieces in which the channels of `low` are rounded and stored. fold: taps of a row in one step (`conv3d`).
    programs: of one multiprocessor, each with tiles of its own in turn.
    """

    m: int
    low: int
    high: int
    k: int
    warps: int
    stages: int
    parts: int = 2
    fold: bool = True
    flatten: bool = True
    programs: int = 1


FASTEST: dict[tuple[int, int, int], Tiles] = {
    (27, 96, 96): Tiles(256, 128, 0, 32, 8, 7, parts=4),
    (27, 192, 192): Tiles(256, 128, 64, 64, 8, 3, parts=4, flatten=False),
    (27, 384, 384): Tiles(256, 128, 64, 64, 8, 3, parts=4, flatten=False),
    (4, 192, 96): Tiles(256, 128, 0, 64, 8, 4, parts=4),
    (4, 384, 192): Tiles(128, 128, 64, 64, 8, 4),
    (54, 96, 12): Tiles(256, 16, 0, 32, 8, 7, parts=1),
    (36, 96, 6): Tiles(256, 16, 0, 32, 8, 7, parts=1),
    (27, 8, 96): Tiles(256, 128, 0, 32, 8, 4, parts=4),
    (9, 96, 96): Tiles(256, 128, 0, 32, 8, 7, parts=4),
    (9, 192, 192): Tiles(128, 128, 64, 64, 8, 4),
    (27, 96, 192): Tiles(256, 128, 64, 64, 8, 3, parts=4, flatten=False),
    (27, 192, 384): Tiles(256, 128, 0, 64, 8, 4, parts=4),
    (1, 96, 192): Tiles(128, 128, 64, 64, 8, 4),
    (1, 192, 384): Tiles(256, 128, 0, 64, 8, 4, parts=4),
    (3, 384, 768): Tiles(128, 128, 0, 64, 4, 3, parts=4, programs=2),
    (9, 384, 384): Tiles(256, 128, 0, 64, 8, 4, parts=4),
    (3, 192, 192): Tiles(256, 64, 32, 64, 8, 4),
}
"""(taps, C, O) -> the fastest tile of the sweep recorded as vae-conv.json in bench/results/; the rules of `tiles_for` decide elsewhere."""


FASTEST_FP8: dict[tuple[int, int, int], Tiles] = {
    (27, 96, 96): Tiles(256, 128, 0, 64, 8, 7, parts=4),
    (27, 192, 192): Tiles(256, 128, 64, 64, 8, 6, parts=4, flatten=False),
    (27, 96, 192): Tiles(256, 128, 64, 64, 8, 6, parts=4, flatten=False),
    (27, 192, 384): Tiles(256, 128, 64, 64, 8, 6, parts=4, flatten=False),
    (27, 384, 384): Tiles(256, 128, 64, 128, 8, 3, parts=4, flatten=False),
}
"""The same for codes, which have a table of their own: `conv3d_fp8`. Not measured yet, but by the shape of the others: as
many bytes a step, and k that divides the three pixels of a folded step where one does."""


def tiles_for(taps: int, C: int, O: int, dtype: torch.dtype) -> Tiles:  # noqa: E741
    """The tile for a product of `taps` taps from C to O channels."""
    if dtype == torch.float32:  # no tensor cores: for checks, not for speed
        return Tiles(32, 32, 0, 16, 4, 2, parts=1)
    is_codes = dtype == torch.float8_e4m3fn
    if found := (FASTEST_FP8 if is_codes else FASTEST).get((taps, C, O)):
        return found
    k = 64 if C > 32 else max(triton.next_power_of_2(C), 32 if is_codes else 16)
    if O <= 32:
        return Tiles(256, 16 if O <= 16 else 32, 0, k, 8, 4, parts=1)
    if O % 192 == 0:
        return Tiles(256, 128, 64, k, 8, 3, parts=4)
    return Tiles(256, 128, 0, k, 8, 4, parts=4)
