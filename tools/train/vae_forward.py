"""The VAE for training: the whole-clip pass of `cosmos_fast.vae.VAE` with gradients, from the same parameters.

The production pass writes in place and runs window by window; over a whole clip both are one function.
Latents here are raw: the published constants are put around the trained ones when a model is exported.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_fast.vae import VAE, Attention, Down, Residual, Up, latent_statistics


def _rms(x: Tensor, gamma: Tensor) -> Tensor:
    # The norm is summed in fp32; the products stay in the dtype of x, which halves what a pass moves.
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide).clamp_min(1e-12)
    return x * (x.shape[1] ** 0.5 / norm).to(x.dtype) * gamma.to(x.dtype).view(-1, *(1,) * (x.ndim - 2))


def _conv(layer: nn.Module, x: Tensor, past: int = 0, **options: object) -> Tensor:
    """A conv of the production module in the dtype of x, with `past` frames of zeros before it."""
    weight, bias = cast(Tensor, layer.weight).to(x.dtype), cast(Tensor, layer.bias).to(x.dtype)
    return F.conv3d(F.pad(x, (0, 0, 0, 0, past, 0)) if past else x, weight, bias, **options)  # type: ignore[arg-type]


class Passes:
    """encode and decode of one VAE with gradients. What comes channels last stays so all the way."""

    def __init__(self, vae: VAE) -> None:
        self.vae = vae

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, F, H, W) -> mean and log-variance (B, z, T, h, w), not normalised."""
        encoder = self.vae.encoder
        x = _conv(encoder.conv1, x, 2, padding=(0, 1, 1))
        for block in (*encoder.downsamples, *encoder.middle):
            x = self._block(block, x)
        x = self._normed_conv(encoder.head, "0", "2", x)
        return tuple(_conv(self.vae.conv1, x).chunk(2, dim=1))  # type: ignore[return-value]

    def decode(self, z: Tensor) -> Tensor:
        """(B, z, T, h, w) as `encode` gives them -> (B, 3, F, H, W)."""
        decoder = self.vae.decoder
        x = _conv(decoder.conv1, _conv(self.vae.conv2, z), 2, padding=(0, 1, 1))
        for block in (*decoder.middle, *decoder.upsamples):
            x = self._block(block, x)
        return self._normed_conv(decoder.head, "0", "2", x)

    def _normed_conv(self, parts: nn.ModuleDict, norm: str, conv: str, x: Tensor) -> Tensor:
        gamma = cast(Tensor, parts[norm].gamma).flatten()
        return _conv(parts[conv], F.silu(_rms(x, gamma)), 2, padding=(0, 1, 1))

    def _block(self, block: nn.Module, x: Tensor) -> Tensor:
        if isinstance(block, Residual):
            h = self._normed_conv(block.residual, "0", "2", x)
            h = self._normed_conv(block.residual, "3", "6", h)
            return h + (x if block.shortcut is None else _conv(block.shortcut, x))
        if isinstance(block, Attention):
            return x + self._attention(block, x)
        if isinstance(block, Down):
            x = self._spatial(block.resample["1"], F.pad(x, (0, 1, 0, 1)), stride=(1, 2, 2))
            if block.time_conv is None or x.shape[2] == 1:
                return x
            return torch.cat((x[:, :, :1], _conv(block.time_conv, x, stride=(2, 1, 1))), dim=2)
        assert isinstance(block, Up)
        if block.time_conv is not None and x.shape[2] > 1:
            pairs = _conv(block.time_conv, x[:, :, 1:], 2)
            B, C, T, H, W = x.shape
            rows = pairs.permute(0, 2, 3, 4, 1).unflatten(-1, (2, C)).permute(0, 1, 4, 2, 3, 5)
            rest = rows.reshape(B, 2 * (T - 1), H, W, C).permute(0, 4, 1, 2, 3)
            x = torch.cat((x[:, :, :1], rest), dim=2)
        B, C, T, H, W = x.shape
        wide = x.permute(0, 2, 3, 4, 1)[:, :, :, None, :, None].expand(B, T, H, 2, W, 2, C)
        x = wide.reshape(B, T, 2 * H, 2 * W, C).permute(0, 4, 1, 2, 3)
        return self._spatial(block.resample["1"], x, padding=(0, 1, 1))

    @staticmethod
    def _spatial(layer: nn.Module, x: Tensor, **options: object) -> Tensor:
        """A 2-D conv on every frame, as a 3-D one of a single tap: no reshaping, whatever the layout."""
        weight, bias = cast(Tensor, layer.weight).to(x.dtype), cast(Tensor, layer.bias).to(x.dtype)
        return F.conv3d(x, weight.unsqueeze(2), bias, **options)  # type: ignore[arg-type]

    @staticmethod
    def _attention(block: Attention, x: Tensor) -> Tensor:
        B, C, T, H, W = x.shape
        rows = _rms(x, block.norm.gamma.flatten()).permute(0, 2, 3, 4, 1).reshape(B * T, 1, H * W, C)
        q, k, v = F.linear(
            rows,
            block.to_qkv.weight.flatten(1).to(x.dtype),
            block.to_qkv.bias.to(x.dtype),  # type: ignore[union-attr]
        ).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v)
        y = F.linear(y, block.proj.weight.flatten(1).to(x.dtype), block.proj.bias.to(x.dtype))  # type: ignore[union-attr]
        return y.reshape(B, T, H, W, C).permute(0, 4, 1, 2, 3)


@torch.no_grad()
def standardise_(vae: VAE, mean: Tensor, std: Tensor) -> VAE:
    """Fold statistics (z,) of the raw latents into the 1x1x1 convs: they become of mean 0 and deviation 1."""
    return _fold(vae, mean, std, torch.zeros_like(mean), torch.ones_like(std))


@torch.no_grad()
def publish_(vae: VAE) -> VAE:
    """Put the published constants around raw latents, in place.

    Afterwards `vae.encode` gives what was raw before, although it subtracts and scales by those constants, and
    `vae.decode` takes it.
    """
    shift, gain = (part.flatten() for part in latent_statistics(vae.config, vae.conv1.weight))
    return _fold(vae, torch.zeros_like(shift), torch.ones_like(gain), shift, gain)


def _fold(vae: VAE, mean: Tensor, std: Tensor, shift: Tensor, gain: Tensor) -> VAE:
    """From raw latents to new ones with (new - shift) * gain == (raw - mean) / std, and back in the decoder."""
    z = vae.config.latent_channels
    mean, std, shift, gain = (part.to(vae.conv1.weight.device).double() for part in (mean, std, shift, gain))
    factor = 1 / (std * gain)
    weight, bias = vae.conv1.weight.double(), cast(Tensor, vae.conv1.bias).double()
    weight[:z] *= factor.view(-1, 1, 1, 1, 1)
    bias[:z] = (bias[:z] - mean) * factor + shift
    vae.conv1.weight.copy_(weight)
    cast(Tensor, vae.conv1.bias).copy_(bias)
    weight, bias = vae.conv2.weight.double(), cast(Tensor, vae.conv2.bias).double()
    bias = bias + weight.flatten(1) @ (mean - shift / factor)
    vae.conv2.weight.copy_(weight / factor.view(1, -1, 1, 1, 1))
    cast(Tensor, vae.conv2.bias).copy_(bias)
    return vae
