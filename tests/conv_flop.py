"""What torch's FLOP counter is told of the convolutions that are ops here."""

from __future__ import annotations

import math
from typing import Any

import torch

from cosmos_fast import ops_vae

_ = ops_vae  # its rows make the ops below


def _flop(x: Any, weight: tuple[int, ...], *rest: Any, out_shape: tuple[int, ...]) -> int:
    """Two for each of the weight's taps and output value."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


_OPS = torch.ops.cosmos_fast
MAPPING = dict.fromkeys((_OPS.conv3d, _OPS.conv_half, _OPS.conv_double), _flop)
