"""The eight colours that captions name, and the rules that name a colour seen in a picture."""

from __future__ import annotations

import colorsys

import numpy as np
import numpy.typing as npt

PALETTE: dict[str, tuple[float, float, float]] = {
    "red": (0.84, 0.07, 0.08),
    "orange": (0.96, 0.42, 0.03),
    "yellow": (0.95, 0.83, 0.06),
    "green": (0.08, 0.60, 0.14),
    "blue": (0.08, 0.22, 0.86),
    "purple": (0.50, 0.10, 0.68),
    "white": (0.93, 0.93, 0.92),
    "black": (0.045, 0.045, 0.05),
}
"""Surface colour by name, RGB in [0, 1]. Lamps and shading change what a camera sees; the rules below allow for it."""

# Hue in degrees where one name ends and the next begins. Warm lamps push hues towards orange and cool ones
# towards blue, so the borders lie halfway between what the palette becomes under the lamps of `looks`.
_HUES = (
    (13.0, "red"),
    (40.0, "orange"),
    (68.0, "yellow"),
    (175.0, "green"),
    (257.0, "blue"),
    (325.0, "purple"),
)
_GREY_BELOW = 0.36  # saturation
_BLACK_BELOW = (
    0.28  # value of a grey: black cars reach 0.23 by windows and highlights, white ones at night fall to 0.43
)
_DARK_BELOW = 0.09  # value under which no hue is trusted


def nearest_colour(rgb: npt.ArrayLike) -> str:
    """Name of the palette colour that (3,) RGB shows, by hue, saturation and value.

    Args:
        rgb: uint8 or any integers in 0..255, or floats in [0, 1].
    Raises:
        ValueError: not three numbers, or out of range.
    """
    values = np.asarray(rgb)
    if values.shape != (3,):
        raise ValueError(
            f"nearest_colour: needs 3 numbers, got shape {values.shape}. Average over pixels first."
        )
    scale = 255.0 if values.dtype.kind in "iu" else 1.0
    scaled = values.astype(np.float64) / scale
    if not (scaled.min() >= 0.0 and scaled.max() <= 1.0):
        raise ValueError(
            f"nearest_colour: values must lie in [0, 1] or 0..255, got {values.tolist()}. Clip them."
        )
    hue, saturation, value = colorsys.rgb_to_hsv(*scaled)
    if value < _DARK_BELOW:
        return "black"
    if saturation < _GREY_BELOW:
        return "black" if value < _BLACK_BELOW else "white"
    return next((name for end, name in _HUES if hue * 360.0 < end), "red")


def region_colour(rgb: npt.NDArray[np.uint8], mask: npt.NDArray[np.bool_]) -> str:
    """Name of the colour of a region: `nearest_colour` of the mean over the masked pixels.

    Args:
        rgb: (..., 3) uint8.
        mask: (...) bool, the region.
    Raises:
        ValueError: shapes differ, or the region is empty.
    """
    if mask.shape != rgb.shape[:-1]:
        raise ValueError(
            f"region_colour: mask must have shape {rgb.shape[:-1]}, got {mask.shape}. Resize it."
        )
    if not mask.any():
        raise ValueError("region_colour: the region needs a pixel, got an empty mask. Check the label id.")
    return nearest_colour(rgb[mask].mean(axis=0, dtype=np.float64) / 255.0)
