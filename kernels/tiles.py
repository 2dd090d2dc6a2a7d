"""What the kernels around a product x @ w^T share: tiles, which of them a program takes, the product of one, operands.

A program is persistent: it computes one tile after another, and the copy engine fetches the operands of the next tile
while the last values of this one are still being rounded and stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True)
class Tiles:
    """One program's tile: rows of x, rows of w, depth of a step; `group` tiles along L share their rows of w in L2.

    parts: pieces of the tile's features that are rounded and stored one after the other. programs: at most so many,
    each with tiles of its own in turn; None: one per multiprocessor.
    """

    l: int
    m: int
    d: int
    warps: int
    stages: int
    group: int = 8
    parts: int = 2
    flatten: bool = True
    programs: int | None = None


@triton.jit
def place(tile, l_tiles, m_tiles, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr):
    """First row of x and first row of w of a tile."""
    first = tile // (GROUP * m_tiles) * GROUP
    size = min(l_tiles - first, GROUP)
    row = (first + tile % (GROUP * m_tiles) % size) * BLOCK_L
    return row, tile % (GROUP * m_tiles) // size * BLOCK_M


@triton.jit
def product(
    x, w, row, column, D, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(BLOCK_L, BLOCK_M) of x @ w^T in fp32."""
    acc = tl.zeros((BLOCK_L, BLOCK_M), tl.float32)
    for step in range(tl.cdiv(D, BLOCK_D)):
        rows, features = x.load([row, step * BLOCK_D]), w.load([column, step * BLOCK_D])
        acc = tl.dot(rows, features.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def halves(piece):
    """The two halves of a piece's columns, (BLOCK_L, n / 2) each; no value leaves its thread."""
    ROWS: tl.constexpr = piece.shape[0]
    HALF: tl.constexpr = piece.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(piece, (ROWS, 2, HALF)), (0, 2, 1)))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def programs(x: Tensor, w: Tensor, t: Tiles) -> int:
    """How many programs share the tiles."""
    most = t.programs or (_multiprocessors(x.device) if x.is_cuda else 4)
    return min(triton.cdiv(x.shape[0], t.l) * triton.cdiv(w.shape[0], t.m), most)


def read(x: Tensor, block: list[int]) -> TensorDescriptor:
    """For the copy engine, which reads from multiples of 16 bytes only; a view may start elsewhere and is copied."""
    return TensorDescriptor.from_tensor(x if x.data_ptr() % 16 == 0 else x.clone(), block)


def write(x: Tensor, block: list[int]) -> TensorDescriptor:
    """For the copy engine; what lies outside of x is not written."""
    return TensorDescriptor.from_tensor(x, block)
