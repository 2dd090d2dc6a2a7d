"""The Wan 2.1 video VAE as one exact causal pass, run window by window with explicit state.

Shape letters: B batch; F video frames, H W pixels; C channels; T latent frames, h w latent rows and
columns (h = H/8, w = W/8, T = 1 + (F-1)/4). Inside the convolutions every tensor is (B, C, F, H, W).

Frame 0 is special: it becomes one latent frame alone, skips both kinds of temporal resampling, and stays
invisible to the temporal up-sampling convs ever after. With that rule a pass over the whole clip and a
pass over any windows are the same function, so the window size is a matter of memory only.

Layout: whatever `channels_last_` did to the weights, activations follow; nothing here forces a layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops_vae
from .convolution import frames_like as frames_like
from .convolution import rms
from .vae_keys import (
    WIDE_FRAMES,
    Block,
    VAEConfig,
    decoder_blocks,
    encoder_blocks,
    vae_flops,
    vae_memory,
    wide_blocks,
    windows,
)

__all__ = ["VAE", "Stream", "VAEConfig", "channels_last_", "flops", "memory_estimate", "windows"]

# ---------------------------------------------------------------------------------------------------
# State


class Stream:
    """What one pass carries from window to window: the last input frames of each temporal conv.

    One object per encode or decode call. Buffers keep their address from the first window on, so a window
    of constant size can be captured. `keep=False` is for a pass of one window, which needs no memory.
    """

    def __init__(self, keep: bool = True) -> None:
        self.first = True
        self._keep = keep
        self._past: dict[nn.Module, Tensor] = {}

    def past(
        self, layer: nn.Module, x: Tensor, frames: int = 2, dtype: torch.dtype | None = None
    ) -> Tensor | None:
        """The history of `layer`, (B, C, frames, H, W), zeros at the start; None where nothing is kept.

        Whoever takes it writes the next history into it. dtype: by default that of x.
        """
        if not self._keep:
            return None
        if layer not in self._past:
            self._past[layer] = frames_like(x, (*x.shape[:2], frames, *x.shape[3:]), dtype).zero_()
        return self._past[layer]

    def remember(self, layer: nn.Module, frames: Tensor) -> None:
        """Make `frames` the history of `layer`. They are copied: a view would keep a whole window alive."""
        past = self.past(layer, frames, frames.shape[2])
        if past is not None:
            past.copy_(frames)

    def extend(self, layer: nn.Module, x: Tensor, past: int = 2) -> Tensor:
        """x with the history of `layer` before it; remembers the last `past` frames for the next window."""
        padded = frames_like(x, (*x.shape[:2], past + x.shape[2], *x.shape[3:]))
        held = self.past(layer, x, past)
        _ = padded[:, :, :past].zero_() if held is None else padded[:, :, :past].copy_(held)
        padded[:, :, past:].copy_(x)
        self.remember(layer, padded[:, :, -past:])
        return padded

    def parts(self, x: Tensor, frames: int) -> tuple[Tensor, ...]:
        """x in parts of so many frames, to pass one after the other; x whole where nothing is kept from part to part."""
        return x.split(frames, dim=2) if self._keep else (x,)

    @property
    def nbytes(self) -> int:
        """Bytes held by the histories."""
        return sum(past.numel() * past.element_size() for past in self._past.values())


def norm_conv(
    parts: nn.ModuleDict, norm: str, conv: str, x: Tensor, stream: Stream, residual: Tensor | None = None
) -> Tensor:
    """conv(silu(rms(x))) with history, + residual."""
    layer = cast(CausalConv, parts[conv])
    normed = layer.normed(x, cast(Norm, parts[norm]).gamma, stream)
    del x  # the last reference when calls are nested: frees it before the conv allocates
    return layer(normed, residual)


# ---------------------------------------------------------------------------------------------------
# Modules. Names of parameters are the published ones; a number is a position in the published lists.


class Norm(nn.Module):
    """The gain of an RMS norm; `rms` and `rms_silu` do the work."""

    def __init__(self, width: int, dims: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width, *(1,) * dims))


class Conv(nn.Conv3d):
    """A conv without padding."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops_vae.conv3d(x, self.weight, cast(Tensor, self.bias), residual, self.stride[0])


class CausalConv(Conv):
    """3x3x3 conv on frames that already have their two past frames before them and zeros around them."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out, 3)

    def normed(self, x: Tensor, gamma: Tensor, stream: Stream) -> Tensor:
        """What `forward` takes behind a norm: history, then silu(rms(x)), zeros around every frame."""
        past = stream.past(self, x)
        return ops_vae.norm_silu(x, gamma, past, past)


class FirstConv(CausalConv):
    """The same where no norm has put the zeros around the frames."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1)), residual)


class Residual(nn.Module):
    """x + conv(silu(rms(conv(silu(rms(x)))))), with a 1x1x1 conv on the skip when the width changes."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {"0": Norm(width), "2": CausalConv(width, out), "3": Norm(out), "6": CausalConv(out, out)}
        )
        self.shortcut = Conv(width, out, 1) if width != out else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        parts = self.residual
        skip = self.shortcut or nn.Identity()
        return norm_conv(parts, "3", "6", norm_conv(parts, "0", "2", x, stream), stream, skip(x))


class Attention(nn.Module):
    """x + attention inside each frame: one head over all rows and columns, no mask, no positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = Norm(width, dims=2)
        self.to_qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return self.added(x, x, 0)

    def added(self, out: Tensor, x: Tensor, first: int) -> Tensor:
        """out, which is rows of x from `first` on, + what they attend in all of x. In place; out may be x."""
        rows = rms(x, self.norm.gamma, frames_like(x, tuple(x.shape))).permute(0, 2, 3, 4, 1)
        for clip, targets in zip(rows, out.permute(0, 2, 3, 4, 1), strict=True):
            for frame, target in zip(clip, targets, strict=True):
                target.add_(self._rows(frame, first, len(target)))
        return out

    def _rows(self, frame: Tensor, first: int, count: int) -> Tensor:
        """(h, w, C) -> (count, w, C). One frame at a time bounds whatever the attention kernel needs."""
        values, (_, w, C) = frame.reshape(-1, frame.shape[-1]), frame.shape
        qkv = F.linear(values, self.to_qkv.weight.flatten(1), self.to_qkv.bias).unflatten(1, (3, 1, -1))
        q, k, v = qkv.unbind(1)
        y = ops_vae.attention_wide(q[first * w : (first + count) * w], k, v).flatten(1)
        return F.linear(y, self.proj.weight.flatten(1), self.proj.bias).view(count, w, C)


class Down(nn.Module):
    """Half the height and width; with `time_conv` then also half the frames, frame 0 passing untouched."""

    def __init__(self, width: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(width, width, 3, stride=2)})
        self.time_conv = Conv(width, width, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        conv = cast(nn.Conv2d, self.resample["1"])
        x = ops_vae.conv_half(x, conv.weight, cast(Tensor, conv.bias))
        if self.time_conv is None:
            return x
        if not stream.first:
            return self.time_conv(stream.extend(self.time_conv, x, past=1))
        stream.remember(self.time_conv, x[:, :, -1:])
        return x if x.shape[2] == 1 else torch.cat((x[:, :, :1], self.time_conv(x)), dim=2)


class Up(nn.Module):
    """With `time_conv` twice the frames after frame 0; then twice the height and width, half the channels.

    The first half of the time conv's channels is the earlier frame of a pair. Frame 0 never enters its
    history: for the frames after it, time begins with zeros.
    """

    def __init__(self, width: int, out: int, time: bool) -> None:
        super().__init__()
        self.time_conv = Conv(width, 2 * width, (3, 1, 1)) if time else None
        self.resample = nn.ModuleDict({"1": nn.Conv2d(width, out, 3, padding=1)})

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        if self.time_conv is not None:
            x = self._twice(self.time_conv, x, stream)
        conv = cast(nn.Conv2d, self.resample["1"])
        return ops_vae.conv_double(x, conv.weight, cast(Tensor, conv.bias))

    def _twice(self, time_conv: Conv, x: Tensor, stream: Stream) -> Tensor:
        alone, width = int(stream.first), x.shape[1]
        if x.shape[2] == alone:
            return x
        pairs = time_conv(stream.extend(time_conv, x[:, :, alone:]))
        y = frames_like(x, (*x.shape[:2], alone + 2 * pairs.shape[2], *x.shape[3:]))
        y[:, :, :alone].copy_(x[:, :, :alone])
        y[:, :, alone::2].copy_(pairs[:, :width])
        y[:, :, alone + 1 :: 2].copy_(pairs[:, width:])
        return y


def _middle(width: int) -> nn.ModuleList:
    return nn.ModuleList([Residual(width, width), Attention(width), Residual(width, width)])


def _build(block: Block) -> nn.Module:
    if block.kind == "residual":
        return Residual(block.width, block.out)
    if block.kind.startswith("down"):
        return Down(block.width, time=block.kind == "down_time")
    return Up(block.width, block.out, time=block.kind == "up_time")


class Encoder(nn.Module):
    """(B, 3, F, H, W) -> (B, 2z, T, h, w)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        top = config.top
        self.conv1 = FirstConv(3, config.bottom)
        self.downsamples = nn.ModuleList(_build(block) for block in encoder_blocks(config))
        self.middle = _middle(top)
        self.head = nn.ModuleDict({"0": Norm(top), "2": CausalConv(top, 2 * config.latent_channels)})

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.conv1(stream.extend(self.conv1, x))
        for block in (*self.downsamples, *self.middle):
            x = block(x, stream)
        return norm_conv(self.head, "0", "2", x, stream)


class Decoder(nn.Module):
    """(B, z, T, h, w) -> (B, 3, F, H, W).

    A window is passed on in smaller parts where its frames are widest, which is where the most memory is held.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        top, bottom = config.top, config.bottom
        self.conv1 = FirstConv(config.latent_channels, top)
        self.middle = _middle(top)
        self.upsamples = nn.ModuleList(_build(block) for block in decoder_blocks(config))
        self.head = nn.ModuleDict({"0": Norm(bottom), "2": CausalConv(bottom, 3)})
        self.wide = wide_blocks(config)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.conv1(stream.extend(self.conv1, x))
        for block in (*self.middle, *self.upsamples[: -self.wide]):
            x = block(x, stream)
        return torch.cat([self._frames(part, stream) for part in stream.parts(x, WIDE_FRAMES)], dim=2)

    def _frames(self, x: Tensor, stream: Stream) -> Tensor:
        for block in self.upsamples[-self.wide :]:
            x = block(x, stream)
        return norm_conv(self.head, "0", "2", x, stream)


def latent_statistics(config: VAEConfig, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation, (C, 1, 1, 1) each, in the dtype and on the device of `like`.

    Both are rounded to bf16 in every compute dtype, the reciprocal after the std: the released diffusion
    weights were trained on latents scaled by these numbers, up to 0.41 % away from the printed ones.
    """
    mean = torch.tensor(config.mean, dtype=torch.bfloat16, device="cpu")
    gain = 1.0 / torch.tensor(config.std, dtype=torch.bfloat16, device="cpu")
    return mean.view(-1, 1, 1, 1).to(like), gain.view(-1, 1, 1, 1).to(like)


def _check(x: Tensor, what: str, channels: int, multiple: int = 1) -> None:
    if x.dim() != 5 or x.shape[1] != channels or not x.is_floating_point() or 0 in x.shape:
        raise ValueError(
            f"vae.{what}: input must be floating point (B, {channels}, frames, height, width) and not empty, "
            f"got {tuple(x.shape)} {x.dtype}. Add the batch dimension; scale pixels to [-1, 1]."
        )
    if x.shape[3] % multiple or x.shape[4] % multiple:
        raise ValueError(
            f"vae.{what}: height and width must be multiples of {multiple}, "
            f"got {x.shape[3]}x{x.shape[4]}. Resize or pad the frames first."
        )


def _check_frames(frames: int, stride: int, first: bool) -> None:
    if frames % stride != int(first):
        rule = f"frames must be {stride}k+1" if first else f"parts after the first must have {stride}k frames"
        raise ValueError(
            f"vae.encode: {rule}, got {frames}. Repeat or mirror the last frames to pad the clip."
        )


class VAE(nn.Module):
    """Pixels in [-1, 1] to normalised latents and back. Inference only; weights never require grad.

    Inputs may lie on any device in any float dtype: each window moves to the weights as it is used.
    """

    def __init__(self, config: VAEConfig | None = None) -> None:
        super().__init__()
        self.config = config or VAEConfig()
        z = self.config.latent_channels
        self.encoder = Encoder(self.config)
        self.conv1 = Conv(2 * z, 2 * z, 1)
        self.conv2 = Conv(z, z, 1)
        self.decoder = Decoder(self.config)
        self.requires_grad_(False)

    def encode(self, x_BCFHW: Tensor, window: int | None = 16) -> Tensor:
        """Normalised posterior mean, (B, 3, F, H, W) -> (B, 16, T, h, w), in the dtype of the weights.

        `window`: video frames at a time after frame 0, a multiple of 4; None is the whole clip at once.
        Raises ValueError unless F = 4k+1 and H and W are multiples of 8.
        """
        stride = self.config.stride
        if window is not None and (window < stride or window % stride):
            raise ValueError(
                f"vae.encode: window must be a positive multiple of {stride} frames, got {window}. "
                f"Use {stride} for the least memory."
            )
        _check(x_BCFHW, "encode", 3, self.config.spatial)
        _check_frames(x_BCFHW.shape[2], stride, True)
        bounds = windows(x_BCFHW.shape[2], window)
        parts = (x_BCFHW[:, :, start:stop] for start, stop in bounds)
        return torch.cat(list(self._encode(parts, Stream(keep=len(bounds) > 1))), dim=2)

    def encode_stream(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        """Latents of a clip that arrives in parts: yields (B, 16, t, h, w) for each (B, 3, f, H, W).

        The first part has 4k+1 frames (`windows` starts with frame 0 alone), each later part a multiple
        of 4; else ValueError. Only one part at a time is on the device of the weights.
        """
        return self._encode(parts, Stream())

    @torch.no_grad()
    def _encode(self, parts: Iterable[Tensor], stream: Stream) -> Iterator[Tensor]:
        z = self.config.latent_channels
        mean, gain = latent_statistics(self.config, self.conv1.weight)
        size: torch.Size | None = None
        for part in parts:
            _check(part, "encode", 3, self.config.spatial)
            _check_frames(part.shape[2], self.config.stride, stream.first)
            size = size or part.shape
            if (part.shape[0], part.shape[3:]) != (size[0], size[3:]):
                raise ValueError(
                    f"vae.encode: parts must share batch, height and width with the first, {tuple(size)}, "
                    f"got {tuple(part.shape)}. Resize the frames first."
                )
            features = self.encoder(part.to(self.conv1.weight), stream)
            stream.first = False
            # The upper half of the channels is the log-variance, which nothing here reads.
            yield (self.conv1(features)[:, :z] - mean).mul_(gain)

    def decode(self, z_BCTHW: Tensor, window: int | None = 1) -> Tensor:
        """Pixels, (B, 16, T, h, w) -> (B, 3, F, H, W), not clamped, in the dtype of the weights."""
        parts = self.decode_stream(z_BCTHW, window)
        batch, _, frames, height, width = z_BCTHW.shape
        scale, total = self.config.spatial, 1 + self.config.stride * (frames - 1)
        weight = self.conv2.weight
        x = torch.empty(
            (batch, 3, total, height * scale, width * scale), dtype=weight.dtype, device=weight.device
        )
        start = 0
        for part in parts:
            x[:, :, start : start + part.shape[2]] = part
            start += part.shape[2]
        return x

    def decode_stream(self, z_BCTHW: Tensor, window: int | None = 1) -> Iterator[Tensor]:
        """The frames of `decode` in order, each (B, 3, f, H, W) part as soon as it exists: 1, then 4*window.

        `window`: latent frames at a time after frame 0; None is the whole clip at once. Not clamped.
        """
        if window is not None and window < 1:
            raise ValueError(f"vae.decode: window must be at least 1 latent frame, got {window}. Use 1.")
        _check(z_BCTHW, "decode", self.config.latent_channels)
        bounds = windows(z_BCTHW.shape[2], window)
        return self._decode(z_BCTHW, bounds)

    @torch.no_grad()
    def _decode(self, z: Tensor, bounds: list[tuple[int, int]]) -> Iterator[Tensor]:
        stream = Stream(keep=len(bounds) > 1)
        mean, gain = latent_statistics(self.config, self.conv2.weight)
        for start, stop in bounds:
            mu = z[:, :, start:stop].to(self.conv2.weight) / gain + mean
            part = self.decoder(self.conv2(mu), stream)
            stream.first = False
            yield part


def channels_last_(vae: VAE) -> VAE:
    """Store conv weights channels last, in place; activations then follow. The fast layout on CUDA."""
    for weight in vae.parameters():
        if weight.dim() == 5:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif weight.dim() == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return vae


def flops(config: VAEConfig, frames: int, height: int, width: int) -> tuple[float, float]:
    """FLOP of (encode, decode) of `frames` video frames of height x width pixels; 2 per multiply-add."""
    return vae_flops(frames, height, width, config)


def memory_estimate(
    config: VAEConfig, height: int, width: int, window: int, latent_window: int, dtype: torch.dtype
) -> tuple[int, int]:
    """Bytes (encode, decode) need beside weights, clip and result; windows as `encode` and `decode` take."""
    encode, decode = vae_memory(height, width, window, latent_window, config)
    return encode * dtype.itemsize, decode * dtype.itemsize
