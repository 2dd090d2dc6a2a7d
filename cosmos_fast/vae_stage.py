"""Frames to latents and back as an engine's plan says: window by window, as they are read and while they are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import ops, vae_strips
from .formats import SPATIAL, TEMPORAL
from .readback import read_back
from .recipe import Plan
from .vae import VAE, windows
from .vae_strips import Source

SMALLER = 4
"""Strips of a second try, where the whole picture did not fit: a third of the memory, a fifth more time."""

Frames = Callable[[int, int], np.ndarray]
"""(first, last + 1) -> uint8 (f, H, W, 3); asked for in order, it may wait for what is still being read."""


class Request(NamedTuple):
    """Clips to encode side by side: B of them, of frames, height, width `shape`.

    Their pixels are scaled to [-1, 1] in `scaled_in`, by default in the stage's dtype.
    """

    clips: Sequence[Frames]
    shape: tuple[int, int, int]
    scaled_in: torch.dtype | None = None


class VAEStage:
    """One VAE on one device. dtype: of its weights, latents and pixels.

    What does not fit into the device's memory is tried once more in strips, clip by clip; `notes` then says so.
    """

    decodes_alone = True
    """Whether decoding is this process's own business, so that it may start again."""

    def __init__(self, vae: VAE, plan: Plan, device: torch.device, dtype: torch.dtype) -> None:
        self.vae, self.plan, self.device, self.dtype = vae, plan, device, dtype
        self.notes: list[str] = []

    def encode_all(self, requests: Sequence[Request | None]) -> list[Tensor | None]:
        """`encode` of every request, None of None."""
        return [None if request is None else self.encode(request) for request in requests]

    def encode(self, request: Request) -> Tensor:
        """Latents (B, C, T, h, w). While the device encodes a window the next one is waited for, copied and queued."""
        try:
            return self._encode(request, self.plan.vae_strips)
        except torch.OutOfMemoryError:
            if self.plan.vae_strips >= SMALLER:
                raise
        self._make_room("encode")  # out here, where the error no longer holds what was half made
        return torch.cat([self._encode(request._replace(clips=[clip]), SMALLER) for clip in request.clips])

    def _encode(self, request: Request, strips: int) -> Tensor:
        pixels, shape = self.pixels(request), request.shape
        if strips > 1:
            return vae_strips.encode(self.vae, pixels, shape, self.plan.vae_encode_window, strips)
        bounds = windows(shape[0], self.plan.vae_encode_window)
        if len(bounds) == 1:  # no window after it that would need its history
            return self.vae.encode(pixels(*bounds[0], 0, shape[1]), None)
        return torch.cat(list(self.vae.encode_stream(pixels(*bound, 0, shape[1]) for bound in bounds)), dim=2)

    def pixels(self, request: Request) -> Source:
        """The clips of a request on the device, piece by piece."""

        def read(start: int, stop: int, top: int, end: int) -> Tensor:
            scaled_in = request.scaled_in or self.dtype
            parts = [self._pixels(clip(start, stop)[:, top:end], scaled_in) for clip in request.clips]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        return read

    def _pixels(self, frames_FHW3: np.ndarray, scaled_in: torch.dtype) -> Tensor:
        host = torch.from_numpy(frames_FHW3)
        if self.device.type == "cuda":  # from pinned memory the copy to the device is queued, not waited for
            host = torch.empty(host.shape, dtype=host.dtype, pin_memory=True).copy_(host)
        host = host.contiguous()
        return ops.normalized(host.to(self.device, non_blocking=True), scaled_in).to(self.dtype)

    def decode(self, z_1CTHW: Tensor, frames: int) -> Iterator[np.ndarray]:
        """The first `frames` frames, uint8 (f, H, W, 3) a window, each on its way while the next is decoded.

        With strips they come together, with the last strip. Raises ClipError for values that are not finite.
        """
        z = z_1CTHW[:, :, : 1 - (1 - frames) // TEMPORAL].to(
            self.dtype
        )  # what only later frames need is left out
        for part in self._parts(z):
            if len(part) > frames:
                part = part[:frames]
            frames -= len(part)
            yield part

    def _parts(self, z: Tensor) -> Iterator[np.ndarray]:
        done, strips = 0, self.plan.vae_strips
        try:
            for part in self._whole(z) if strips == 1 else self._put_together(z, strips):
                yield part
                done += len(part)
            return
        except torch.OutOfMemoryError:
            if strips >= SMALLER or not self.decodes_alone:
                raise
        self._make_room("decode")
        for part in self._put_together(z, SMALLER):
            if done < len(part):
                yield part[done:]
            done = max(done - len(part), 0)

    def _make_room(self, what: str) -> None:
        self.notes.append(
            f"{what}: out of GPU memory, made in {SMALLER} strips. --vae-strips {SMALLER} saves the first try."
        )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _whole(self, z: Tensor) -> Iterator[np.ndarray]:
        found = self.vae.decode_stream(z, self.plan.vae_decode_window)
        for _, codes in read_back(((None, part) for part in found), self.device):
            yield codes

    def _put_together(self, z: Tensor, strips: int) -> Iterator[np.ndarray]:
        height, width = z.shape[3] * SPATIAL, z.shape[4] * SPATIAL
        out = np.empty((1 + TEMPORAL * (z.shape[2] - 1), height, width, 3), np.uint8)
        tiles = vae_strips.decode(self.vae, z, self.plan.vae_decode_window, strips)
        for (frame, row), codes in read_back((((t.frame, t.row), t.x) for t in tiles), self.device):
            stop, end = frame + codes.shape[0], row + codes.shape[1]
            out[frame:stop, row:end] = codes
            if end == height:
                yield out[frame:stop]
