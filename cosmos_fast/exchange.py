"""Self-attention over tokens that are spread over ranks: everybody's tokens of a few heads, instead of all heads of a few.

    norm, rotate (own tokens, all heads) -> pack -> all-to-all -> attend (all tokens, own heads) -> all-to-all -> own tokens

A rank attends some heads for some queries. With at most as many ranks as heads, and heads that divide evenly, every rank
takes its heads for all queries (Ulysses). Otherwise the ranks form a grid: the columns share the heads, the rows share
the queries, and every rank gets the keys of its heads from everybody. Each query still sees all keys in one call of the
attention, so no partial softmax is ever merged and the values are those of one rank.

What travels is what the producer of the operands made, byte for byte: 8-bit operands travel as 8 bits, and what is made of
them is that of one rank bit for bit, since means and steps are those of all tokens (`ops_attention8.pooled_moments`).

Letters: L tokens, Lr tokens of this rank, Lq queries this rank attends, N heads, n heads in one exchange, K head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Protocol

import torch
from torch import Tensor

from . import ops, ops_attention8, ops_exchange, ops_tiles
from .formats import EnvironmentProblem, cuts
from .ops_attention8 import E4M3, Codes, Moments
from .ops_linear8 import Quantised
from .parallel import Exchange, Group, Shard
from .streams import in_turns

Tensors = tuple[Tensor, ...]

PARTS: Final = 4
"""Of a rank's heads, exchanged by copies: on two H200s at 720p a layer took 44.7, 44.4 and 44.1 ms in 1, 2 and 4. By
collectives 43.7, 51.8 and 49.1: record of commit fb1d53a."""
LEAST_TOKENS: Final = 8192
"""From which on parts are worth what it takes the host to exchange them: not for a picture (3,520 at 720p)."""


@dataclass(frozen=True)
class Operands:
    """What attention reads, in any dtypes, contiguous behind the heads.

    queries: (L, N, ...), needed where the token's own output is computed. keys: (L, N, ...), needed wherever any output
    is. shared: (N, ...), the same on all ranks already.
    """

    queries: Tensors
    keys: Tensors
    shared: Tensors = ()


class Produce(Protocol):
    def __call__(
        self, qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, shard: Shard
    ) -> Operands:
        """Of this rank's tokens; shard: who has the others. Shapes: qkv (Lr, 3*N*K); gains (K,); cos, sin (Lr, K/2) fp32."""


class Attend(Protocol):
    def __call__(self, operands: Operands, out: torch.dtype) -> Tensor:
        """Queries (Lq, n, ...), keys (L, n, ...), whose rows may be strided, shared (n, ...) -> (Lq, n, K) in `out`."""


def exact_operands(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, shard: Shard
) -> Operands:
    """q, k and v in the dtype of qkv."""
    q, k, v = ops.qk_norm_rope(qkv, q_gain, k_gain, cos, sin)
    return Operands((q,), (k, v))


def exact_attend(operands: Operands, out: torch.dtype) -> Tensor:
    """In the dtype of the operands, which is `out`; nothing quantised."""
    return ops.attention(*operands.queries, *operands.keys)


def fp8_operands(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, shard: Shard
) -> Operands:
    """e4m3 codes of q, k and v, less the means over the tokens of all ranks; shared: steps and mean."""
    given = qkv, q_gain, k_gain, cos, sin
    moments = ops_attention8.pooled_moments(*given, shard.tokens, shard.group.gather)
    codes = ops_attention8.qkv_codes(*given, moments=moments)
    return Operands((codes.q,), (codes.k, codes.v), _shared(moments))


def _shared(moments: Moments) -> Tensors:
    """What codes of each head come with: step of scores (N,), step and mean of v (N, K), step of results (N,)."""
    _, v_mean, v_step, steps = moments
    heads = v_step.shape[0]
    return steps[2:].expand(heads), v_step, v_mean, ops_attention8.attended_steps(v_step, v_mean, heads)


def fp8_attend(operands: Operands, out: torch.dtype) -> Tensor:
    """Attention over codes; `out` may be theirs."""
    pack = ops_attention8.wants_packed(operands.queries[0].device)
    return ops_attention8.attention_fp8(_codes(operands, pack), out, _step(operands, out))


def _codes(operands: Operands, pack: bool) -> Codes:
    (q,), (k, v), (score_step, v_step, v_mean, _) = operands.queries, operands.keys, operands.shared
    v = ops_attention8.values_packed(v) if pack else v.contiguous()
    return Codes(q, k, v, score_step[:1], v_step, v_mean)


def _step(operands: Operands, out: torch.dtype) -> Tensor | None:
    return operands.shared[3][:1] if out == E4M3[0] else None


@dataclass(frozen=True)
class SparseFp8Attend:
    """An `Attend` over the key tiles that `ops_tiles.estimated_tiles` keeps; share, mass: see there.

    That of one rank where ranks divide the heads. Elsewhere queries would be tiled from each row's first on.
    """

    share: float
    mass: float

    def __call__(self, operands: Operands, out: torch.dtype) -> Tensor:
        codes = _codes(operands, True)
        # The estimate reads dense rows.
        codes = replace(codes, q=codes.q.contiguous(), k=codes.k.contiguous())
        tiles = ops_tiles.estimated_tiles(codes, self.share, self.mass)
        return ops_tiles.attention_fp8_tiles(codes, tiles, out, _step(operands, out))[0]


class Pack(Protocol):
    def __call__(
        self, qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, shard: Shard, columns: int,
        parts: Sequence[slice],
    ) -> tuple[Iterable[Tensor], Tensors]:  # fmt: skip
        """What a producer of q, k and v of one dtype makes, as it travels: of each part (columns, Lr, 3, heads, K); shared.

        parts: `cuts` of a column's heads. A part may be made when it is asked for, so that those before it are on their way meanwhile.
        """


def exact_pack(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, shard: Shard, columns: int,
    parts: Sequence[slice],
) -> tuple[Iterable[Tensor], Tensors]:  # fmt: skip
    """`exact_operands`, part by part."""
    return (ops_exchange.qkv_packed(qkv, q_gain, k_gain, cos, sin, columns, heads) for heads in parts), ()


def fp8_pack(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, shard: Shard, columns: int,
    parts: Sequence[slice],
) -> tuple[Iterable[Tensor], Tensors]:  # fmt: skip
    """`fp8_operands`."""
    given = qkv, q_gain, k_gain, cos, sin
    moments = ops_attention8.pooled_moments(*given, shard.tokens, shard.group.gather)
    return ops_exchange.codes_packed(*given, moments, columns, len(parts)), _shared(moments)


PACKS: dict[Produce, Pack] = {exact_operands: exact_pack, fp8_operands: fp8_pack}
"""Producers whose operands can be written straight where they are sent from, without a copy between."""


@dataclass(frozen=True)
class Grid:
    """Which heads for which queries each rank attends: rank p heads of column p % columns, queries of row p // columns.

    Row i holds the tokens of ranks i * columns to (i + 1) * columns - 1, which are consecutive.
    """

    heads: int
    shard: Shard

    @property
    def columns(self) -> int:
        """As many as the heads allow: each column takes the same number of heads."""
        return math.gcd(self.heads, self.shard.group.size)

    @property
    def rows(self) -> int:
        return self.shard.group.size // self.columns

    @property
    def row(self) -> range:
        """Ranks of this rank's row: whose queries it attends, and who attends its own."""
        first = self.shard.group.rank // self.columns * self.columns
        return range(first, first + self.columns)

    def own(self, shared: Tensors, part: slice) -> Tensors:
        """Of tensors (N, ...) the heads of `part` of this rank's column."""
        column = self.shard.group.rank % self.columns
        return tuple(t.unflatten(0, (self.columns, -1))[column, part] for t in shared)

    def in_row(self, counts: Sequence[int]) -> list[int]:
        """counts of the ranks of this row, zero for all others."""
        return [count if rank in self.row else 0 for rank, count in enumerate(counts)]


@dataclass(frozen=True)
class Exchanged:
    """A SelfAttention over the tokens of all ranks of `group`.

    parts: into how many parts a rank's heads are cut at most, so that the exchange of one part runs beneath the attention
    of another; their attentions follow each other without a gap (`streams`). It changes no value. None: PARTS where copies
    carry many tokens; one for collectives, which need SMs that the attention holds, so that both last longer. cos and sin
    are those of all tokens, on every rank.
    """

    group: Group
    produce: Produce = exact_operands
    attend: Attend = exact_attend
    parts: int | None = None

    @staticmethod
    def fp8(group: Group, heads: int, share: float = 1.0, mass: float = 1.0) -> Exchanged8:
        """`self_attention8.fp8` over the tokens of all ranks. EnvironmentProblem where it would not be that of one rank."""
        if min(share, mass) == 1:
            return Exchanged8(group)
        if heads % group.size:
            raise EnvironmentProblem(
                f"recipe: context must divide the {heads} heads where key tiles are left out, got context={group.size}. "
                "Take another context, or cfg=2, or a clip for each GPU."
            )
        return Exchanged8(group, attend=SparseFp8Attend(share, mass))

    def __call__(
        self, qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, step: int
    ) -> Tensor:
        """Shapes: qkv (Lr, 3*N*K); gains (K,); cos, sin (L, K/2) fp32; returns (Lr, N*K) in qkv's dtype."""
        return self._exchanged(qkv, q_gain, k_gain, cos, sin, qkv.dtype)[0]

    def _exchanged(
        self, qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, kind: torch.dtype
    ) -> tuple[Tensor, Tensors]:
        """(Lr, N*K) in `kind`, as which it travels back, and what the operands of all heads share."""
        K, Lr = q_gain.shape[0], qkv.shape[0]
        grid = Grid(qkv.shape[1] // (3 * K), Shard(self.group, cos.shape[0]))
        here = grid.shard.split(cos), grid.shard.split(sin)
        per_column = grid.heads // grid.columns
        pays = self.group.copies is not None and grid.shard.tokens >= LEAST_TOKENS
        count = self.parts or (PARTS if pays else 1)
        parts = cuts(per_column, count)
        pack = PACKS.get(self.produce) if grid.rows == 1 else None
        # All are sent before the first is awaited: what arrives later does so while the first is attended.
        if pack is not None:
            packed, shared = pack(qkv, q_gain, k_gain, *here, grid.shard, grid.columns, parts)
            arriving = [
                _send_packed(heads, grid.own(shared, part), grid)
                for heads, part in zip(packed, parts, strict=True)
            ]
        else:
            operands = self.produce(qkv, q_gain, k_gain, *here, grid.shard)
            shared = operands.shared
            arriving = [_send(operands, part, grid) for part in parts]
        returning = in_turns([partial(self._attended, sent, kind, grid) for sent in arriving], qkv.device)
        # A copy of rows with gaps moves one element a thread, however small: 16 bytes where heads can be cut so.
        word = torch.complex128 if K * kind.itemsize % 16 == 0 else kind
        width = K * kind.itemsize // word.itemsize
        out = qkv.new_empty(Lr, grid.columns, per_column * width, dtype=word)
        for part, exchange in zip(parts, returning, strict=True):
            own = exchange.wait().view(word).view(grid.columns, Lr, -1)
            out[:, :, part.start * width : part.stop * width].copy_(own.transpose(0, 1))
        return out.view(kind).view(Lr, -1), shared

    def _attended(self, sent: Callable[[], Operands], kind: torch.dtype, grid: Grid) -> Exchange:
        """What was sent, awaited and attended, on its way back."""
        return _send_back(self.attend(sent(), kind), grid)


@dataclass(frozen=True)
class Exchanged8(Exchanged):
    """One whose operands are codes, and for a layer that takes such also its results, in half the bytes."""

    produce: Produce = fp8_operands
    attend: Attend = fp8_attend

    def quantised(
        self, qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, step: int
    ) -> Quantised:
        """Shapes as for a call."""
        codes, shared = self._exchanged(qkv, q_gain, k_gain, cos, sin, E4M3[0])
        return Quantised(codes, shared[3][:1].expand(len(codes)).contiguous(), qkv.dtype)


@dataclass(frozen=True)
class Parcel:
    """Tensors (L, n, ...) on their way, side by side in one row of bytes per token."""

    exchange: Exchange
    like: Tensors

    @classmethod
    def send(cls, tensors: Tensors, part: slice, grid: Grid, *, within_row: bool) -> Parcel:
        """Send this rank's tokens (Lr, N, ...), of every column the heads of `part`, to the ranks that attend them.

        within_row: to and from the ranks of this row; else every rank of a column gets the tokens of every rank.
        """
        sizes = grid.shard.sizes
        targets, Lr = [tensors[0].shape[0]] * len(sizes), tensors[0].shape[0]
        if within_row:
            targets, sizes = grid.in_row(targets), grid.in_row(sizes)
        cut = [t.unflatten(1, (grid.columns, -1))[:, :, part] for t in tensors]
        like = tuple(t[:0, 0] for t in cut)
        widths = [_width(t) for t in like]
        # Rank after rank: for each row of the grid that gets them, for each column, the tokens.
        copies = 1 if within_row else grid.rows
        packed = tensors[0].new_empty(copies, grid.columns, Lr, sum(widths), dtype=torch.uint8)
        for tensor, place in zip(cut, packed.split(widths, dim=-1), strict=True):
            place.view(tensor.dtype).copy_(tensor.flatten(2).transpose(0, 1))
        return cls(grid.shard.group.all_to_all(packed.flatten(0, 2), targets, sizes), like)

    def wait(self) -> Tensors:
        """The tensors (tokens received, n, ...): views of what arrived."""
        columns = self.exchange.wait().split([_width(t) for t in self.like], dim=1)
        return tuple(
            c.view(t.dtype).unflatten(1, t.shape[1:]) for c, t in zip(columns, self.like, strict=True)
        )


def _width(like: Tensor) -> int:
    """Bytes per token of a tensor (L, n, ...)."""
    return math.prod(like.shape[1:]) * like.element_size()


def _send(operands: Operands, part: slice, grid: Grid) -> Callable[[], Operands]:
    """Start the exchange of some heads; calling what it returns waits for the operands that this rank attends."""
    shared, number = grid.own(operands.shared, part), len(operands.queries)
    if grid.rows == 1:  # queries and keys go the same way: one message
        parcels = [Parcel.send((*operands.queries, *operands.keys), part, grid, within_row=True)]
    else:
        queries = Parcel.send(operands.queries, part, grid, within_row=True)
        parcels = [queries, Parcel.send(operands.keys, part, grid, within_row=False)]

    def arrived() -> Operands:
        tensors = tuple(tensor for parcel in parcels for tensor in parcel.wait())
        return Operands(tensors[:number], tensors[number:], shared)

    return arrived


def _send_packed(packed: Tensor, shared: Tensors, grid: Grid) -> Callable[[], Operands]:
    """Start the exchange of q, k and v of some heads (columns, Lr, 3, n, K), where every rank is a column."""
    sizes, heads = grid.shard.sizes, packed.shape[2:]
    rows = packed.view(-1, math.prod(heads)).view(torch.uint8)
    exchange = grid.shard.group.all_to_all(rows, [packed.shape[1]] * len(sizes), sizes)

    def arrived() -> Operands:
        q, k, v = exchange.wait().view(packed.dtype).unflatten(1, heads).unbind(1)
        return Operands((q,), (k, v), shared)

    return arrived


def _send_back(attended: Tensor, grid: Grid) -> Exchange:
    """(Lq, n, K) of the row's tokens -> (columns * Lr, n * K) as bytes of this rank's tokens, column after column."""
    rows, sizes = attended.flatten(1).contiguous().view(torch.uint8), grid.shard.sizes
    mine = [sizes[grid.shard.group.rank]] * len(sizes)
    return grid.shard.group.all_to_all(rows, grid.in_row(sizes), grid.in_row(mine))
