"""8-bit attention over lists of key tiles, and the first policy that fills them: `estimated_tiles`.

For each head and tile of TILE_QUERIES queries a list names the tiles of TILE_KEYS keys that its softmax sees; time goes with
how many. What a list leaves out is left out: outputs of disjoint lists merge by their log-sum-exps into that of all their
keys. A recipe attends to every key unless it says otherwise (`attention_share`, `attention_mass`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import attention8, operands
from .attention8 import merged as merged
from .dispatch import define, triton
from .ops_attention8 import ADA_UP, E4M3, Codes, attended_steps, own_or_twin
from .ops_linear8 import Quantised
from .packing import TILE_KEYS, TILE_QUERIES

_TWIN = triton("attention8", "attention_fp8_tiles", E4M3, ADA_UP)


_attention_fp8_tiles = define(
    "attention_fp8_tiles(Tensor q, Tensor k, Tensor v, Tensor score_step, Tensor v_step, Tensor v_mean, ScalarType out, "
    "Tensor key_tiles, Tensor key_counts, Tensor? out_step=None) -> (Tensor, Tensor)",
    operands.check_attention_fp8_tiles,
    lambda q, k, v, score_step, v_step, v_mean, out, key_tiles, key_counts, out_step=None: (
        q.new_empty(q.shape, dtype=out),
        q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32),
    ),
    own_or_twin(attention8.load_own_tiles, _TWIN),
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


def attention_fp8_tiles(
    codes: Codes, tiles: KeyTiles, out: torch.dtype = torch.bfloat16, out_step: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`attention_fp8` over the listed keys: (L, N, K) in `out`, and the log-sum-exp of their scores (N, L) fp32.

    A query tile without keys gets v_mean and minus infinity. Raises ValueError for lists of other shapes.
    """
    c = codes
    operands_ = c.q, c.k, c.v, c.score_step, c.v_step, c.v_mean, out
    return _attention_fp8_tiles(*operands_, tiles.key_tiles, tiles.key_counts, out_step)


def attention_rows(codes: Codes, tiles: KeyTiles, dtype: torch.dtype) -> Quantised:
    """The first result of `attention_fp8_tiles` as rows of codes (L, N*K); dtype: of the layer."""
    L = codes.q.shape[0]
    steps = attended_steps(codes.v_step, codes.v_mean, max(L, 1))
    rows, _ = attention_fp8_tiles(codes, tiles, E4M3[0], steps[:1])
    return Quantised(rows.flatten(1), steps[:L], dtype)


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
