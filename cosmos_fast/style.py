"""Style images as features of the published encoder: the vision tower of SigLIP 2, 256 tokens of one image.

The chain in front of it is the published one, step by step, since each step moves the features: Pillow's Lanczos to
the working size (the image's own aspect is lost there), x / 128 - 1 in bf16, back to pixels times 255 / 256, then an
antialiased resize that keeps the aspect and fills at most 256 patches.
"""

from __future__ import annotations

import gc
import hashlib
import heapq
import math
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from . import registry
from .disk_cache import CACHE_HOME, DiskCache, content_key
from .dispatch import pick_device
from .formats import CheckpointError, MediaError
from .resample import pillow_resize
from .vision_tower import identity, load_vision_tower, need_transformers
from .weight_file import open_tensors

TOKENS: Final = 256
PATCH: Final = 16
STYLE_CACHE: Final = CACHE_HOME / "style"
STYLE_CACHE_BYTES: Final = 1 << 30
"""About 1700 images of the published encoder."""

_EXTRA: Final = "style"


def patch_grid(height: int, width: int, tokens: int = TOKENS, patch: int = PATCH) -> tuple[int, int]:
    """(rows, columns) of patches: as many as fit into `tokens` when both sides are scaled by one factor.

    With s the factor, rows = ceil(s height / patch) and columns likewise; the largest s with
    rows * columns <= tokens counts. 704 x 1280 gives 12 x 21.
    """
    if min(height, width) < 1:
        raise ValueError(f"patch_grid: sizes must be positive, got {height}x{width}.")
    best = (1, 1)
    steps = [
        map(Fraction, range(patch, patch * (tokens + 1), patch), [side] * tokens) for side in (height, width)
    ]
    for scale in heapq.merge(*steps):  # rows and columns change at these factors only, and never shrink
        rows, columns = (max(1, math.ceil(scale * side / patch)) for side in (height, width))
        if rows * columns > tokens:
            break
        best = rows, columns
    return best


class Patches(NamedTuple):
    """One image as the model reads it. values (256, 768) float32, mask (256,) 1 for a patch, 0 for an empty slot."""

    values: Tensor
    mask: Tensor
    grid: tuple[int, int]


def preprocess(image_HW3: np.ndarray, size: tuple[int, int]) -> Patches:
    """The published chain from pixels to patches. image (H, W, 3) uint8 RGB, size the working (width, height).

    Within a patch: row, column, then colour. Raises MediaError for anything but an RGB image.
    """
    if image_HW3.ndim != 3 or image_HW3.shape[-1] != 3 or image_HW3.dtype != np.uint8:
        raise MediaError(f"style image: must be uint8 (H, W, 3), got {image_HW3.dtype} {image_HW3.shape}.")
    image = torch.from_numpy(np.ascontiguousarray(image_HW3))
    working = pillow_resize(image[None], size, "lanczos")[0].permute(2, 0, 1)
    x = working.to(torch.bfloat16) / 128 - 1  # exact: 8 bits of mantissa hold all 256 levels
    pixels = (x.float() + 1) / 2 * 255
    rows, columns = patch_grid(size[1], size[0])
    pixels = F.interpolate(
        pixels[None], (rows * PATCH, columns * PATCH), mode="bilinear", antialias=True, align_corners=False
    )[0]
    patches = ((pixels - 127.5) / 127.5).unflatten(2, (columns, PATCH)).unflatten(1, (rows, PATCH))
    patches = patches.permute(1, 3, 2, 4, 0).reshape(rows * columns, -1)
    values = torch.zeros(TOKENS, patches.shape[1])
    values[: len(patches)] = patches
    return Patches(values, (torch.arange(TOKENS) < len(patches)).int(), (rows, columns))


class SiglipStyle:
    """The published style encoder. The model is read for an image it has not seen, and freed again at once.

    folder: a model folder of the transformers layout, or the published id "style". cache: where features of earlier
    runs are; one image at one working size is one entry. Features are also held in memory.
    """

    def __init__(
        self,
        folder: str | Path = "style",
        *,
        device: str | None = None,
        dtype: torch.dtype = torch.bfloat16,
        cache: DiskCache | None = None,
    ) -> None:
        self._named, self.device, self.dtype, self._cache = folder, pick_device(device), dtype, cache
        self._found: Path | None = None
        self._held: dict[str, Tensor] = {}

    def check(self) -> Path:
        """The model's folder, downloaded if need be: every reason why no image could be encoded, before any work.

        Raises EnvironmentProblem or CheckpointError.
        """
        if self._found is None:
            need_transformers("style image", _EXTRA)
            self._found = registry.resolve_folder(self._named, ("config.json",))
        return self._found

    def encode(self, image_HW3: np.ndarray, size: tuple[int, int]) -> Tensor:
        """(H, W, 3) uint8 RGB -> (256, width) on the CPU: the last hidden state after the final norm.

        All 256 tokens count: those of empty slots are no keys inside the encoder, but they leave it as rows like
        any other, and the denoiser was trained with them. size: the working (width, height).
        """
        image = np.ascontiguousarray(image_HW3)
        digest = hashlib.sha256(image.tobytes()).hexdigest()
        model = identity(self.check())
        key = content_key("style 1", model, str(self.dtype), list(image.shape), digest, list(size))
        if key not in self._held:
            features = self._read(key)
            if features is None:
                features = self._compute(preprocess(image, size))
                self._write(key, features)
            self._held[key] = features
        return self._held[key]

    @torch.inference_mode()
    def _compute(self, patches: Patches) -> Tensor:
        model: Any = load_vision_tower(
            self.check(), "siglip2", has_head=False, dtype=self.dtype, device=self.device, extra=_EXTRA
        )
        try:
            found = model(
                pixel_values=patches.values[None].to(self.device, self.dtype),
                pixel_attention_mask=patches.mask[None].to(self.device),
                spatial_shapes=torch.tensor([patches.grid], device=self.device),
            ).last_hidden_state[0]
        finally:
            del model
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        if not bool(found.isfinite().all()):
            raise CheckpointError(f"style image: features must be finite, got NaN from {self.check()}.")
        return found.cpu()

    def _read(self, key: str) -> Tensor | None:
        """Features of an earlier run; an entry that does not read back is dropped and made again."""
        path = self._cache.get(key) if self._cache else None
        if path is None or self._cache is None:
            return None
        try:
            return open_tensors(path).tensors["features"].load().clone()
        except (CheckpointError, KeyError, OSError):
            self._cache.discard(key)
            return None

    def _write(self, key: str, features: Tensor) -> None:
        from safetensors.torch import save_file

        if self._cache is not None:
            self._cache.put(key, lambda path: save_file({"features": features.contiguous()}, path))
