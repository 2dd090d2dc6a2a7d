"""The shape of the video VAE as plain data: its blocks in order, its tensor names, the diffusers names.

Imports nothing but the standard library. `vae.py` builds its modules from the same block lists, and
`checkpoint.py` checks a file against `vae_layout` before a single module exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

BASE: Final = 96
LATENT: Final = 16
MULTIPLIERS: Final = (1, 2, 4, 4)
RESIDUALS: Final = 2
TEMPORAL: Final = (False, True, True)

Shape = tuple[int, ...]


class Conv(NamedTuple):
    """One conv as it runs over a clip: widths, taps, output frames and pixels of a frame, input pixels.

    `past` is the number of input frames it carries from window to window.
    """

    width: int
    out: int
    taps: int
    frames: int
    pixels: int
    past: int
    pixels_in: int


class Block(NamedTuple):
    """One numbered block: `kind` is residual, down, down_time, up or up_time; widths in channels."""

    kind: str
    width: int
    out: int


def encoder_blocks(
    base: int = BASE,
    multipliers: Shape = MULTIPLIERS,
    residuals: int = RESIDUALS,
    temporal: tuple[bool, ...] = TEMPORAL,
) -> list[Block]:
    """Blocks of `encoder.downsamples` in order. `temporal[i]`: stage change i also halves the frames."""
    blocks: list[Block] = []
    width = base
    for stage, multiplier in enumerate(multipliers):
        for _ in range(residuals):
            blocks.append(Block("residual", width, base * multiplier))
            width = base * multiplier
        if stage < len(multipliers) - 1:
            blocks.append(Block("down_time" if temporal[stage] else "down", width, width))
    return blocks


def decoder_blocks(
    base: int = BASE,
    multipliers: Shape = MULTIPLIERS,
    residuals: int = RESIDUALS,
    temporal: tuple[bool, ...] = TEMPORAL,
) -> list[Block]:
    """Blocks of `decoder.upsamples` in order; one residual block a stage more than the encoder has."""
    blocks: list[Block] = []
    width = base * multipliers[-1]
    for stage, multiplier in enumerate(reversed(multipliers)):
        for _ in range(residuals + 1):
            blocks.append(Block("residual", width, base * multiplier))
            width = base * multiplier
        if stage < len(multipliers) - 1:
            # The up-sampling conv is where the channels halve, so the next stage starts at half width.
            blocks.append(Block("up_time" if temporal[-1 - stage] else "up", width, width // 2))
            width //= 2
    return blocks


def _conv(name: str, out: int, width: int, *kernel: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (out, width, *kernel)
    yield f"{name}.bias", (out,)


def _residual(name: str, width: int, out: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.residual.0.gamma", (width, 1, 1, 1)
    yield from _conv(f"{name}.residual.2", out, width, 3, 3, 3)
    yield f"{name}.residual.3.gamma", (out, 1, 1, 1)
    yield from _conv(f"{name}.residual.6", out, out, 3, 3, 3)
    if width != out:
        yield from _conv(f"{name}.shortcut", out, width, 1, 1, 1)


def _middle(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield from _residual(f"{name}.0", width, width)
    yield f"{name}.1.norm.gamma", (width, 1, 1)
    yield from _conv(f"{name}.1.to_qkv", 3 * width, width, 1, 1)
    yield from _conv(f"{name}.1.proj", width, width, 1, 1)
    yield from _residual(f"{name}.2", width, width)


def _block(name: str, block: Block) -> Iterator[tuple[str, Shape]]:
    if block.kind == "residual":
        yield from _residual(name, block.width, block.out)
        return
    yield from _conv(f"{name}.resample.1", block.out, block.width, 3, 3)
    if block.kind == "down_time":
        yield from _conv(f"{name}.time_conv", block.width, block.width, 3, 1, 1)
    elif block.kind == "up_time":
        yield from _conv(f"{name}.time_conv", 2 * block.width, block.width, 3, 1, 1)


def _head(name: str, width: int, out: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.0.gamma", (width, 1, 1, 1)
    yield from _conv(f"{name}.2", out, width, 3, 3, 3)


def vae_layout(
    base: int = BASE,
    latent_channels: int = LATENT,
    multipliers: Shape = MULTIPLIERS,
    residuals: int = RESIDUALS,
    temporal: tuple[bool, ...] = TEMPORAL,
) -> dict[str, Shape]:
    """Every tensor of the VAE: published name -> shape. The defaults are the published model, 194 tensors."""
    plan = (base, multipliers, residuals, temporal)
    top, z = base * multipliers[-1], latent_channels

    def entries() -> Iterator[tuple[str, Shape]]:
        yield from _conv("encoder.conv1", base, 3, 3, 3, 3)
        for index, block in enumerate(encoder_blocks(*plan)):
            yield from _block(f"encoder.downsamples.{index}", block)
        yield from _middle("encoder.middle", top)
        yield from _head("encoder.head", top, 2 * z)
        yield from _conv("conv1", 2 * z, 2 * z, 1, 1, 1)
        yield from _conv("conv2", z, z, 1, 1, 1)
        yield from _conv("decoder.conv1", top, z, 3, 3, 3)
        yield from _middle("decoder.middle", top)
        for index, block in enumerate(decoder_blocks(*plan)):
            yield from _block(f"decoder.upsamples.{index}", block)
        yield from _head("decoder.head", base * multipliers[0], 3)

    return dict(entries())


_MIDDLE: Final = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
_RESIDUAL: Final = {"0": "norm1", "2": "conv1", "3": "norm2", "6": "conv2"}


def _to_diffusers(key: str, residuals: int) -> str:
    side, rest = key.split(".", 1)
    if side in ("conv1", "conv2"):
        return {"conv1": "quant_conv", "conv2": "post_quant_conv"}[side] + "." + rest
    group, rest = rest.split(".", 1)
    if group == "conv1":
        return f"{side}.conv_in.{rest}"
    index, rest = rest.split(".", 1)
    if group == "head":
        return f"{side}.{'norm_out' if index == '0' else 'conv_out'}.{rest}"
    if group == "middle":
        place = f"mid_block.{_MIDDLE[index]}"
    elif group == "downsamples":
        place = f"down_blocks.{index}"
    else:
        stage, within = divmod(int(index), residuals + 2)
        inner = "upsamplers.0" if within == residuals + 1 else f"resnets.{within}"
        place = f"up_blocks.{stage}.{inner}"
    if rest.startswith("residual."):
        _, number, leaf = rest.split(".")
        rest = f"{_RESIDUAL[number]}.{leaf}"
    elif rest.startswith("shortcut."):
        rest = f"conv_{rest}"
    return f"{side}.{place}.{rest}"


def diffusers_vae_keys(
    base: int = BASE,
    latent_channels: int = LATENT,
    multipliers: Shape = MULTIPLIERS,
    residuals: int = RESIDUALS,
    temporal: tuple[bool, ...] = TEMPORAL,
) -> dict[str, str]:
    """Names in a diffusers `AutoencoderKLWan` state dict -> our names, one to one; shapes are the same."""
    ours = vae_layout(base, latent_channels, multipliers, residuals, temporal)
    return {_to_diffusers(key, residuals): key for key in ours}


def _middle_convs(width: int, frames: int, pixels: int) -> Iterator[Conv]:
    yield from _block_convs(Block("residual", width, width), frames, frames, pixels, pixels)
    yield Conv(width, 3 * width, 1, frames, pixels, 0, pixels)
    yield Conv(width, width, 1, frames, pixels, 0, pixels)
    yield from _block_convs(Block("residual", width, width), frames, frames, pixels, pixels)


def _block_convs(block: Block, frames: int, after: int, pixels: int, pixels_after: int) -> Iterator[Conv]:
    """Convs of a block that takes `frames` of `pixels` each to `after` frames of `pixels_after`."""
    kind, width, out = block
    if kind == "residual":
        yield Conv(width, out, 27, frames, pixels, 2, pixels)
        yield Conv(out, out, 27, frames, pixels, 2, pixels)
        if width != out:
            yield Conv(width, out, 1, frames, pixels, 0, pixels)
        return
    # Frame 0 passes both temporal convs by: they make one output (down) or pair (up) per later frame.
    if kind == "up_time":
        yield Conv(width, 2 * width, 3, frames - 1, pixels, 2, pixels)
    yield Conv(width, out, 9, after if kind == "up_time" else frames, pixels_after, 0, pixels)
    if kind == "down_time":
        yield Conv(width, width, 3, after - 1, pixels_after, 1, pixels_after)


def vae_convs(
    frames: int,
    height: int,
    width: int,
    base: int = BASE,
    latent_channels: int = LATENT,
    multipliers: Shape = MULTIPLIERS,
    residuals: int = RESIDUALS,
    temporal: tuple[bool, ...] = TEMPORAL,
) -> tuple[list[Conv], list[Conv]]:
    """Every conv of an encode and of a decode of `frames` (4k+1) video frames of height x width pixels."""
    plan = (base, multipliers, residuals, temporal)
    top, z, t, p = base * multipliers[-1], latent_channels, frames, height * width
    encode = [Conv(3, base, 27, t, p, 2, p)]
    for block in encoder_blocks(*plan):
        after = 1 + (t - 1) // 2 if block.kind == "down_time" else t
        smaller = p // 4 if block.kind.startswith("down") else p
        encode += _block_convs(block, t, after, p, smaller)
        t, p = after, smaller
    encode += _middle_convs(top, t, p)
    encode += [Conv(top, 2 * z, 27, t, p, 2, p), Conv(2 * z, 2 * z, 1, t, p, 0, p)]
    decode = [Conv(z, z, 1, t, p, 0, p), Conv(z, top, 27, t, p, 2, p), *_middle_convs(top, t, p)]
    for block in decoder_blocks(*plan):
        after = 1 + 2 * (t - 1) if block.kind == "up_time" else t
        bigger = p * 4 if block.kind.startswith("up") else p
        decode += _block_convs(block, t, after, p, bigger)
        t, p = after, bigger
    decode.append(Conv(base * multipliers[0], 3, 27, t, p, 2, p))
    return encode, decode


def vae_flops(frames: int, height: int, width: int, **plan: Any) -> tuple[float, float]:
    """FLOP (2 per multiply-add) of one encode and one decode; `plan` as in `vae_convs`."""
    multipliers, temporal = plan.get("multipliers", MULTIPLIERS), plan.get("temporal", TEMPORAL)
    top = plan.get("base", BASE) * multipliers[-1]
    latent = 1 + (frames - 1) // 2 ** sum(temporal)
    tokens = height * width // 4 ** len(temporal)
    attention = 4.0 * latent * tokens**2 * top
    encode, decode = (
        attention + sum(2.0 * c.width * c.out * c.taps * c.frames * c.pixels for c in convs)
        for convs in vae_convs(frames, height, width, **plan)
    )
    return encode, decode


def vae_history_bytes(height: int, width: int, element: int = 2, **plan: Any) -> tuple[int, int]:
    """Bytes an encode and a decode carry from window to window, at `element` bytes a number."""
    encode, decode = (
        element * sum(c.width * c.past * c.pixels_in for c in convs)
        for convs in vae_convs(1, height, width, **plan)
    )
    return encode, decode
