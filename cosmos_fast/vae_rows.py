"""A picture cut into strips of rows for the VAE: which rows each strip needs, and what that saves and costs.

A conv at the edge of a strip must see the rows beyond it. So a strip starts with as many rows more as its convs reach,
computes them too and drops them in the end: the same numbers as for the whole picture, and no seam. Rows are half-open
ranges; h is latent rows. Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .vae_keys import (
    PUBLISHED,
    Block,
    Conv,
    VAEConfig,
    block_convs,
    conv_flops,
    decoder_blocks,
    encoder_blocks,
    peak,
    vae_memory,
)

_CHUNK = 24  # latent frames of a chunk of 93 frames


class Rows(NamedTuple):
    start: int
    stop: int

    def scaled(self, by: int) -> Rows:
        return Rows(self.start * by, self.stop * by)

    def grown(self, by: int, height: int) -> Rows:
        """`by` rows more on both sides, where the picture of `height` rows has them."""
        return Rows(max(self.start - by, 0), min(self.stop + by, height))

    @property
    def height(self) -> int:
        return self.stop - self.start


def strips(h: int, count: int) -> list[Rows]:
    """All h latent rows in `count` strips of nearly equal height; in h strips if there are fewer rows."""
    count = min(count, h)
    return [Rows(h * i // count, h * (i + 1) // count) for i in range(count)]


def strip_blocks(config: VAEConfig = PUBLISHED) -> tuple[list[Block], list[Block]]:
    """Blocks of (encoder, decoder) that run strip by strip: the encoder's first, the decoder's last.

    The others are at latent height, where a picture is small, and one of them is attention over all of it.
    """
    encode, decode = encoder_blocks(config), decoder_blocks(config)
    last = max(i for i, block in enumerate(encode) if block.kind.startswith("down"))
    first = min(i for i, block in enumerate(decode) if block.kind.startswith("up"))
    return encode[: last + 1], decode[first:]


class Path(NamedTuple):
    """Rows of one strip. first: of the input. blocks: of each strip block's input. last: of the output, some of them
    wrong at the strip's edges. result: the strip itself, at the height of the output."""

    first: Rows
    blocks: tuple[Rows, ...]
    last: Rows
    result: Rows


def _path(
    blocks: Sequence[Block], wanted: Rows, height: int, more: int
) -> tuple[Rows, tuple[Rows, ...], Rows]:
    """Rows of the input, of each block's input and of the output, so that `wanted` of the output are right.

    height: rows of the whole output; more: rows that a conv before the blocks takes on each side. A strip is cut down
    to what it still needs only where its height changes: to cut is to copy, and a few rows too many cost less.
    """
    least = [wanted]
    for block in reversed(blocks):
        start, stop = least[0]
        if block.kind == "residual":
            rows = Rows(start, stop).grown(2, height)  # two convs of three rows
        elif block.kind.startswith("up"):
            rows = Rows((start - 1) // 2, (stop + 2) // 2)  # a conv of three rows behind the doubling
            height //= 2
        else:
            rows = Rows(2 * start, 2 * stop + 1)  # row i of the output is made of rows 2i, 2i + 1 and 2i + 2
            height *= 2
        least.insert(0, rows.grown(0, height))
    first = rows = least[0].grown(more, height)
    at = []
    for block, few in zip(blocks, least, strict=False):
        if block.kind != "residual":
            rows = few
        at.append(rows)
        if block.kind.startswith("up"):
            rows = rows.scaled(2)
        elif block.kind.startswith("down"):
            rows = Rows(rows.start // 2, rows.start // 2 + rows.height // 2)
    return first, tuple(at), rows


def encode_path(strip: Rows, h: int, config: VAEConfig = PUBLISHED) -> Path:
    """From pixel rows to the latent rows of `strip`, of h."""
    first, at, last = _path(strip_blocks(config)[0], strip, h, more=1)
    return Path(first, (first, *at[1:]), last, strip)


def decode_path(strip: Rows, h: int, config: VAEConfig = PUBLISHED) -> Path:
    """From latent rows to the pixel rows of `strip`, of h; behind the blocks comes a last conv of three rows."""
    height, pixels = h * config.spatial, strip.scaled(config.spatial)
    first, at, last = _path(strip_blocks(config)[1], pixels.grown(1, height), height, more=0)
    return Path(first, at, last, pixels)


def encode_rows(strip: Rows, h: int, config: VAEConfig = PUBLISHED) -> tuple[Rows, Rows]:
    """Rows to compute at latent height before the attention, for those of `strip` there, and from it on, for latents."""
    blocks = len(encoder_blocks(config)) - len(strip_blocks(config)[0]) + 1
    return strip.grown(2 * blocks, h), strip.grown(2 + 1, h)


def decode_rows(strip: Rows, h: int, config: VAEConfig = PUBLISHED) -> tuple[Rows, Rows]:
    """The same of a decode: for those of `strip` where the attention is, and from it on for those that blocks behind it give."""
    blocks = len(decoder_blocks(config)) - len(strip_blocks(config)[1]) + 1
    return strip.grown(1 + 2, h), strip.grown(2 * blocks, h)


def strip_convs(
    strip: Rows, height: int, width: int, frames: int, config: VAEConfig = PUBLISHED, lead: int = 0
) -> tuple[list[Conv], list[Conv]]:
    """Convs of (an encode, a decode) of one strip of `frames` video frames; `lead` as in `vae_convs`."""
    h, bottom = height // config.spatial, config.bottom
    before, after = strip_blocks(config)
    path = encode_path(strip, h, config)
    pixels = path.first.height * width
    encode = [Conv(3, bottom, 27, frames * pixels, frames * pixels, 2 * pixels)]
    count, columns = frames, width
    for block, rows in zip(before, path.blocks, strict=True):
        convs, count, _ = block_convs(block, count, lead, rows.height * columns)
        columns = columns // 2 if block.kind.startswith("down") else columns
        encode += convs
    path, decode = decode_path(strip, h, config), []
    for block, rows in zip(after, path.blocks, strict=True):
        convs, count, _ = block_convs(block, count, lead, rows.height * columns)
        columns = columns * 2 if block.kind.startswith("up") else columns
        decode += convs
    pixels = path.last.height * width
    return encode, [*decode, Conv(bottom, 3, 27, count * pixels, count * pixels, 2 * pixels)]


def strip_flops(
    frames: int, height: int, width: int, count: int, config: VAEConfig = PUBLISHED
) -> tuple[float, float]:
    """FLOP of the strip blocks of (an encode, a decode) of `frames` (4k+1) frames in `count` strips; 1 is no cut."""
    totals = [0.0, 0.0]
    for strip in strips(height // config.spatial, count):
        for side, convs in enumerate(strip_convs(strip, height, width, frames, config, lead=1)):
            totals[side] += sum(map(conv_flops, convs))
    return totals[0], totals[1]


def latent_flops(
    frames: int, height: int, width: int, count: int, config: VAEConfig = PUBLISHED
) -> tuple[float, float]:
    """The same of the blocks at latent height, each strip with its rows; keys and values of all rows with every strip."""
    h, w, top, z = height // config.spatial, width // config.spatial, config.top, config.latent_channels
    T, residual = 1 + (frames - 1) // config.stride, Block("residual", config.top, config.top)
    before, after = strip_blocks(config)
    first = [*encoder_blocks(config)[len(before) :], residual], [residual]
    last = [residual], [residual, *decoder_blocks(config)[: -len(after)]]
    # Behind the encoder's blocks, before the decoder's: (width, out, taps) of what else is convolved.
    ends = ((top, 2 * z, 27), (2 * z, 2 * z, 1)), ((z, z, 1), (z, top, 27))
    totals, every = [0.0, 0.0], T * h * w
    for strip in strips(h, count):
        taken = decode_path(strip, h, config).first
        decode = decode_rows(strip, h, config)[0], decode_rows(taken, h, config)[1]
        for side, rows in enumerate((encode_rows(strip, h, config), decode)):
            sizes = [T * w * part.height for part in rows]
            for size, blocks in zip(sizes, (first[side], last[side]), strict=True):
                convs = [conv for block in blocks for conv in block_convs(block, 1, 0, size)[0]]
                totals[side] += sum(map(conv_flops, convs))
            end = sizes[1 - side]
            totals[side] += sum(conv_flops(Conv(*kind, end, end)) for kind in ends[side])
            own = sizes[1]
            products = Conv(top, 3 * top, 1, every, every), Conv(top, top, 1, own, own)
            totals[side] += sum(map(conv_flops, products)) + 4.0 * own * h * w * top
    return totals[0], totals[1]


def shared_flops(
    frames: int, height: int, width: int, ranks: int, config: VAEConfig = PUBLISHED
) -> tuple[float, float]:
    """FLOP of each of `ranks` ranks that share (an encode, a decode), on average of those that have a strip."""
    given, count = (frames, height, width, ranks, config), len(strips(height // config.spatial, ranks))
    cut, rest = strip_flops(*given), latent_flops(*given)
    return (cut[0] + rest[0]) / count, (cut[1] + rest[1]) / count


def strip_memory(
    height: int, width: int, window: int, latent_window: int, count: int, config: VAEConfig = PUBLISHED
) -> tuple[int, int]:
    """`vae_memory` with the picture in `count` strips. Counted besides: what goes between strips and whole picture,
    of one chunk of 93 frames, since a strip passes through all windows before the next one begins. Not counted: the
    blocks at latent height, which hold less than a strip as long as strips have several rows.
    """
    if count == 1:
        return vae_memory(height, width, window, latent_window, config)
    h, w = height // config.spatial, width // config.spatial
    between = config.top * _CHUNK * h * w
    encode = [strip_convs(s, height, width, window, config)[0] for s in strips(h, count)]
    decode = [
        strip_convs(s, height, width, latent_window * config.stride, config)[1] for s in strips(h, count)
    ]
    return between + max(map(peak, encode)), between + max(map(peak, decode))
