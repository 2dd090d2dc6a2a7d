"""Which scene belongs to an index: the two families and how they alternate."""

from __future__ import annotations

from . import arm, street
from .mjcf import Scene

HELD_OUT = 1_000_000
"""Indices from here on are for evaluation; training uses smaller ones."""

FAMILIES = {"arm": arm.build, "street": street.build}


def build_scene(index: int, seed: int, frames: int, aspect: float, attempt: int = 0) -> Scene:
    """The scene of (seed, index): families take turns.

    Args:
        frames: F, one more than a multiple of 4.
        aspect: width over height of the picture.
        attempt: draws again where an earlier draw hid the main object.
    """
    names = tuple(FAMILIES)
    return FAMILIES[names[index % len(names)]](index, seed, frames, aspect, attempt)
