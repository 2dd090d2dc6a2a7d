"""The shape of the video VAE as plain data: its blocks in order, its tensor names, the diffusers names.

Imports nothing but the standard library. `vae.py` builds its modules from the same block lists, and
`checkpoint.py` checks a file against `vae_layout` before a single module exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

Shape = tuple[int, ...]

# fmt: off
LATENT_MEAN: Final = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
LATENT_STD: Final = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)
# fmt: on


@dataclass(frozen=True)
class VAEConfig:
    """Widths of the VAE; the defaults are the published model (126,892,531 parameters)."""

    base: int = 96
    latent_channels: int = 16
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    residuals: int = 2
    temporal: tuple[bool, ...] = (False, True, True)
    mean: tuple[float, ...] = LATENT_MEAN
    std: tuple[float, ...] = LATENT_STD

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) == self.latent_channels:
            raise ValueError(
                f"VAEConfig: mean and std must have {self.latent_channels} numbers, "
                f"got {len(self.mean)} and {len(self.std)}. Give statistics of this latent space."
            )
        if len(self.temporal) != len(self.multipliers) - 1:
            raise ValueError(
                f"VAEConfig: temporal must have {len(self.multipliers) - 1} flags, got {len(self.temporal)}. "
                "One flag stands for each change of stage."
            )

    @classmethod
    def tiny(cls) -> VAEConfig:
        """The same structure at base width 16, for tests."""
        return cls(base=16)

    @property
    def bottom(self) -> int:
        """Channels at full resolution."""
        return self.base * self.multipliers[0]

    @property
    def top(self) -> int:
        """Channels at latent resolution."""
        return self.base * self.multipliers[-1]

    @property
    def spatial(self) -> int:
        """Pixels per latent element along height and width."""
        return 2 ** len(self.temporal)

    @property
    def stride(self) -> int:
        """Video frames per latent frame after the first."""
        return 2 ** sum(self.temporal)


PUBLISHED: Final = VAEConfig()


def windows(length: int, window: int | None) -> list[tuple[int, int]]:
    """Bounds (start, stop) of a pass: element 0 alone, then `window` at a time; None is all at once."""
    if window is None:
        return [(0, length)]
    return [(0, 1), *((i, min(i + window, length)) for i in range(1, length, window))]


class Block(NamedTuple):
    """One numbered block: `kind` is residual, down, down_time, up or up_time; widths in channels."""

    kind: str
    width: int
    out: int


def encoder_blocks(config: VAEConfig = PUBLISHED) -> list[Block]:
    """Blocks of `encoder.downsamples` in order. `temporal[i]`: stage change i also halves the frames."""
    blocks: list[Block] = []
    width = config.bottom
    for stage, multiplier in enumerate(config.multipliers):
        for _ in range(config.residuals):
            blocks.append(Block("residual", width, config.base * multiplier))
            width = config.base * multiplier
        if stage < len(config.temporal):
            blocks.append(Block("down_time" if config.temporal[stage] else "down", width, width))
    return blocks


def decoder_blocks(config: VAEConfig = PUBLISHED) -> list[Block]:
    """Blocks of `decoder.upsamples` in order; one residual block a stage more than the encoder has."""
    blocks: list[Block] = []
    width = config.top
    for stage, multiplier in enumerate(reversed(config.multipliers)):
        for _ in range(config.residuals + 1):
            blocks.append(Block("residual", width, config.base * multiplier))
            width = config.base * multiplier
        if stage < len(config.temporal):
            # The up-sampling conv is where the channels halve, so the next stage starts at half width.
            blocks.append(Block("up_time" if config.temporal[-1 - stage] else "up", width, width // 2))
            width //= 2
    return blocks


WIDE_FRAMES: Final = 2
"""Frames that the decoder's last stage takes at a time, out of a window of four or more: where tensors are widest."""


def wide_blocks(config: VAEConfig = PUBLISHED) -> int:
    """How many of `decoder_blocks`, the last ones, run WIDE_FRAMES at a time: all since the last block that makes frames
    of others, which are those at full height and width and the block that leads to them."""
    blocks = decoder_blocks(config)
    first = max(i for i, block in enumerate(blocks) if block.kind.startswith("up"))
    return len(blocks) - first - (blocks[first].kind == "up_time")


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


def vae_layout(config: VAEConfig = PUBLISHED) -> dict[str, Shape]:
    """Every tensor of the VAE: published name -> shape. The published model has 194 tensors."""
    top, bottom, z = config.top, config.bottom, config.latent_channels

    def entries() -> Iterator[tuple[str, Shape]]:
        yield from _conv("encoder.conv1", bottom, 3, 3, 3, 3)
        for index, block in enumerate(encoder_blocks(config)):
            yield from _block(f"encoder.downsamples.{index}", block)
        yield from _middle("encoder.middle", top)
        yield from _head("encoder.head", top, 2 * z)
        yield from _conv("conv1", 2 * z, 2 * z, 1, 1, 1)
        yield from _conv("conv2", z, z, 1, 1, 1)
        yield from _conv("decoder.conv1", top, z, 3, 3, 3)
        yield from _middle("decoder.middle", top)
        for index, block in enumerate(decoder_blocks(config)):
            yield from _block(f"decoder.upsamples.{index}", block)
        yield from _head("decoder.head", bottom, 3)

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


def diffusers_vae_keys(config: VAEConfig = PUBLISHED) -> dict[str, str]:
    """Names in a diffusers `AutoencoderKLWan` state dict -> our names, one to one; shapes are the same."""
    return {_to_diffusers(key, config.residuals): key for key in vae_layout(config)}


class Conv(NamedTuple):
    """One conv as it runs over some frames. `before` and `after` are frames times pixels, in and out."""

    width: int
    out: int
    taps: int
    before: int
    after: int
    past: int = 0
    """Elements of a channel carried from window to window: past frames times pixels of a frame."""


def conv_flops(conv: Conv) -> float:
    """2 per multiply-add."""
    return 2.0 * conv.width * conv.out * conv.taps * conv.after


def block_convs(block: Block, frames: int, lead: int, pixels: int) -> tuple[list[Conv], int, int]:
    """Convs of a block on `frames` of `pixels` each, and the frames and pixels it gives."""
    kind, width, out = block
    size = frames * pixels
    if kind == "residual":
        convs = [Conv(width, out, 27, size, size, 2 * pixels), Conv(out, out, 27, size, size, 2 * pixels)]
        return convs + [Conv(width, out, 1, size, size)] * (width != out), frames, pixels
    if kind.startswith("down"):
        small, rest = pixels // 4, (frames - lead) // 2
        convs = [Conv(width, out, 9, size, frames * small)]
        if kind == "down":
            return convs, frames, small
        return [*convs, Conv(width, width, 3, frames * small, rest * small, small)], lead + rest, small
    big, rest = 4 * pixels, frames - lead
    if kind == "up":
        return [Conv(width, out, 9, frames * big, frames * big)], frames, big
    after = lead + 2 * rest
    time = Conv(width, 2 * width, 3, rest * pixels, rest * pixels, 2 * pixels)
    return [time, Conv(width, out, 9, after * big, after * big)], after, big


def vae_convs(
    frames: int, height: int, width: int, config: VAEConfig = PUBLISHED, lead: int = 1
) -> tuple[list[Conv], list[Conv]]:
    """Every conv of an encode and of a decode of `frames` video frames of height x width pixels.

    `lead` = 1: the frames begin with frame 0, which passes all temporal resampling by (frames is 4k+1).
    `lead` = 0: a later window (frames is 4k).
    """
    top, bottom, z, pixels = config.top, config.bottom, config.latent_channels, height * width
    encode = [Conv(3, bottom, 27, frames * pixels, frames * pixels, 2 * pixels)]
    for block in encoder_blocks(config):
        convs, frames, pixels = block_convs(block, frames, lead, pixels)
        encode += convs
    size, past = frames * pixels, 2 * pixels
    residual = [Conv(top, top, 27, size, size, past)] * 2
    middle = [*residual, Conv(top, 3 * top, 1, size, size), Conv(top, top, 1, size, size), *residual]
    encode += [*middle, Conv(top, 2 * z, 27, size, size, past), Conv(2 * z, 2 * z, 1, size, size)]
    decode = [Conv(z, z, 1, size, size), Conv(z, top, 27, size, size, past), *middle]
    for block in decoder_blocks(config):
        convs, frames, pixels = block_convs(block, frames, lead, pixels)
        decode += convs
    decode.append(Conv(bottom, 3, 27, frames * pixels, frames * pixels, 2 * pixels))
    return encode, decode


def vae_flops(frames: int, height: int, width: int, config: VAEConfig = PUBLISHED) -> tuple[float, float]:
    """FLOP (2 per multiply-add) of one encode and one decode of `frames` (4k+1) video frames."""
    tokens = height * width // config.spatial**2
    attention = 4.0 * (1 + (frames - 1) // config.stride) * tokens**2 * config.top
    encode, decode = (
        attention + sum(map(conv_flops, convs)) for convs in vae_convs(frames, height, width, config)
    )
    return encode, decode


def vae_history(height: int, width: int, config: VAEConfig = PUBLISHED) -> tuple[int, int]:
    """Numbers an encode and a decode carry from window to window."""
    encode, decode = (
        sum(conv.width * conv.past for conv in convs) for convs in vae_convs(1, height, width, config)
    )
    return encode, decode


def vae_memory(
    height: int, width: int, window: int, latent_window: int, config: VAEConfig = PUBLISHED
) -> tuple[int, int]:
    """Numbers an encode and a decode hold at their peak beside weights, clip and result.

    Measured on one H100, 704x1280 in bf16, GiB beside weights and input: encode 4.68 and 6.63 in windows of 4 and 8 where
    this says 4.62 and 6.55. Workspaces of conv libraries are not counted.
    """
    encode, _ = vae_convs(window, height, width, config, lead=0)
    frames = latent_window * config.stride
    _, decode = vae_convs(frames, height, width, config, lead=0)
    last = decoder_blocks(config)[-wide_blocks(config) :]
    count = 1 + sum(len(block_convs(block, 1, 0, 4)[0]) for block in last)
    narrow, wide = decode[:-count], decode[-count:]
    share = min(WIDE_FRAMES / frames, 1.0)
    few = [c._replace(before=int(c.before * share), after=int(c.after * share)) for c in wide]
    # The input of the last stage, a quarter of what its first conv sees, is there until its last frames are through.
    whole = wide[0].width * wide[0].before // 4 if share < 1 else 0
    carried = sum(conv.width * conv.past for conv in decode)
    return peak(encode), carried + max(max(map(_alive, narrow)), whole + max(map(_alive, few)))


def _alive(conv: Conv) -> int:
    """What a conv holds: its input with history, its output, and the block's own input."""
    # A residual block keeps its input for the skip; an up-sampling conv's block input is 1/4 of it.
    kept = conv.before if conv.taps == 27 else conv.before // 4
    return conv.width * (conv.before + conv.past + kept) + conv.out * conv.after


def peak(convs: Sequence[Conv]) -> int:
    """Most numbers held while `convs` run one after the other: all histories, and what is alive in the widest conv."""
    return sum(conv.width * conv.past for conv in convs) + max(map(_alive, convs))
