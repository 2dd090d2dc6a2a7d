"""The VAE on a picture in strips of rows: the result of the whole picture in a fraction of the memory.

At 720p the histories of the convs alone are 4 GiB of a decode, so no order of work inside a window brings it below
that. Here each strip passes through all windows before the next one begins, with histories of its own height. The
blocks at latent height, and with them the attention over the whole picture, run on the whole picture: behind the
strips in an encode, before them in a decode. `vae_rows` says which rows a strip takes along so that there is no seam.

Letters as in `vae.py`: (B, C, F, H, W) pixels, (B, C, T, h, w) latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .vae import VAE, Stream, frames_like, latent_statistics, norm_conv, windows
from .vae_rows import Path, Rows, decode_path, encode_path, strip_blocks, strips

Source = Callable[[int, int, int, int], Tensor]
"""(first frame, last + 1, first row, last + 1) -> that part of a clip, (B, 3, f, rows, W) in [-1, 1]."""


class Tile(NamedTuple):
    """A part of a decoded clip: x (B, 3, f, rows, W), not clamped, and where it belongs."""

    frame: int
    row: int
    x: Tensor


def cut(x: Tensor, have: Rows, want: Rows) -> Tensor:
    """Rows `want` of x, which has the rows `have` of a picture; a dense copy in x's layout, or x itself."""
    if have == want:
        return x
    part = x[:, :, :, want.start - have.start : want.stop - have.start]
    return frames_like(x, tuple(part.shape)).copy_(part)


def _run(blocks: list[nn.Module], x: Tensor, path: Path, last: Rows, stream: Stream) -> Tensor:
    """Through the strip blocks, cut down where the path says so; `last`: rows to give."""
    have = path.blocks[0]
    for block, rows in zip(blocks, path.blocks, strict=True):
        before = rows.count
        x = block(cut(x, have, rows), stream)
        after = x.shape[3]
        start = rows.start * 2 if after > before else rows.start // 2 if after < before else rows.start
        have = Rows(start, start + after)
    return cut(x, have, last)


@torch.no_grad()
def encode(vae: VAE, read: Source, shape: tuple[int, int, int], window: int | None, count: int) -> Tensor:
    """`vae.encode` of a clip that `read` gives in pieces, in `count` strips. shape: its frames, height and width."""
    frames, height, _ = shape
    h, z = height // vae.config.spatial, vae.config.latent_channels
    encoder, number = vae.encoder, len(strip_blocks(vae.config)[0])
    blocks = [*encoder.downsamples, *encoder.middle]
    bounds = windows(frames, window)
    found: list[list[Tensor]] = [[] for _ in bounds]
    for strip in strips(h, count):
        path, stream = encode_path(strip, h, vae.config), Stream(keep=len(bounds) > 1)
        for parts, (start, stop) in zip(found, bounds, strict=True):
            x = read(start, stop, *path.first).to(encoder.conv1.weight)
            x = encoder.conv1(stream.extend(encoder.conv1, x))
            parts.append(_run(blocks[:number], x, path, path.result, stream))
            stream.first = False
    mean, gain = latent_statistics(vae.config, vae.conv1.weight)
    stream, latents = Stream(keep=len(bounds) > 1), []
    for index, parts in enumerate(found):
        x = torch.cat(parts, dim=3)
        found[index] = []
        for block in blocks[number:]:
            x = block(x, stream)
        x = norm_conv(encoder.head, "0", "2", x, stream)
        stream.first = False
        latents.append((vae.conv1(x)[:, :z] - mean).mul_(gain))
    return torch.cat(latents, dim=2)


@torch.no_grad()
def decode(vae: VAE, z_BCTHW: Tensor, window: int | None, count: int) -> Iterator[Tile]:
    """The frames of `vae.decode` in `count` strips: all frames of a strip, then those of the strip below it."""
    h, stride = z_BCTHW.shape[3], vae.config.stride
    decoder, number = vae.decoder, len(strip_blocks(vae.config)[1])
    blocks = [*decoder.middle, *decoder.upsamples]
    bounds = windows(z_BCTHW.shape[2], window)
    mean, gain = latent_statistics(vae.config, vae.conv2.weight)
    stream, features = Stream(keep=len(bounds) > 1), []
    for start, stop in bounds:
        x = vae.conv2(z_BCTHW[:, :, start:stop].to(vae.conv2.weight) / gain + mean)
        x = decoder.conv1(stream.extend(decoder.conv1, x))
        for block in blocks[:-number]:
            x = block(x, stream)
        stream.first = False
        features.append(x)
    del x, stream
    for strip in strips(h, count):
        path, stream = decode_path(strip, h, vae.config), Stream(keep=len(bounds) > 1)
        for (start, _), feature in zip(bounds, features, strict=True):
            x = cut(feature, Rows(0, h), path.first)
            x = _run(blocks[-number:], x, path, path.last, stream)
            x = norm_conv(decoder.head, "0", "2", x, stream)
            stream.first = False
            at = path.result.start - path.last.start
            yield Tile(
                max(0, 1 + stride * (start - 1)), path.result.start, x[:, :, :, at : at + path.result.count]
            )
