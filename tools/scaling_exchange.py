"""One self-attention whose tokens are spread over ranks, for bench_scaling.py: the calls to time and what they must equal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from published import relative_l2
from torch import Tensor

from cosmos_fast import ops_attention8
from cosmos_fast.config import NetworkConfig
from cosmos_fast.dispatch import TABLE
from cosmos_fast.exchange import PARTS, Exchanged, exact_operands, fp8_attend, fp8_operands
from cosmos_fast.formats import EnvironmentProblem, cuts
from cosmos_fast.ops import EPS
from cosmos_fast.parallel import Group, Shard
from cosmos_fast.self_attention import exact
from cosmos_fast.self_attention8 import fp8

Call = Callable[[], Any]


def operands(
    config: NetworkConfig, grid: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Packed projection of all tokens, the same on every rank; gains of q and k, cos and sin."""
    T, H, W = grid
    L, N, K = T * H * W // 4, config.heads, config.head_width
    g = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(L, 3 * N * K, generator=g, device=device, dtype=torch.bfloat16)
    gains = torch.ones(2, K, device=device, dtype=torch.bfloat16).unbind(0)
    angles = torch.rand(L, K // 2, generator=g, device=device) * 3
    return qkv, (*gains, angles.cos(), angles.sin())


def calls(
    qkv: Tensor, table: tuple[Tensor, ...], group: Group, by_copies: Group | None
) -> Iterator[tuple[str, Call, Call | None]]:
    """(name, call, the call of one rank whose rows it must give). by_copies: the group with the other exchange."""
    q_gain, k_gain, cos, sin = table
    shard = Shard(group, len(qkv))
    own, here = shard.split(qkv).contiguous(), (shard.split(cos), shard.split(sin))
    one = partial(exact, qkv, *table, 0)
    yield "one", one, None
    yield "operands alone", partial(exact_operands, own, q_gain, k_gain, *here, shard), None
    for name, pack in candidates("qkv_packed", qkv).items():
        for parts in (1, PARTS):
            yield (
                f"packed in {parts} parts, {name}",
                partial(packed, pack, parts, own, q_gain, k_gain, *here, group.size),
                None,
            )
    ways = [("", group, (1, 2, 4)), *([] if by_copies is None else [("copies, ", by_copies, (1, 2, 4, 8))])]
    for way, ranks, cut in ways:
        for parts in cut:
            yield f"{way}in {parts} parts", partial(Exchanged(ranks, parts=parts), own, *table, 0), one
    if by_copies is not None:
        yield f"copies without the hint, in {PARTS} parts", partial(unhinted, by_copies, own, table), one
    try:
        one8 = partial(fp8(qkv.device), qkv, *table, 0)
    except EnvironmentProblem as error:  # no fast library; the same on all ranks, whose machine is one
        print(f"bench_scaling: no 8-bit attention: {error}", flush=True)
        return
    yield "fp8, one", one8, None
    given = own, q_gain, k_gain, *here
    pooled = partial(ops_attention8.pooled_moments, *given, shard.tokens, group.gather)
    yield "fp8, moments of all", pooled, None
    moments = pooled()
    for name, pack in candidates("codes_packed", qkv).items():
        yield f"fp8, packed, {name}", partial(pack, *given, *moments, True, group.size, 2, EPS), None
    for way, ranks, cut in ways:
        for parts in cut:
            eight = Exchanged(ranks, fp8_operands, fp8_attend, parts)
            yield f"fp8, {way}in {parts} parts", partial(eight, own, *table, 0), one8


def packed(pack: Any, parts: int, own: Tensor, q_gain: Tensor, *rest: Any) -> Tensor:
    """The last of the messages with q, k and v of a rank's tokens, made one after the other. rest: ..., columns."""
    heads = own.shape[1] // (3 * len(q_gain) * rest[-1])
    return [pack(own, q_gain, *rest, part.start, part.stop, EPS) for part in cuts(heads, parts)][-1]  # type: ignore[no-any-return]


def unhinted(group: Group, own: Tensor, table: tuple[Tensor, ...]) -> Tensor:
    """What copies that may wait for an attention cost."""
    peers: Any = group.copies and group.copies.peers
    before, peers.hinted = peers.hinted, False
    try:
        return Exchanged(group, parts=PARTS)(own, *table, 0)
    finally:
        peers.hinted = before


def candidates(op: str, qkv: Tensor) -> dict[str, Call]:
    """Every implementation of an op that runs here, but the reference."""
    found = TABLE[op].candidates[:-1]
    return {c.name: c.load() for c in found if c.obstacle(qkv.device, qkv.dtype) is None}


def equality(call: Call, wanted: Call | None, tokens: int, group: Group) -> dict[str, Any]:
    """Whether the ranks' rows together are those of one rank."""
    found = call()
    if wanted is None:
        return {}
    whole, alone = Shard(group, tokens).join(found), wanted()
    return {"bitwise": bool(torch.equal(whole, alone)), "relative_l2": relative_l2(whole, alone)}
