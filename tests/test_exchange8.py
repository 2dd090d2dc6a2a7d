"""8-bit attention over tokens that are spread: what travels, how many bytes of it, and that it is one rank's bit for bit."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from system import clip_of, open_engine, request
from torch import Tensor

from cosmos_fast import attention8, ops_attention8, ops_exchange, reference, testing
from cosmos_fast.dispatch import TABLE
from cosmos_fast.engine import Engine
from cosmos_fast.exchange import (
    Exchanged,
    Exchanged8,
    Grid,
    Operands,
    SparseFp8Attend,
    fp8_attend,
    fp8_operands,
)
from cosmos_fast.formats import EnvironmentProblem
from cosmos_fast.ops import EPS
from cosmos_fast.parallel import ALONE, Group, Mesh, Shard
from cosmos_fast.recipe import Plan, Recipe
from cosmos_fast.self_attention import exact
from cosmos_fast.self_attention8 import Fp8, SparseFp8

testing.kernels_from_checkout()
K = 32
CODES, EQUAL = 2, 0.99
"""As tests/test_parallel_engine.py allows: how far off a pixel may be, and how many must be equal."""


def projection(heads: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """qkv, gains, cos, sin; one channel of v whose mean differs between ranks."""
    g = torch.Generator().manual_seed(heads + tokens)
    qkv, angles = (
        torch.randn(tokens, 3 * heads * K, generator=g),
        torch.randn(tokens, K // 2, generator=g),
    )
    qkv[:, -1] += 3 + torch.linspace(0, 4, tokens)
    return qkv.to(dtype), *(1 + 0.1 * torch.randn(2, K, generator=g)).to(dtype), angles.cos(), angles.sin()


# --- kernels, interpreted ---


def kernels() -> Any:
    from cosmos_fast.kernels import qkv_codes

    return qkv_codes


@pytest.mark.interpret
@pytest.mark.parametrize("columns, parts", [(1, 1), (2, 2), (3, 2), (2, 3), (6, 4)])
def test_codes_leave_as_they_are_made_for_one_rank(columns: int, parts: int) -> None:
    given = projection(6, 21, torch.float16)
    moments = reference.qkv_moments(*given, EPS)
    codes = kernels().qkv_codes(*given, *moments, True, False, EPS)
    sent = kernels().codes_packed(*given, *moments, True, columns, parts, EPS)
    found = ops_exchange.split(sent, (21, 6, K), columns, parts)
    assert len(found) == min(parts, 6 // columns)
    for i, x in enumerate(codes):
        heads = torch.cat([part[:, :, i] for part in found], dim=2)  # (columns, L, heads of a column, K)
        assert torch.equal(heads.transpose(0, 1).flatten(1, 2), x)


@pytest.mark.interpret
def test_kernels_find_the_same_moments_of_parts_and_of_all() -> None:
    qkv, q_gain, k_gain, cos, sin = projection(2, 300, torch.float16)
    alone = kernels().qkv_moments(qkv, q_gain, k_gain, cos, sin, EPS)
    for sizes in ([150, 150], [1, 130, 169]):
        parts = zip(*(x.split(sizes) for x in (qkv, cos, sin)), strict=True)
        sums, ends = zip(*(kernels().qkv_sums(x, k_gain, *angles, EPS) for x, *angles in parts), strict=True)
        found = kernels().moments_of_sums(torch.stack(sums), torch.stack(ends), q_gain, k_gain, 300)
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True)), sizes


def check_sums_are_those_of_fp64(device: str) -> None:
    """Every 16-bit value there is, alone and beside others: numbers, infinities and NaN as fp64 has them, bit for bit."""
    g = torch.Generator().manual_seed(0)
    gain, angles = torch.ones(128, device=device), torch.zeros(3, 64, device=device)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        all_values = (
            torch.arange(1 << 16).to(torch.int16).view(dtype if dtype.itemsize == 2 else torch.bfloat16)
        )
        if dtype == torch.float32:  # and digits that 16-bit values lack
            all_values = (all_values.float().view(torch.int32) + 0x1235).view(torch.float32)
        if (
            device == "cpu" and dtype == torch.bfloat16
        ):  # whose subnormal values the interpreter widens to others
            all_values[all_values.abs() < torch.finfo(dtype).tiny] = 0
        others = torch.stack([all_values[torch.randperm(1 << 16, generator=g)] for _ in range(2)])
        rows = torch.cat((all_values[None], others)).to(device)
        for tokens, v in [(n, part) for part in rows.split(16 * 128, dim=1) for n in (1, 3)]:
            v, table = v[:tokens], angles[:tokens]
            qkv = torch.cat((torch.zeros_like(v), torch.zeros_like(v), v), 1)
            given = qkv, gain.to(dtype), table.cos(), table.sin(), EPS, kernels().MOMENTS
            (sums,), (ends,) = kernels()._chunks(*given)  # which qkv_sums adds up
            wanted = torch.zeros_like(v[0], dtype=torch.float64)
            for row in v.double():
                wanted += row
            assert not sums[0].any()
            torch.testing.assert_close(sums[1].flatten(), wanted, rtol=0, atol=0, equal_nan=True)
            least_most = torch.stack((v.amin(0), v.amax(0))).float()
            torch.testing.assert_close(ends.flatten(1), least_most, rtol=0, atol=0, equal_nan=True)


@pytest.mark.interpret
def test_sums_of_values_are_those_of_fp64() -> None:
    check_sums_are_those_of_fp64("cpu")


@pytest.mark.interpret
@pytest.mark.parametrize("odd", [torch.inf, -torch.inf, torch.nan])
def test_sums_of_keys_that_are_no_numbers_are_those_of_the_reference(odd: float) -> None:
    qkv, gain, _, cos, sin = projection(2, 5, torch.bfloat16)
    gain[3] = odd
    qkv[2, 2 * K + 7] = odd
    sums, _ = kernels().qkv_sums(qkv, gain, cos, sin, EPS)
    wanted, _ = reference.qkv_sums(qkv, gain, cos, sin, EPS)
    assert torch.equal(sums.isfinite(), wanted.isfinite()) and not wanted.isfinite().all()
    assert torch.equal(sums.isnan(), wanted.isnan())
    known = wanted.isinf()
    assert torch.equal(sums[known], wanted[known])


# --- on a GPU ---


@pytest.mark.gpu
def test_gpu_sums_of_values_are_those_of_fp64() -> None:
    check_sums_are_those_of_fp64("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [4099, 33])
def test_what_two_ranks_attend_is_what_one_does(tokens: int) -> None:
    """By hand, with whatever implementations are chosen here: one rank's moments, codes and result, bit for bit."""
    N, width = 16, 128
    g = torch.Generator("cuda").manual_seed(tokens)
    qkv = torch.randn(tokens, 3 * N * width, generator=g, device="cuda").bfloat16()
    gains = (1 + 0.1 * torch.randn(2, width, generator=g, device="cuda")).bfloat16().unbind(0)
    angles = torch.rand(tokens, width // 2, generator=g, device="cuda")
    given = qkv, *gains, angles.cos(), angles.sin()
    sizes = Shard(Group(0, 2), tokens).sizes
    parts = [(x, *gains, *pair) for x, *pair in zip(*(t.split(sizes) for t in (qkv, *given[3:])))]
    sums: list[Tensor] = []
    for part in parts:
        ops_attention8.pooled_moments(*part, tokens, lambda mine: sums.append(mine) or [mine])
    moments = ops_attention8.pooled_moments(*parts[0], tokens, lambda mine: sums)
    alone = ops_attention8.qkv_moments(*given)
    assert all(torch.equal(a, b) for a, b in zip(moments, alone, strict=True))
    sent = [ops_exchange.codes_packed(*part, moments, 2, 1)[0] for part in parts]
    codes, rows = ops_attention8.qkv_codes(*given, moments=alone), Fp8().quantised(*given, 0)
    one = Fp8()(*given, 0).view(tokens, N, width)
    step = ops_attention8.attended_steps(moments[2], moments[1], N)
    assert torch.equal(step, rows.steps[:1].expand(N))
    for rank, heads in enumerate((slice(0, 8), slice(8, 16))):
        arrived = torch.cat([packed[rank] for packed in sent]).unbind(1)  # rows that lie apart
        for a, b in zip(arrived, (codes.q, codes.k, codes.v), strict=True):
            assert torch.equal(a.contiguous().view(torch.uint8), b[:, heads].contiguous().view(torch.uint8))
        shared = moments[3][2:].expand(8), moments[2][heads], moments[1][heads], step[heads]
        q, k, v = arrived
        assert torch.equal(fp8_attend(Operands((q,), (k, v), shared), qkv.dtype), one[:, heads])
        mine = fp8_attend(Operands((q,), (k, v), shared), torch.float8_e4m3fn).view(torch.uint8)
        assert torch.equal(mine, rows.codes.view(torch.uint8).view(tokens, N, width)[:, heads])


# --- ranks ---


class Sent:
    """Bytes that leave this rank in each exchange, and for the means and steps of all."""

    def __init__(self, group: Group) -> None:
        self.exchanges: list[int] = []
        self.gathered = 0
        to_all, gather = Group.all_to_all, Group.gather

        def counted(of: Group, rows: Tensor, sent: Any, received: Any) -> Any:
            assert rows.dtype == torch.uint8 and len(rows) == sum(sent)
            self.exchanges.append((sum(sent) - sent[group.rank]) * rows.shape[1])
            return to_all(of, rows, sent, received)

        def heard(of: Group, x: Tensor, rows: Any = None) -> Any:
            self.gathered += x.numel() * x.element_size()
            return gather(of, x, rows)

        Group.all_to_all, Group.gather = counted, heard  # type: ignore[method-assign, assignment]

    def of(self, attend: Exchanged, given: tuple[Tensor, ...]) -> tuple[int, int, int]:
        """Bytes of q, k and v, of what comes back, and gathered, by one call."""
        self.exchanges, self.gathered = [], 0
        attend(*given, 0)
        back = attend.parts
        return sum(self.exchanges[:-back]), sum(self.exchanges[-back:]), self.gathered


def check_bytes(group: Group) -> None:
    heads, tokens, size = 12, 41, group.size
    shard, (qkv, *rest) = Shard(group, tokens), projection(heads, tokens, torch.bfloat16)
    given, sent = (shard.split(qkv), *rest), Sent(group)
    for parts in (1, 2):
        wide = sent.of(Exchanged(group, parts=parts), given)
        narrow = sent.of(Exchanged(group, fp8_operands, fp8_attend, parts=parts), given)
        Lr = len(given[0])
        assert wide[0] == 3 * Lr * heads * K * 2 * (size - 1) // size
        assert wide[1] == (tokens - Lr) * heads // size * K * 2
        assert narrow[0] == wide[0] / 2 and narrow[1] == wide[1], (narrow, wide)
        assert (wide[2], narrow[2]) == (0, (2 * 8 + 2 * 4) * heads * K)
        sent.exchanges = []
        Exchanged8(group, parts=parts).quantised(*given, 0)
        assert sum(sent.exchanges) == (wide[0] + wide[1]) / 2


class ReadsPacked:
    """In place of our kernel: v must come packed; rows of q and k may lie apart, as its tensor maps allow."""

    def __init__(self) -> None:
        self.apart = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, score_step: Tensor, v_step: Tensor, v_mean: Tensor, out: torch.dtype) -> Tensor:  # fmt: skip
        self.apart += not k.is_contiguous()
        rows = reference.unpacked(v, k.shape[0])
        assert torch.equal(reference.packed(rows), v)
        return (
            attention8.emulated(q.contiguous(), k.contiguous(), rows, score_step, torch.float32) * v_step + v_mean
        ).to(out)  # fmt: skip


def check_spread(group: Group) -> None:
    """Of every grid and of tokens that do not divide, the codes and where ranks divide heads the result: one rank's bits."""
    for heads, tokens, dtype in ((4, 37, torch.float32), (6, 41, torch.bfloat16), (1, 4, torch.float32)):
        shard, (qkv, *rest) = Shard(group, tokens), projection(heads, tokens, dtype)
        own, angles = shard.split(qkv), [shard.split(x) for x in rest[2:]]
        mine = fp8_operands(own, *rest[:2], *angles, shard)
        alone = fp8_operands(qkv, *rest, Shard(ALONE, tokens))
        for a, b in zip(mine.queries + mine.keys, alone.queries + alone.keys, strict=True):
            assert torch.equal(shard.join(a.view(torch.uint8)), b.view(torch.uint8))
        assert all(torch.equal(a, b) for a, b in zip(mine.shared, alone.shared, strict=True))
        one = Fp8()(qkv, *rest, 0)
        true = exact(qkv, *rest, 0)
        assert 1e-3 < testing.rel_error(one, true) < 0.06
        for parts in (1, 2, 3):
            found = shard.join(Exchanged(group, fp8_operands, fp8_attend, parts)(own, *rest, 0))
            # Ranks that share the queries of a head have other row counts in their products, and may round otherwise.
            bound = 0.0 if Grid(heads, shard).rows == 1 else 4 * torch.finfo(dtype).eps
            assert (found - one).abs().max() <= bound * one.abs().max(), (heads, tokens, parts)
            rows, codes = (
                Exchanged8(group, parts=parts).quantised(own, *rest, 0),
                Fp8().quantised(qkv, *rest, 0),
            )
            assert torch.equal(shard.join(rows.steps), codes.steps) and rows.dtype == dtype
            same = shard.join(rows.codes.view(torch.uint8)) == codes.codes.view(torch.uint8)
            assert same.float().mean() >= (1.0 if Grid(heads, shard).rows == 1 else 0.99)


def check_sparse(group: Group) -> None:
    """Lists of key tiles are made of each head's own codes, wherever it is attended."""
    tokens = 700  # four tiles of queries, eight of keys
    shard, (qkv, *rest) = Shard(group, tokens), projection(4, tokens, torch.float32)
    for share, mass in ((0.5, 1.0), (1.0, 0.6)):
        one = SparseFp8(share, mass)(qkv, *rest, 0)
        found = shard.join(Exchanged.fp8(group, 4, share, mass)(shard.split(qkv), *rest, 0))
        assert not torch.equal(one, Fp8()(qkv, *rest, 0))
        assert testing.rel_error(found, one) < 1e-6


def check_packed(group: Group) -> None:
    kernel, op = ReadsPacked(), TABLE["attention_fp8"]
    shard, (qkv, *rest) = Shard(group, 37), projection(4, 37, torch.float32)
    before = dict(op.chosen)
    op.chosen["cpu", torch.float8_e4m3fn] = "own", kernel
    try:
        assert ops_attention8.wants_packed(qkv.device)
        one = Fp8()(qkv, *rest, 0)
        assert kernel.apart == 0
        found = shard.join(Exchanged(group, fp8_operands, fp8_attend)(shard.split(qkv), *rest, 0))
    finally:
        op.chosen.clear()
        op.chosen.update(before)
    grid = Grid(4, shard)
    assert kernel.apart >= 1  # what arrives is attended where it lies
    assert (found - one).abs().max() <= (0.0 if grid.rows == 1 else 1e-6) * one.abs().max()


def work(size: int) -> None:
    mesh = Mesh.open(Plan(device="cpu", context=size), timeout_s=60)
    try:
        check_spread(mesh.context)
        check_packed(mesh.context)
        if size != 3:  # which does not divide four heads
            check_sparse(mesh.context)
        check_bytes(mesh.context)
    finally:
        mesh.close()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_attend_in_8_bits_as_one_does(size: int) -> None:
    ranks.run(size, work, size)


def test_alone_an_exchange_is_none() -> None:
    check_spread(ALONE)
    check_packed(ALONE)
    check_sparse(ALONE)


def test_key_tiles_are_left_out_only_where_ranks_divide_heads() -> None:
    engine = Engine.__new__(Engine)
    engine.recipe, engine.device = Recipe.preset("fp8_sparse"), torch.device("cpu")
    engine.mesh = replace(Mesh.alone("cpu"), context=Group(0, 3))
    with pytest.raises(EnvironmentProblem, match=r"context must divide the 16 heads .*context=3"):
        engine._attention(16)
    engine.mesh = replace(engine.mesh, context=Group(0, 2))
    assert engine._attention(16) == Exchanged8(Group(0, 2), attend=SparseFp8Attend(0.5, 1.0))
    engine.recipe = Recipe.fp8()
    assert engine._attention(16) == Exchanged8(Group(0, 2))


# --- clips ---


def made(models: Path, fields: dict[str, Any], size: int, recipe: Recipe) -> tuple[np.ndarray | None, str]:
    engine = open_engine(models, "edge/distilled", plan=Plan(device="cpu", context=size), recipe=recipe)
    try:
        frames = engine.generate(request(**fields)).frames
        return (frames if engine.mesh.is_first else None), hashlib.sha256(frames.tobytes()).hexdigest()
    finally:
        engine.mesh.close()


@pytest.fixture(scope="module")
def street(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"video": clip_of(tmp_path_factory.mktemp("clips") / "street.mp4", 5), "max_frames": 5}


@pytest.fixture(scope="module")
def alone(models: Path, street: dict[str, Any]) -> np.ndarray:
    frames, _ = made(models, street, 1, Recipe.fp8())
    exact, _ = made(models, street, 1, Recipe.exact())
    assert frames is not None and exact is not None and frames.std() > 5
    assert (frames != exact).mean() > 0.1  # 8 bits do something here
    return frames


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_clip_in_8_bits_is_that_of_one_rank(
    models: Path, street: dict[str, Any], alone: np.ndarray, size: int
) -> None:
    """On 3 ranks the 512 tokens do not divide. Codes and steps are equal; products of fewer rows may round otherwise."""
    found = ranks.run(size, made, models, street, size, Recipe.fp8())
    assert len({digest for _, digest in found}) == 1, "ranks made different frames"
    frames = found[0][0]
    assert frames is not None
    gap = np.abs(frames.astype(int) - alone)
    assert gap.max() <= CODES and (gap == 0).mean() > EQUAL, (gap.max(), (gap == 0).mean())
