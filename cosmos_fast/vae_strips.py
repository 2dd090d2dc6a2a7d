"""The VAE on a picture in strips of rows: the result of the whole picture in a fraction of the memory.

At 720p the histories of the convs alone are 4 GiB of a decode, so no order of work inside a window brings it below
that. Here each strip passes through all windows before the next one begins, with histories of its own height. The
blocks at latent height come behind the strips in an encode, before them in a decode: here on the whole picture, among ranks
by rows too, except that the attention in their middle looks at all of them. `vae_rows` says which rows a strip takes along so
that there is no seam.

Letters as in `vae.py`: (B, C, F, H, W) pixels, (B, C, T, h, w) latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from .vae import VAE, Attention, Stream, frames_like, latent_statistics, norm_conv, windows
from .vae_rows import (
    Path,
    Rows,
    decode_path,
    decode_rows,
    encode_path,
    encode_rows,
    strip_blocks,
    strips,
)

LATENT_WINDOW = 8
"""Latent frames that the blocks at latent height take at a time. One by one they keep the host busier than a GPU: what one of two
ranks does before the attention of an encode took an H200 35 to 57 ms so, 17 in fours or eights (2026-11-23-4c39407-strips.json)."""

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
    return encode_after(vae, [encode_before(vae, found, Rows(0, h))], Rows(0, h))


@torch.no_grad()
def encode_strip(vae: VAE, read: Source, frames: int, window: int | None, strip: Rows, h: int) -> Tensor:
    """One of the strips of h latent rows, as far as strips go: (B, C, T, rows, w)."""
    number = len(strip_blocks(vae.config)[0])
    bounds, found = windows(frames, window), []
    path, stream = encode_path(strip, h, vae.config), Stream(keep=len(bounds) > 1)
    for start, stop in bounds:
        x = read(start, stop, *path.first).to(vae.encoder.conv1.weight)
        x = vae.encoder.conv1(stream.extend(vae.encoder.conv1, x))
        found.append(_run([*vae.encoder.downsamples][:number], x, path, path.result, stream))
        stream.first = False
    return torch.cat(found, dim=2)


@torch.no_grad()
def encode_before(vae: VAE, found: Sequence[Tensor], rows: Rows) -> Tensor:
    """Rows of what the attention takes. found: what `encode_strip` gave for every strip, from the top."""
    encoder, number = vae.encoder, len(strip_blocks(vae.config)[0])
    blocks, made = [*[*encoder.downsamples][number:], encoder.middle[0]], []
    for x, stream in _windows(found):
        have = encode_rows(rows, x.shape[3], vae.config)[0]
        x = cut(x, Rows(0, x.shape[3]), have)
        for block in blocks:
            x = block(x, stream)
        made.append(cut(x, have, rows))
    return torch.cat(made, dim=2)


@torch.no_grad()
def encode_after(vae: VAE, found: Sequence[Tensor], rows: Rows) -> Tensor:
    """These rows of the latents. found: what `encode_before` gave, together all rows, from the top."""
    encoder, z, latents = vae.encoder, vae.config.latent_channels, []
    mean, gain = latent_statistics(vae.config, vae.conv1.weight)
    for x, stream in _windows(found):
        have = encode_rows(rows, x.shape[3], vae.config)[1]
        x = encoder.middle[2](_attended(encoder.middle[1], x, have), stream)
        x = cut(norm_conv(encoder.head, "0", "2", x, stream), have, rows)
        latents.append((vae.conv1(x)[:, :z] - mean).mul_(gain))
    return torch.cat(latents, dim=2)


def _windows(strips: Sequence[Tensor]) -> Iterator[tuple[Tensor, Stream]]:
    """All rows of a few frames at a time, and what is carried from one time to the next."""
    bounds = windows(strips[0].shape[2], LATENT_WINDOW)
    stream = Stream(keep=len(bounds) > 1)
    for start, stop in bounds:
        yield torch.cat([strip[:, :, start:stop] for strip in strips], dim=3), stream
        stream.first = False


def _attended(attention: nn.Module, x: Tensor, rows: Rows) -> Tensor:
    """Rows of x and what they attend in all of x, which is lost."""
    return cast(Attention, attention).added(cut(x, Rows(0, x.shape[3]), rows), x, rows.start)


def decode(vae: VAE, z_BCTHW: Tensor, window: int | None, count: int) -> Iterator[Tile]:
    """The frames of `vae.decode` in `count` strips: all frames of a strip, then those of the strip below it."""
    whole = Rows(0, z_BCTHW.shape[3])
    features = decode_after(vae, [decode_before(vae, z_BCTHW, whole)], whole)
    for strip in strips(whole.height, count):
        yield from decode_strip(vae, features, whole, window, strip, whole.height)


@torch.no_grad()
def decode_before(vae: VAE, z_BCTHW: Tensor, rows: Rows) -> Tensor:
    """Rows of what the attention takes, (B, C, T, rows, w)."""
    decoder, whole, made = vae.decoder, Rows(0, z_BCTHW.shape[3]), []
    mean, gain = latent_statistics(vae.config, vae.conv2.weight)
    have = decode_rows(rows, whole.height, vae.config)[0]
    for z, stream in _windows([z_BCTHW]):
        x = vae.conv2(cut(z, whole, have).to(vae.conv2.weight) / gain + mean)
        x = decoder.conv1(stream.extend(decoder.conv1, x))
        made.append(cut(decoder.middle[0](x, stream), have, rows))
    return torch.cat(made, dim=2)


@torch.no_grad()
def decode_after(vae: VAE, found: Sequence[Tensor], rows: Rows) -> Tensor:
    """Rows of what strips begin with. found: what `decode_before` gave, together all rows, from the top."""
    decoder, number, made = vae.decoder, len(strip_blocks(vae.config)[1]), []
    blocks = [decoder.middle[2], *[*decoder.upsamples][:-number]]
    for x, stream in _windows(found):
        have = decode_rows(rows, x.shape[3], vae.config)[1]
        x = _attended(decoder.middle[1], x, have)
        for block in blocks:
            x = block(x, stream)
        made.append(cut(x, have, rows))
    return torch.cat(made, dim=2)


@torch.no_grad()
def decode_strip(
    vae: VAE, features: Tensor, have: Rows, window: int | None, strip: Rows, h: int
) -> Iterator[Tile]:
    """All frames of one of the strips of h latent rows, window by window, from features of the rows `have`."""
    blocks = [*vae.decoder.upsamples][-len(strip_blocks(vae.config)[1]) :]
    bounds, frame = windows(features.shape[2], window), 0
    path, stream = decode_path(strip, h, vae.config), Stream(keep=len(bounds) > 1)
    at = path.result.start - path.last.start
    for start, stop in bounds:
        x = cut(features[:, :, start:stop], have, path.first)
        x = _run(blocks, x, path, path.last, stream)
        x = norm_conv(vae.decoder.head, "0", "2", x, stream)
        stream.first = False
        yield Tile(frame, path.result.start, x[:, :, :, at : at + path.result.height])
        frame += x.shape[2]
