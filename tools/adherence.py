"""How well a clip follows what it was asked for: one number per control, colour by name, PSNR.

Frames are (F, H, W, 3) uint8. Used by tools/evaluate_model.py and tests/test_embedded.py.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import cv2  # noqa: E402
import numpy as np  # noqa: E402

from cosmos_fast import controls  # noqa: E402
from tools.data.colours import PALETTE, region_colour  # noqa: E402

TOLERANCE = 2
"""Pixels by which an edge may be off and still count: a quarter of a latent element."""


def edge_f1(made: np.ndarray, wanted: np.ndarray, tolerance: int = TOLERANCE) -> float:
    """F1 of the medium Canny edges of two clips, each edge pixel right if the other has one within `tolerance`."""
    ours, theirs = (controls.edge(clip)[..., 0] > 0 for clip in (made, wanted))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * tolerance + 1,) * 2)
    hits = [0, 0]
    for a, b in zip(ours, theirs, strict=True):
        near_a, near_b = (cv2.dilate(x.astype(np.uint8), disc) > 0 for x in (a, b))
        hits[0] += int((a & near_b).sum())
        hits[1] += int((b & near_a).sum())
    if not theirs.any():
        return float(not ours.any())
    precision, recall = hits[0] / max(int(ours.sum()), 1), hits[1] / int(theirs.sum())
    return 2 * precision * recall / max(precision + recall, 1e-9)


def blur_ssim(made: np.ndarray, wanted: np.ndarray) -> float:
    """SSIM of the two clips' own medium blur controls, mean over frames and channels."""
    return ssim(controls.vis(made), controls.vis(wanted))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity with the usual Gaussian window (11, 1.5) and constants for 8 bits."""
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

    def mean(x: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(x, (11, 11), 1.5)

    values = []
    for x, y in zip(a.astype(np.float32), b.astype(np.float32), strict=True):
        mx, my = mean(x), mean(y)
        vx, vy, vxy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
        map_HW3 = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
        values.append(float(map_HW3.mean()))
    return float(np.mean(values))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal to noise ratio in dB, at most 99."""
    mse = float(np.mean((a.astype(np.float32) - b.astype(np.float32)) ** 2))
    return 99.0 if mse < 1e-5 else min(99.0, 10 * np.log10(255**2 / mse))


def mean_iou(got: np.ndarray, truth: np.ndarray, classes: int) -> float:
    """Intersection over union of class maps, mean over the classes that the truth shows."""
    values = []
    for c in range(classes):
        wanted, found = truth == c, got == c
        if wanted.any():
            values.append(float((wanted & found).sum() / (wanted | found).sum()))
    return float(np.mean(values))


def main_colour(frames: np.ndarray, mask_FHW: np.ndarray) -> str:
    """Name of the colour of a region, its 2-pixel rim left out where that leaves a quarter of it."""
    rim = np.ones((5, 5), np.uint8)
    inner = np.stack([cv2.erode(m.astype(np.uint8), rim) > 0 for m in mask_FHW])
    return region_colour(frames, inner if inner.sum() * 4 > mask_FHW.sum() else mask_FHW)


def recoloured(caption: str, old: str, new: str) -> str:
    """The caption with another colour for the main object. Raises ValueError if it does not name the old one."""
    if new not in PALETTE:
        raise ValueError(f"recoloured: must be one of {', '.join(PALETTE)}, got {new!r}.")
    text, count = re.subn(
        rf"\b(?:(an?) )?{old}\b", lambda m: _article(m[1], new), caption, count=1, flags=re.IGNORECASE
    )
    if count == 0:
        raise ValueError(f"recoloured: the caption must name {old}, got {caption!r}.")
    return text


def _article(article: str | None, colour: str) -> str:
    if article is None:
        return colour
    fitting = "an" if colour[0] in "aeiou" else "a"
    return f"{fitting.capitalize() if article[0].isupper() else fitting} {colour}"
