"""The VAE shared by ranks: each takes a strip of rows, with the overlap that `vae_rows` gives it, so there is no seam.

The blocks at latent height are cut too, twice: before the attention in their middle and from it on. There each rank gets
the rows of all, and looks from its own at all of them. Where it costs less time to encode whole clips on different ranks,
that is done instead: it repeats no row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import cast

import numpy as np
import torch
from torch import Tensor

from . import vae_strips
from .parallel import Group
from .readback import read_back
from .recipe import Plan
from .vae import VAE, windows
from .vae_keys import vae_flops
from .vae_rows import Rows, decode_path, shared_flops, strips
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
        wanted = [request for request in requests if request is not None]
        cuts = [self._strips(request.shape[1]) for request in wanted]
        before, after = (
            partial(call, self.vae) for call in (vae_strips.encode_before, vae_strips.encode_after)
        )
        features = self._each(cuts, [partial(self._strip, request) for request in wanted])
        features = self._each(cuts, [partial(before, whole) for whole in features])
        found = iter(self._each(cuts, [partial(after, whole) for whole in features]))
        return [None if request is None else torch.cat(next(found), dim=3) for request in requests]

    def _each(self, cuts: list[list[Rows]], calls: list[Callable[[Rows], Tensor]]) -> list[list[Tensor]]:
        """Of every cut and its call what the call gives for each strip, made by one rank and sent to all."""
        jobs = [partial(call, strip) for call, cut in zip(calls, cuts, strict=True) for strip in cut]
        found = iter(self.ranks.spread(jobs, self.device))
        return [[cast(Tensor, part) for part in islice(found, len(cut))] for cut in cuts]

    def _cuts_pay(self, requests: Sequence[Request]) -> bool:
        """Whether a strip of every clip for each rank is less work for the busiest one than its share of whole clips."""
        if not requests:
            return False
        shape = max(
            request.shape for request in requests
        )  # beside the longest, a single frame counts for nothing
        long, size = sum(request.shape == shape for request in requests), self.ranks.size
        alone = vae_flops(*shape, self.vae.config)[0]
        cut = shared_flops(*shape, size, self.vae.config)[0]
        return long * cut < -(-long // size) * alone

    def _strips(self, height: int) -> list[Rows]:
        """The strips of a picture of so many rows, in order of rank: latent rows."""
        return strips(height // self.vae.config.spatial, self.ranks.size)

    def _longer(self, window: int, h: int) -> int:
        """A window of the plan, for strips of h latent rows: as many times as long as there are strips.

        It takes about as much memory as that of a whole picture, and as long to compute: shorter ones keep the host busier than
        a GPU, most of all while frames are read beside.
        """
        return window * min(self.ranks.size, h)

    def _strip(self, request: Request, strip: Rows) -> Tensor:
        """(B, C, T, rows, w): a strip of every clip of a request."""
        frames, height, _ = request.shape
        h = height // self.vae.config.spatial
        window = self._longer(self.plan.vae_encode_window, h)
        return vae_strips.encode_strip(self.vae, self.pixels(request), frames, window, strip, h)

    def _whole(self, z: Tensor) -> Iterator[np.ndarray]:
        for _, codes in read_back(((None, part) for part in self._frames(z)), self.device):
            yield codes

    def _frames(self, z: Tensor) -> Iterator[Tensor]:
        """The windows of `vae.decode_stream`, every one put together from the strips of all ranks."""
        h, scale = z.shape[3], self.vae.config.spatial
        cut = self._strips(h * scale)
        heights = [rows.height * scale for rows in cut] + [0] * (self.ranks.size - len(cut))
        [features] = self._each([cut], [partial(vae_strips.decode_before, self.vae, z)])
        mine = self._nothing(z)
        if self.ranks.rank < len(cut):
            mine = self._decode_strip(features, cut[self.ranks.rank], h)
        for x in mine:
            # Rows lead and channels come last while they travel: then every rank's part is one piece of memory.
            rows = torch.cat(self.ranks.gather(x.permute(3, 0, 2, 4, 1).contiguous(), heights))
            yield rows.permute(1, 4, 2, 0, 3).contiguous(memory_format=torch.channels_last_3d)

    def _decode_strip(self, features: list[Tensor], strip: Rows, h: int) -> Iterator[Tensor]:
        """The strip's rows of every window, from the features of all ranks."""
        rows = decode_path(strip, h, self.vae.config).first
        own = vae_strips.decode_after(self.vae, features, rows)
        window = self._longer(self.plan.vae_decode_window, h)
        return (tile.x for tile in vae_strips.decode_strip(self.vae, own, rows, window, strip, h))

    def _nothing(self, z: Tensor) -> Iterator[Tensor]:
        """No row of every window: there are more ranks than latent rows."""
        for start, stop in windows(z.shape[2], self._longer(self.plan.vae_decode_window, z.shape[3])):
            frames = (stop - start) * self.vae.config.stride - (
                self.vae.config.stride - 1 if start == 0 else 0
            )
            yield z.new_empty(z.shape[0], 3, frames, 0, z.shape[4] * self.vae.config.spatial)
