"""The VAE shared by ranks: each takes a strip of rows, with the overlap that `vae_rows` gives it, so there is no seam.

The blocks at latent height, a twentieth of the work, are not cut: in an encode one rank runs them, in a decode every
rank does, which costs less than to send their result. Where it costs less time to encode whole clips on different
ranks, that is done instead: it repeats no row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from . import vae_strips
from .parallel import Group
from .readback import read_back
from .recipe import Plan
from .vae import VAE, windows
from .vae_keys import vae_flops
from .vae_rows import Rows, strip_flops, strips
from .vae_stage import Request, VAEStage


class SharedVAEStage(VAEStage):
    """A VAEStage on every rank of a group: all make the same calls, and get the same latents and frames."""

    decodes_alone = False

    def __init__(self, vae: VAE, plan: Plan, device: torch.device, dtype: torch.dtype, ranks: Group) -> None:
        super().__init__(vae, plan, device, dtype)
        self.ranks = ranks

    def encode_all(self, requests: Sequence[Request | None]) -> list[Tensor | None]:
        """`encode` of every request, None of None. Which are None must be the same on all ranks."""
        if not self._cuts_pay([request for request in requests if request is not None]):
            whole = [None if request is None else partial(self.encode, request) for request in requests]
            return self.ranks.spread(whole, self.device)
        jobs = [
            partial(self._strip, request, rows)
            for request in requests
            if request is not None
            for rows in self._strips(request.shape[1])
        ]
        found = (strip for strip in self.ranks.spread(jobs, self.device) if strip is not None)
        rest = [
            None
            if request is None
            else partial(self._rest, list(islice(found, len(self._strips(request.shape[1])))))
            for request in requests
        ]
        return self.ranks.spread(rest, self.device)

    def _cuts_pay(self, requests: Sequence[Request]) -> bool:
        """Whether a strip of every clip for each rank is less work for the busiest one than its share of whole clips."""
        if not requests:
            return False
        shape = max(
            request.shape for request in requests
        )  # beside the longest, a single frame counts for nothing
        long, size = sum(request.shape == shape for request in requests), self.ranks.size
        alone, config = vae_flops(*shape, self.vae.config)[0], self.vae.config
        rows = strip_flops(*shape, size, config)[0] / size
        cut = rows + alone - strip_flops(*shape, 1, config)[0]
        return long * cut < -(-long // size) * alone

    def _strips(self, height: int) -> list[Rows]:
        """The strips of a picture of so many rows, in order of rank: latent rows."""
        return strips(height // self.vae.config.spatial, self.ranks.size)

    def _strip(self, request: Request, strip: Rows) -> Tensor:
        """(B, C, T, rows, w): a strip of every clip of a request, all its windows."""
        frames, height, _ = request.shape
        h, window = height // self.vae.config.spatial, self.plan.vae_encode_window
        found = vae_strips.encode_strip(self.vae, self.pixels(request), frames, window, strip, h)
        return torch.cat(found, dim=2)

    def _rest(self, parts: list[Tensor]) -> Tensor:
        """Latents from the strips of a request, in windows that are as long as before."""
        window = self.plan.vae_encode_window // self.vae.config.stride
        bounds = windows(parts[0].shape[2], window)
        found = [[part[:, :, start:stop] for start, stop in bounds] for part in parts]
        return vae_strips.encode_rest(self.vae, found)

    def _whole(self, z: Tensor) -> Iterator[np.ndarray]:
        for _, codes in read_back(((None, part) for part in self._frames(z)), self.device):
            yield codes

    def _frames(self, z: Tensor) -> Iterator[Tensor]:
        """The windows of `vae.decode_stream`, every one put together from the strips of all ranks."""
        h, rank, scale = z.shape[3], self.ranks.rank, self.vae.config.spatial
        features = vae_strips.decode_start(self.vae, z, self.plan.vae_decode_window)
        cut = self._strips(h * scale)
        heights = [rows.height * scale for rows in cut] + [0] * (self.ranks.size - len(cut))
        mine = self._nothing(z)
        if rank < len(cut):
            mine = (tile.x for tile in vae_strips.decode_strip(self.vae, features, cut[rank], h))
        for x in mine:
            # Rows lead and channels come last while they travel: then every rank's part is one piece of memory.
            rows = torch.cat(self.ranks.gather(x.permute(3, 0, 2, 4, 1).contiguous(), heights))
            yield rows.permute(1, 4, 2, 0, 3).contiguous(memory_format=torch.channels_last_3d)

    def _nothing(self, z: Tensor) -> Iterator[Tensor]:
        """No row of every window: there are more ranks than latent rows."""
        for start, stop in windows(z.shape[2], self.plan.vae_decode_window):
            frames = (stop - start) * self.vae.config.stride - (
                self.vae.config.stride - 1 if start == 0 else 0
            )
            yield z.new_empty(z.shape[0], 3, frames, 0, z.shape[4] * self.vae.config.spatial)
