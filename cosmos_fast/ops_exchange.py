"""Ops of the exchange between ranks: rows of the table and public functions, as in `ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import operands
from .dispatch import Candidate, define, triton
from .formats import cuts
from .ops import EPS, qk_norm_rope


def _normed_then_copied(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, columns: int, parts: int, eps: float
) -> Tensor:  # fmt: skip
    """q, k and v by the op that makes them for one rank, then a copy of each to its place."""
    three = qk_norm_rope(qkv, q_gain, k_gain, cos, sin)
    packed = torch.empty_like(qkv).view(-1)
    for part, to in zip(
        cuts(three[0].shape[1] // columns, parts), split(packed, three[0].shape, columns, parts)
    ):
        for i, x in enumerate(three):
            to[:, :, i].copy_(x.unflatten(1, (columns, -1))[:, :, part].transpose(0, 1))
    return packed


_qkv_packed = define(
    "qkv_packed(Tensor qkv, Tensor q_gain, Tensor k_gain, Tensor cos, Tensor sin, int columns, int parts, float eps) -> Tensor",
    operands.check_qkv_packed,
    lambda qkv, *rest: qkv.new_empty(qkv.numel()),
    triton("norm_rope", "qkv_packed"),
    Candidate("composed", lambda: _normed_then_copied),
)


def qkv_packed(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, columns: int, parts: int
) -> list[Tensor]:
    """`ops.qk_norm_rope` in the order in which ranks exchange it: of each part, (columns, L, 3, heads, K) of q, k and v.

    Shapes as there. columns: ranks that take N / columns heads each; parts: in how many `cuts` of those heads they travel.
    """
    packed = _qkv_packed(qkv, q_gain, k_gain, cos, sin, columns, parts, EPS)
    L, K = qkv.shape[0], q_gain.shape[0]
    return split(packed, (L, qkv.shape[1] // (3 * K), K), columns, parts)


def split(packed: Tensor, shape: tuple[int, ...], columns: int, parts: int) -> list[Tensor]:
    """The parts (columns, L, 3, heads, K) of what is packed; shape: (L, N, K) of one of q, k and v."""
    L, N, K = shape
    heads = [cut.stop - cut.start for cut in cuts(N // columns, parts)]
    pieces = packed.split([columns * L * 3 * n * K for n in heads])
    return [piece.view(columns, L, 3, n, K) for piece, n in zip(pieces, heads, strict=True)]
