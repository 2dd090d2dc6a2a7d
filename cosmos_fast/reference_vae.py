"""References of the ops of the video VAE, as in `reference`, which offers them under their names.

Tensors are (B, C, F, H, W) in any layout; results have the layout of the input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3, TOP = torch.float8_e4m3fn, 448.0


def _as_laid_out(x: Tensor, y: Tensor) -> Tensor:
    """y in the layout of x: torch's convs keep it or not, depending on the size."""
    last = x.stride(1) == 1
    return y.contiguous(memory_format=torch.channels_last_3d if last else torch.contiguous_format)


def conv3d(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, time_stride: int) -> Tensor:
    """Convolution without padding, strides in time only, then + residual: (B, C, F, H, W) -> (B, O, F', H', W')."""
    y = F.conv3d(x, weight, bias, stride=(time_stride, 1, 1))
    return _as_laid_out(x, y if residual is None else y + residual)


def conv_half(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """3x3, stride 2, on every frame with one zero column on the right and one zero row at the bottom."""
    return _as_laid_out(x, F.conv3d(F.pad(x, (0, 1, 0, 1)), weight[:, :, None], bias, stride=(1, 2, 2)))


def conv_double(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Nearest neighbour x2 of every frame, then 3x3 with zero padding."""
    big = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
    return _as_laid_out(x, F.conv3d(big, weight[:, :, None], bias, padding=(0, 1, 1)))


def conv3d_fp8(
    x: Tensor, weight: Tensor, steps: Tensor, bias: Tensor, residual: Tensor | None, out: torch.dtype
) -> Tensor:
    """`conv3d` of e4m3 codes, sums of output channel o worth steps[o] each, + bias + residual, rounded once to `out`."""
    y = F.conv3d(x.float(), weight.float()) * steps.view(-1, 1, 1, 1) + bias.float().view(-1, 1, 1, 1)
    return _as_laid_out(x, (y if residual is None else y + residual.float()).to(out))


def norm_silu(x: Tensor, gamma: Tensor, past: Tensor | None, keep: Tensor | None) -> Tensor:
    """Past (zeros if None), then silu(x / max(|x|, 1e-12) * sqrt(C) * gamma), a zero border around each frame.

    |x| is the L2 norm over channels. `keep` gets the last two frames, without borders.
    """
    y = _normed(x, gamma).to(x.dtype)
    full = torch.cat(
        (y.new_zeros(y[:, :, :1].shape).repeat(1, 1, 2, 1, 1) if past is None else past, y), dim=2
    )
    if keep is not None:
        keep.copy_(full[:, :, -2:])
    return F.pad(full, (1, 1, 1, 1))


def norm_silu_fp8(x: Tensor, gamma: Tensor, step: float, past: Tensor | None, keep: Tensor | None) -> Tensor:
    """`norm_silu` in e4m3 codes worth `step` each; past and keep are codes too."""
    y = _normed(x, gamma) / step
    before = y.new_zeros(y[:, :, :1].shape).repeat(1, 1, 2, 1, 1) if past is None else past.float()
    codes = F.pad(torch.cat((before, y), dim=2), (1, 1, 1, 1)).clamp(-TOP, TOP).to(E4M3)
    if keep is not None:
        keep.copy_(codes[:, :, -2:, 1:-1, 1:-1])
    return codes


def _normed(x: Tensor, gamma: Tensor) -> Tensor:
    """silu(x / max(|x|, 1e-12) * sqrt(C) * gamma), not rounded."""
    y = x.float()
    y = y / y.norm(dim=1, keepdim=True).clamp_min(1e-12) * x.shape[1] ** 0.5 * gamma.float().view(-1, 1, 1, 1)
    return F.silu(y)
