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
        before = rows.height
        x = block(cut(x, have, rows), stream)
        after = x.shape[3]
        start = rows.start * 2 if after > before else rows.start // 2 if after < before else rows.start
        have = Rows(start, start + after)
    return cut(x, have, last)


def encode(vae: VAE, read: Source, shape: tuple[int, int, int], window: int | None, count: int) -> Tensor:
    """`vae.encode` of a clip that `read` gives in pieces, in `count` strips. shape: its frames, height and width."""
    frames, height, _ = shape
    h = height // vae.config.spatial
    found = [encode_strip(vae, read, frames, window, strip, h) for strip in strips(h, count)]
    return encode_rest(vae, found)


@torch.no_grad()
def encode_strip(
    vae: VAE, read: Source, frames: int, window: int | None, strip: Rows, h: int
) -> list[Tensor]:
    """One of the strips of h latent rows, as far as strips go: (B, C, t, rows, w) of every window."""
    number = len(strip_blocks(vae.config)[0])
    bounds, found = windows(frames, window), []
    path, stream = encode_path(strip, h, vae.config), Stream(keep=len(bounds) > 1)
    for start, stop in bounds:
        x = read(start, stop, *path.first).to(vae.encoder.conv1.weight)
        x = vae.encoder.conv1(stream.extend(vae.encoder.conv1, x))
        found.append(_run([*vae.encoder.downsamples][:number], x, path, path.result, stream))
        stream.first = False
    return found


@torch.no_grad()
def encode_rest(vae: VAE, found: list[list[Tensor]]) -> Tensor:
    """Latents from what `encode_strip` gave for every strip, from the top; the lists are emptied on the way."""
    encoder, z, number = vae.encoder, vae.config.latent_channels, len(strip_blocks(vae.config)[0])
    mean, gain = latent_statistics(vae.config, vae.conv1.weight)
    stream, latents = Stream(keep=len(found[0]) > 1), []
    while found[0]:
        x = torch.cat([strip.pop(0) for strip in found], dim=3)
        for block in [*encoder.downsamples, *encoder.middle][number:]:
            x = block(x, stream)
        x = norm_conv(encoder.head, "0", "2", x, stream)
        stream.first = False
        latents.append((vae.conv1(x)[:, :z] - mean).mul_(gain))
    return torch.cat(latents, dim=2)


def decode(vae: VAE, z_BCTHW: Tensor, window: int | None, count: int) -> Iterator[Tile]:
    """The frames of `vae.decode` in `count` strips: all frames of a strip, then those of the strip below it."""
    h, features = z_BCTHW.shape[3], decode_start(vae, z_BCTHW, window)
    for strip in strips(h, count):
        yield from decode_strip(vae, features, strip, h)


@torch.no_grad()
def decode_start(vae: VAE, z_BCTHW: Tensor, window: int | None) -> list[Tensor]:
    """What runs on the whole picture before the strips: (B, C, t, h, w) of every window."""
    decoder, number = vae.decoder, len(strip_blocks(vae.config)[1])
    bounds = windows(z_BCTHW.shape[2], window)
    mean, gain = latent_statistics(vae.config, vae.conv2.weight)
    stream, features = Stream(keep=len(bounds) > 1), []
    for start, stop in bounds:
        x = vae.conv2(z_BCTHW[:, :, start:stop].to(vae.conv2.weight) / gain + mean)
        x = decoder.conv1(stream.extend(decoder.conv1, x))
        for block in [*decoder.middle, *decoder.upsamples][:-number]:
            x = block(x, stream)
        stream.first = False
        features.append(x)
    return features


@torch.no_grad()
def decode_strip(vae: VAE, features: list[Tensor], strip: Rows, h: int) -> Iterator[Tile]:
    """All frames of one of the strips of h latent rows, window by window."""
    blocks = [*vae.decoder.upsamples][-len(strip_blocks(vae.config)[1]) :]
    path, stream, frame = decode_path(strip, h, vae.config), Stream(keep=len(features) > 1), 0
    at = path.result.start - path.last.start
    for feature in features:
        x = _run(blocks, cut(feature, Rows(0, h), path.first), path, path.last, stream)
        x = norm_conv(vae.decoder.head, "0", "2", x, stream)
        stream.first = False
        yield Tile(frame, path.result.start, x[:, :, :, at : at + path.result.height])
        frame += x.shape[2]
