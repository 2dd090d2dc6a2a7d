"""How 8-bit attention lays out what it reads: packed values, and the tiles that its lists name."""

from __future__ import annotations

from torch import Tensor

PACK = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
"""Packed values: the tokens of a channel lie in a row, in groups of 16; place i of a group holds its token PACK[i].

So ordered, the registers that hold softmax weights after the first product on a tensor core are the operand of the second.
"""

TILE_QUERIES, TILE_KEYS = 192, 96
"""Tokens of the query tiles that have a list and of the key tiles in it: those of csrc/attention8.cu."""


def packed(v: Tensor) -> Tensor:
    """(S, N, K) codes -> (N, K, S rounded up to 16) in the order of PACK, zeros after the last token."""
    room = v.new_zeros(-(-v.shape[0] // 16) * 16, *v.shape[1:])
    room[: v.shape[0]] = v
    return _turned(room, 2, 4).permute(1, 2, 0).contiguous()


def unpacked(v: Tensor, S: int) -> Tensor:
    """What `packed` packed."""
    return _turned(v.permute(2, 0, 1), 4, 2)[:S].contiguous()


def _turned(x: Tensor, high: int, low: int) -> Tensor:
    """PACK, or with 4 and 2 its inverse: the highest bit of a token's number moves down two places, its pairs stay pairs.

    By views: an index would be copied from the host, which a CUDA graph cannot record.
    """
    return x.unflatten(0, (-1, high, low, 2)).transpose(1, 2).flatten(0, 3)
