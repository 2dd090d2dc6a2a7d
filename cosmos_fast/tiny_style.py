"""Style images for the embedded model: patch colours, no weights."""

from __future__ import annotations

from typing import Final

import cv2
import numpy as np
import torch
from torch import Tensor

from .formats import MediaError

GRID: Final = 16
"""Tokens along height and along width."""

PATCH: Final = 4
"""Colours of one token along height and along width, after the image was shrunk to GRID * PATCH squared."""

TOKENS: Final = GRID * GRID
WIDTH: Final = PATCH * PATCH * 3


class TinyStyle:
    """A style image as a 16 x 16 grid of tokens, each the mean colours of 4 x 4 cells of its patch.

    The encoder of the published system is a large vision model; this one has nothing to learn, so training and
    inference cannot disagree about it. The image's aspect is not kept: style is colour and light, not shape.
    """

    tokens: Final = TOKENS
    width: Final = WIDTH

    def encode(self, image_HW3: np.ndarray, size: tuple[int, int] | None = None) -> Tensor:
        """(H, W, 3) uint8 -> (256, 48) float32 in [-1, 1], row by row; within a token y, x, then RGB.

        `size`, the working size of the clip, has no effect. Raises MediaError for anything but an RGB image.
        """
        if image_HW3.ndim != 3 or image_HW3.shape[-1] != 3 or image_HW3.dtype != np.uint8:
            got = f"{image_HW3.dtype} {image_HW3.shape}"
            raise MediaError(f"style image: must be uint8 (H, W, 3), got {got}.")
        side = GRID * PATCH
        # In float, so that the means are not rounded to whole levels.
        small = cv2.resize(image_HW3.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA)
        cells = small.reshape(GRID, PATCH, GRID, PATCH, 3).transpose(0, 2, 1, 3, 4)
        return torch.from_numpy(cells.reshape(TOKENS, WIDTH) / 127.5 - 1)
