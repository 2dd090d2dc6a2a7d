"""Ops of the exchange between ranks: rows of the table and public functions, as in `ops`."""

from __future__ import annotations

from torch import Tensor

from . import codes8, operands
from .dispatch import Candidate, define, triton
from .formats import cuts
from .ops import EPS, qk_norm_rope
from .ops_attention8 import ADA_UP, E4M3, Moments, own_codes, qkv_codes


def _copied(three: tuple[Tensor, ...], columns: int, parts: int) -> Tensor:
    """q, k and v (L, N, K), each copied to its place in what travels."""
    L, N, K = three[0].shape
    packed = three[0].new_empty(L * 3 * N * K)
    for part, to in zip(cuts(N // columns, parts), split(packed, (L, N, K), columns, parts), strict=True):
        for i, x in enumerate(three):
            to[:, :, i].copy_(x.unflatten(1, (columns, -1))[:, :, part].transpose(0, 1))
    return packed


def _normed_then_copied(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, columns: int, first: int, last: int, eps: float
) -> Tensor:  # fmt: skip
    """q, k and v of these heads alone, by the op that makes them for one rank, then a copy of each to its place."""
    L, K = len(qkv), q_gain.shape[0]
    heads = qkv.view(L, 3, columns, qkv.shape[1] // (3 * columns * K), K)[:, :, :, first:last]
    packed = _copied(qk_norm_rope(heads.flatten(1), q_gain, k_gain, cos, sin), columns, 1)
    return packed.view(columns, L, 3, last - first, K)


def _coded_then_copied(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, k_mean: Tensor, v_mean: Tensor,
    v_step: Tensor, steps: Tensor, rotate: bool, columns: int, parts: int, eps: float,
) -> Tensor:  # fmt: skip
    """The same of codes."""
    codes = qkv_codes(qkv, q_gain, k_gain, cos, sin, rotate=rotate, moments=(k_mean, v_mean, v_step, steps))
    return _copied((codes.q, codes.k, codes.v), columns, parts)


_qkv_packed = define(
    "qkv_packed(Tensor qkv, Tensor q_gain, Tensor k_gain, Tensor cos, Tensor sin, int columns, int first, int last, "
    "float eps) -> Tensor",
    operands.check_qkv_packed,
    lambda qkv, gain, k_gain, cos, sin, columns, first, last, eps: qkv.new_empty(
        columns, len(qkv), 3, last - first, len(gain)
    ),
    triton("norm_rope", "qkv_packed"),
    Candidate("composed", lambda: _normed_then_copied),
)
_CODES_TWIN = triton("qkv_codes", "codes_packed", capability=ADA_UP)


_codes_packed = define(
    "codes_packed(Tensor qkv, Tensor q_gain, Tensor k_gain, Tensor cos, Tensor sin, Tensor k_mean, Tensor v_mean, "
    "Tensor v_step, Tensor steps, bool rotate, int columns, int parts, float eps) -> Tensor",
    operands.check_codes_packed,
    lambda qkv, *rest: qkv.new_empty(qkv.numel(), dtype=E4M3[0]),
    own_codes("qk_codes_packed_cuda", codes8.load_own_packed, _CODES_TWIN, "write_packed_values"),
    _CODES_TWIN,
    Candidate("composed", lambda: _coded_then_copied),
)


def qkv_packed(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, columns: int, heads: slice
) -> Tensor:
    """`ops.qk_norm_rope` as ranks exchange it: q, k and v (columns, L, 3, n, K) of n heads of each column.

    Shapes as there. columns: ranks that take N / columns heads each; heads: which of those N / columns.
    """
    return _qkv_packed(qkv, q_gain, k_gain, cos, sin, columns, heads.start, heads.stop, EPS)


def codes_packed(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, moments: Moments, columns: int, parts: int,
    *, rotate: bool = True,
) -> list[Tensor]:  # fmt: skip
    """`ops_attention8.qkv_codes` of moments of all tokens, in that order: e4m3, half the bytes of 16-bit values.

    parts: in how many `cuts` of a column's heads they travel; all are written at once.
    """
    packed = _codes_packed(qkv, q_gain, k_gain, cos, sin, *moments, rotate, columns, parts, EPS)
    L, K = qkv.shape[0], q_gain.shape[0]
    return split(packed, (L, qkv.shape[1] // (3 * K), K), columns, parts)


def split(packed: Tensor, shape: tuple[int, ...], columns: int, parts: int) -> list[Tensor]:
    """The parts (columns, L, 3, heads, K) of what is packed; shape: (L, N, K) of one of q, k and v."""
    L, N, K = shape
    heads = [cut.stop - cut.start for cut in cuts(N // columns, parts)]
    pieces = packed.split([columns * L * 3 * n * K for n in heads])
    return [piece.view(columns, L, 3, n, K) for piece, n in zip(pieces, heads, strict=True)]
