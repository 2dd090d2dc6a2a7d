"""Convolutions and the norm of the video VAE as torch's libraries have them, for the ops of `ops_vae`.

Tensors are (B, C, F, H, W) in whatever layout they come; results have the layout of the input.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor


def frames_like(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised (B, C, F, H, W) tensor in the layout of x, and in its dtype unless another is given."""
    last = x.stride(1) == 1
    layout = torch.channels_last_3d if last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=layout)


def _exact(x: Tensor) -> AbstractContextManager[object]:
    """cuDNN without TF32, which torch allows by default: fp32 is there to be exact."""
    cudnn = torch.backends.cudnn
    if not x.is_cuda or x.dtype != torch.float32:
        return nullcontext()
    return cudnn.flags(
        enabled=True, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
    )


def conv3d(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, time_stride: int) -> Tensor:
    """Valid convolution, stride in time only, + bias + residual; cuDNN's on CUDA."""
    with _exact(x):
        y = F.conv3d(x, weight, bias, stride=(time_stride, 1, 1))
    return y if residual is None else y.add_(residual)


def onednn(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, time_stride: int) -> Tensor:
    """`conv3d` by oneDNN on the CPU, whatever the size: torch itself takes it for large windows only."""
    if x.numel() == 0:
        return conv3d(x, weight, bias, residual, time_stride)
    y = torch.mkldnn_convolution(x, weight, bias, (0, 0, 0), (time_stride, 1, 1), (1, 1, 1), 1)  # type: ignore[attr-defined]
    return y if residual is None else y.add_(residual)


def _per_frame(x: Tensor, conv: Callable[[Tensor], Tensor]) -> Tensor:
    """A 2-D conv on each frame. Shapes: (B, C, F, H, W) -> (B, C', F, H', W'); a view in channels last."""
    # One frame goes its own way: flattening a dimension of one leaves strides that no longer say
    # "channels last", and the convs after it would fall back to the slow layout.
    single = x.shape[2] == 1
    with _exact(x):
        y = conv(x.squeeze(2) if single else x.transpose(1, 2).flatten(0, 1))
    return y.unsqueeze(2) if single else y.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def conv_half(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """3x3 with stride 2 on every frame, one zero column on the right and one zero row at the bottom."""
    return _per_frame(x, lambda frames: F.conv2d(F.pad(frames, (0, 1, 0, 1)), weight, bias, stride=2))


def upsample2x(x: Tensor, out: Tensor) -> Tensor:
    """Nearest neighbour x2: out[..., i, j] = x[..., i//2, j//2]; a plain copy in every dtype.

    Shapes: x (B, C, F, H, W); out (B, C, F, 2H, 2W), may be a strided view.
    """
    pairs = out.unflatten(4, (-1, 2)).unflatten(3, (-1, 2))
    pairs.copy_(x[:, :, :, :, None, :, None])
    return out


def conv_double(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Nearest neighbour x2 of every frame, then 3x3 with zero padding."""
    big = upsample2x(x, frames_like(x, (*x.shape[:3], 2 * x.shape[3], 2 * x.shape[4])))
    return _per_frame(big, lambda frames: F.conv2d(frames, weight, bias, padding=1))


def rms(x: Tensor, gamma: Tensor, out: Tensor) -> Tensor:
    """out = x / max(|x|, 1e-12) * sqrt(C) * gamma, with |x| the L2 norm over channels.

    Shapes: x, out (B, C, F, H, W), out may be a view; gamma has C elements.
    The norm and the division are fp32 for bf16 input and round once; no fp32 copy of x is made on CUDA.
    """
    if x.is_cuda or x.dtype != torch.float32:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide)
    else:  # ten times as fast on a CPU
        norm = x.square().sum(dim=1, keepdim=True).sqrt_()
    torch.mul(x, x.shape[1] ** 0.5 / norm.clamp_min_(1e-12), out=out)
    return out.mul_(gamma.view(-1, 1, 1, 1))


def rms_silu(x: Tensor, gamma: Tensor, out: Tensor) -> Tensor:
    """out = silu(rms(x)). Shapes as in `rms`."""
    return F.silu(rms(x, gamma, out), inplace=True)


def norm_silu(x: Tensor, gamma: Tensor, past: Tensor | None, keep: Tensor | None) -> Tensor:
    """Past, then rms_silu(x), with zero borders; `keep` gets its last two frames. Three roundings where x is bf16."""
    B, C, frames, H, W = x.shape
    out = frames_like(x, (B, C, frames + 2, H + 2, W + 2))
    for side in (out[:, :, :, 0], out[:, :, :, -1], out[..., 0], out[..., -1]):
        side.zero_()
    inner = out[:, :, :, 1:-1, 1:-1]
    _ = inner[:, :, :2].zero_() if past is None else inner[:, :, :2].copy_(past)
    rms_silu(x, gamma, inner[:, :, 2:])
    if keep is not None:
        keep.copy_(inner[:, :, -2:])
    return out
