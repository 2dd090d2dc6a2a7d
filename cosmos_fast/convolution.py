"""Adapters from convolution libraries to one signature, for `ops.conv3d`."""

from __future__ import annotations

import torch
from torch import Tensor


def onednn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """oneDNN's convolution on the CPU, whatever the size: torch itself takes it for large windows only."""
    if x.numel() == 0:
        return x.new_empty(x.shape[0], weight.shape[0], x.shape[2] - 2, *x.shape[3:])
    return torch.mkldnn_convolution(x, weight, bias, (0, 1, 1), (1, 1, 1), (1, 1, 1), 1)  # type: ignore[attr-defined]
