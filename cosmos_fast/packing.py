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
    return room.unflatten(0, (-1, 16))[:, list(PACK)].flatten(0, 1).permute(1, 2, 0).contiguous()


def unpacked(v: Tensor, S: int) -> Tensor:
    """What `packed` packed."""
    order = [PACK.index(token) for token in range(16)]
    return v.permute(2, 0, 1).unflatten(0, (-1, 16))[:, order].flatten(0, 1)[:S].contiguous()
