"""What the network prepares once per chunk: prompt keys, control tokens, modulation tables, positions.

Frozen values with no behaviour beyond lookup. Letters as in `network`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .config import NetworkConfig
from .formats import PATCH, Rows
from .parallel import Shard

if TYPE_CHECKING:
    from .network import TextKeys

FREQUENCIES = 10000.0
"""Base of every sinusoid: time embedding and rotary positions."""

SPATIAL_STRETCH = 3.0
"""RoPE extrapolation ratio of height and width; time has ratio 1."""


@dataclass(frozen=True)
class Modulation:
    """Shift, scale and gate of one block for every step. table: (steps, 9, R, D), sub-layer major."""

    table: Tensor

    def at(self, step: int, sublayer: int) -> tuple[Tensor, Tensor, Tensor]:
        shift, scale, gate = self.table[step, 3 * sublayer : 3 * sublayer + 3]
        return shift, scale, gate


@dataclass(frozen=True)
class Tables:
    """All that depends on the schedule alone. head: (steps, 2, R, D) fp32."""

    blocks: tuple[Modulation, ...]
    control: tuple[tuple[Modulation, ...], ...]
    head: Tensor


@dataclass(frozen=True)
class Prompt:
    """Cross-attention keys of every base block, and of every block of every control branch."""

    blocks: tuple[TextKeys, ...]
    control: tuple[tuple[TextKeys, ...], ...]


@dataclass(frozen=True)
class Controls:
    """Active branches: their index, tokens before_proj(embed(control)) (L, D), weights (J, 1 or L) fp32."""

    branches: tuple[int, ...]
    tokens: tuple[Tensor, ...]
    weights: Tensor | None

    def of(self, shard: Shard) -> Controls:
        """What concerns the tokens of one rank, in memory of its own; itself where one rank has all."""
        if shard.group.size == 1:
            return self
        tokens, weights = tuple(shard.split(x).clone() for x in self.tokens), self.weights
        if weights is not None and weights.shape[1] > 1:
            weights = shard.split(weights, dim=1).contiguous()
        return Controls(self.branches, tokens, weights)


@dataclass(frozen=True)
class Context:
    """Everything one chunk needs besides the latent. cos, sin (L, K/2) fp32; mask (T,); grid (T, H, W).

    shard: which of the L tokens this rank computes; controls and rows are of those, cos and sin of all.
    """

    prompt: Prompt
    controls: Controls
    tables: Tables
    cos: Tensor
    sin: Tensor
    mask: Tensor
    rows: Rows
    grid: tuple[int, int, int]
    shard: Shard


@dataclass(frozen=True)
class Stem:
    """Tokens (L, D) after block 0's self-attention, before it looks at the prompt: base, and each control."""

    base: Tensor
    control: tuple[Tensor, ...]


def rope(
    config: NetworkConfig, grid: tuple[int, int, int], device: torch.device, *, rounded: bool
) -> tuple[Tensor, Tensor]:
    """cos and sin (L, K/2) fp32 of every token's angles, in the order time, row, column.

    The published weights were trained with exponents rounded to bf16; `rounded=False` gives exact ones.
    """
    T, H, W = grid[0], grid[1] // PATCH, grid[2] // PATCH
    spatial = config.head_width // 6 * 2
    axes = []
    for size, dim, stretch in (
        (T, config.head_width - 2 * spatial, 1.0), (H, spatial, SPATIAL_STRETCH), (W, spatial, SPATIAL_STRETCH),
    ):  # fmt: skip
        exponent = torch.arange(0, dim, 2).float() / dim
        exponent = exponent.bfloat16().float() if rounded else exponent
        frequency = 1.0 / (FREQUENCIES * stretch ** (dim / (dim - 2))) ** exponent
        axes.append(torch.outer(torch.arange(size).float(), frequency))
    t, h, w = axes
    angles = torch.cat(
        (
            t[:, None, None].expand(T, H, W, -1), h[None, :, None].expand(T, H, W, -1),
            w[None, None].expand(T, H, W, -1),
        ), dim=-1,
    ).flatten(0, 2).to(device)  # fmt: skip
    return angles.cos(), angles.sin()
