"""What each kind of linear layer costs in 8 bits, by itself: those of the rule of `fp8_weights`, and those it leaves alone.

`only` puts one kind of a network in 8 bits. Layers of the rule become what the recipe makes of them; the others, for which
there is no 8-bit product, have their weights rounded and, where they are called as layers, their rows too.
"""

from __future__ import annotations

import re
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_fast import quant
from cosmos_fast.fp8_weights import is_computed, is_stored, quantised_rows

GROUPS = {
    "qkv": r".*\.qkv", "attention output": r".*\.attn_out", "cross-attention": r".*\.cross\.(q|image_q|out)",
    "MLP": r".*\.fc[12]", "text keys, stored": r".*\.cross\.(kv|image_kv)",
    "not in the rule: hints": r"control\.\d+\.after_proj\.\d+",
    "not in the rule: embeddings": r"x_embed|control\.\d+\.(embed|before_proj)",
    "not in the rule: prompt": r"text_proj|image_proj", "not in the rule: head": r"head\.linear",
}  # fmt: skip
"""Kinds of layers: patterns of their names in `network.Network`."""

N = TypeVar("N", bound=nn.Module)


class Rounded(nn.Module):
    """y = x W^T + b of rows and weights that codes can stand for, multiplied in the dtype of x."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(rounded(linear.weight), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(rounded(x), self.weight, self.bias)


def rounded(rows: Tensor) -> Tensor:
    """Rows (L, D) as e4m3 with a step each, their largest value 448, in their own dtype."""
    codes, scale = quantised_rows(rows)
    return (codes.float() * scale[:, None]).to(rows.dtype)


def only(network: N, pattern: str) -> N:
    """The network with the layers whose whole name fits the pattern in 8 bits. Raises ValueError if there are none."""
    found = 0

    def make(name: str, linear: nn.Linear) -> nn.Module | None:
        nonlocal found
        if re.fullmatch(pattern, name) is None:
            return None
        found += 1
        return quant.native(name, linear) if is_computed(name) or is_stored(name) else Rounded(linear)

    quant.replace(network, make)
    if not found:
        raise ValueError(f"budget: some layer must fit {pattern!r}, got none.")
    quant.settle(network)
    return network.eval().requires_grad_(False)


def error(got: Tensor, true: Tensor) -> float:
    """Relative L2 of a tensor, in fp32."""
    return float(
        (got.float() - true.float()).norm() / true.float().norm().clamp_min(torch.finfo(torch.float32).tiny)
    )
