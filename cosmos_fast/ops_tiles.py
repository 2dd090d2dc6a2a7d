"""8-bit attention over lists of key tiles, and the first policy that fills them: `estimated_tiles`.

For each head and tile of TILE_QUERIES queries a list names the tiles of TILE_KEYS keys that its softmax sees; time goes with
how many. What a list leaves out is left out: outputs of disjoint lists merge by their log-sum-exps into that of all their
keys. Nothing here runs unless asked for: recipes attend to every key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import attention8, operands
from .dispatch import Candidate, define, triton
from .ops import HOPPER
from .ops_attention8 import ADA_UP, E4M3, Codes
from .packing import TILE_KEYS, TILE_QUERIES

_TWIN = triton("attention8", "attention_fp8_tiles", E4M3, ADA_UP)


def _own() -> Callable[..., tuple[Tensor, Tensor]]:
    """The CUDA kernel for heads of the width it is built for, its Triton twin for others."""
    whole, any_width = attention8.load_own_tiles(), _TWIN.load()

    def call(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return (whole if q.shape[2] == attention8.OWN_WIDTH else any_width)(q, *rest)

    return call


_attention_fp8_tiles = define(
    "attention_fp8_tiles(Tensor q, Tensor k, Tensor v, Tensor score_step, Tensor v_step, Tensor v_mean, ScalarType out, "
    "Tensor key_tiles, Tensor key_counts) -> (Tensor, Tensor)",
    operands.check_attention_fp8_tiles,
    lambda q, k, v, score_step, v_step, v_mean, out, key_tiles, key_counts: (
        q.new_empty(q.shape, dtype=out),
        q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32),
    ),
    Candidate("own", _own, "cuda", HOPPER, E4M3, ("triton",), "attention8_cuda"),
    _TWIN,
)
_tile_means = define(
    "tile_means(Tensor x, int rows) -> Tensor",
    operands.check_tile_means,
    lambda x, rows: x.new_empty((-(-x.shape[0] // rows), *x.shape[1:]), dtype=torch.float32),
    triton("attention8", "tile_means", E4M3, ADA_UP),
)


@dataclass(frozen=True)
class KeyTiles:
    """Which key tiles each query tile of each head sees, each at most once.

    Shapes: key_tiles (N, query tiles, capacity) int32, of which the first key_counts (N, query tiles) int32 count.
    """

    key_tiles: Tensor
    key_counts: Tensor


def attention_fp8_tiles(codes: Codes, tiles: KeyTiles, out: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`attention_fp8` over the listed keys: (L, N, K) in `out`, and the log-sum-exp of their scores (N, L) fp32.

    A query tile without keys gets v_mean and minus infinity. Raises ValueError for lists of other shapes.
    """
    c = codes
    operands_ = c.q, c.k, c.v, c.score_step, c.v_step, c.v_mean, out
    return _attention_fp8_tiles(*operands_, tiles.key_tiles, tiles.key_counts)


def estimated_tiles(codes: Codes, share: float = 1.0, mass: float = 1.0) -> KeyTiles:
    """The key tiles that are likely to matter to each query tile, in ascending order.

    A tile's weight is estimated by the mean of its keys against the mean of the queries: exp(score of the means) times its
    number of keys, as a share of all. Kept are the heaviest until they have `mass` of all (top-p), at most `share` of the
    tiles (top-k), one at least; 1 and 1 keep all. Raises ValueError unless both are above 0 and at most 1.
    """
    for name, value in (("share", share), ("mass", mass)):
        if not 0 < value <= 1:
            raise ValueError(
                f"estimated_tiles: {name} must be above 0 and at most 1, got {value}. 1 keeps all."
            )
    S, tiles = codes.k.shape[0], -(-codes.k.shape[0] // TILE_KEYS)
    q, k = _tile_means(codes.q, TILE_QUERIES), _tile_means(codes.k, TILE_KEYS)
    place = torch.arange(tiles, device=q.device)
    sizes = (S - place * TILE_KEYS).clamp(max=TILE_KEYS)
    scores = q.transpose(0, 1) @ k.permute(1, 2, 0) * codes.score_step + sizes.log()
    weights, order = torch.softmax(scores, -1).sort(-1, descending=True)
    kept = (place < max(math.ceil(share * tiles), 1)).expand(weights.shape)
    if mass < 1:
        kept = kept & (weights.cumsum(-1) - weights < mass)
    listed = torch.where(kept, order, tiles).sort(-1).values
    return KeyTiles(listed.int().contiguous(), kept.sum(-1).int())


def merged(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over all keys from those over disjoint lists: (L, N, K) in the parts' dtype, (N, L) fp32."""
    lses = torch.stack([lse for _, lse in parts])
    total = lses.logsumexp(0)
    shares = torch.where(
        total.isfinite(), (lses - total).exp(), 1 / len(parts)
    )  # without keys all parts are alike
    out = sum(out.float() * share.T[..., None] for (out, _), share in zip(parts, shares, strict=True))
    return out.to(parts[0][0].dtype), total
