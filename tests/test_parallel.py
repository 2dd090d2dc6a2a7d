"""Several ranks give what one gives: groups, exchange of heads, network, both sampling loops. Over gloo, on the CPU.

Bitwise: the exchange against one rank's attention where the ranks divide the heads, guidance apart against together,
heads in parts against whole, and every rank against every other. Spread tokens change the row counts of matrix products and so their rounding: TOLERANCE.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from oracle import random_state
from torch import Tensor

from cosmos_fast import checkpoint, ops, sampler
from cosmos_fast.config import NetworkConfig
from cosmos_fast.exchange import (
    Attend,
    Exchanged,
    Grid,
    Operands,
    Produce,
    exact_attend,
    exact_operands,
)
from cosmos_fast.formats import CheckpointError, ClipError, EnvironmentProblem, cuts
from cosmos_fast.network import Network, Pair, Single
from cosmos_fast.parallel import ALONE, Group, Halves, Mesh, Ranks, Shard
from cosmos_fast.recipe import Plan
from cosmos_fast.self_attention import exact

WORLDS = (2, 3, 4, 6)
TOLERANCE = 2e-5
"""Largest difference of fp32 latents over their largest value, after all steps."""


# --- one rank --------------------------------------------------------------------------------------


def test_alone_every_call_is_the_identity() -> None:
    mesh, x = Mesh.open(Plan(device="cpu")), torch.randn(7, 2)
    assert mesh.is_first and mesh.world is not None and mesh.context.size == mesh.cfg.size == 1
    shard = Shard(ALONE, 7)
    assert shard.split(x) is x and shard.join(x) is x and shard.start == 0
    assert ALONE.gather(x)[0] is x and ALONE.broadcast(x, 0, x.device) is x and ALONE.tell(x) is x
    assert ALONE.hear(3) == [3] and ALONE.any(True) and not ALONE.any(False)
    assert ALONE.spread([None, lambda: x], x.device) == [None, x]
    ALONE.check_same(x, "x")
    mesh.close()


def test_ranks_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Ranks.from_environment() == Ranks()
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert Ranks.from_environment() == Ranks(9, 16, 9)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Ranks.from_environment() == Ranks(9, 16, 1)
    with pytest.raises(EnvironmentProblem, match=r"number of ranks started, got 4 \* 2 and 16"):
        Mesh.open(Plan(device="cpu", context=4, cfg=2))
    Mesh.open(Plan(device="cpu"))  # one rank joins nobody
    for bad in ("16", "-1", "x"):
        monkeypatch.setenv("RANK", bad)
        with pytest.raises(EnvironmentProblem, match="ranks: .*must"):
            Ranks.from_environment()


@pytest.mark.parametrize("size", range(1, 8))
@pytest.mark.parametrize("tokens", [7, 8, 45, 84480])
def test_shards_cover_every_token_once(size: int, tokens: int) -> None:
    shards = [Shard(Group(rank, size), tokens) for rank in range(size)]
    x = torch.arange(tokens)
    assert torch.equal(torch.cat([shard.split(x) for shard in shards]), x)
    assert max(shards[0].sizes) - min(shards[0].sizes) <= 1
    assert [int(shard.split(x)[0]) for shard in shards] == [shard.start for shard in shards]


def test_a_shard_has_a_token_for_every_rank() -> None:
    with pytest.raises(ValueError, match="a token for every one of 4 ranks, got 3"):
        Shard(Group(0, 4), 3)


@pytest.mark.parametrize(
    "heads, size, columns", [(16, 8, 8), (16, 3, 1), (16, 6, 2), (16, 32, 16), (6, 4, 2)]
)
def test_the_grid_gives_every_head_and_query_to_one_rank(heads: int, size: int, columns: int) -> None:
    grids = [Grid(heads, Shard(Group(rank, size), 64)) for rank in range(size)]
    assert all(grid.columns == columns and grid.columns * grid.rows == size for grid in grids)
    assert sorted({rank for grid in grids for rank in grid.row}) == list(range(size))
    assert all(rank in grid.row for rank, grid in enumerate(grids))


def test_cuts_are_runs_of_all_heads() -> None:
    for heads in range(1, 9):
        for parts in range(1, 5):
            found = [list(range(heads))[cut] for cut in cuts(heads, parts)]
            assert sum(found, []) == list(range(heads)) and all(found) and len(found) == min(parts, heads)


# --- groups ----------------------------------------------------------------------------------------


def check_groups(mesh: Mesh) -> None:
    world, rank, size = mesh.world, mesh.ranks.rank, mesh.ranks.size
    assert [g.tolist() for g in world.gather(torch.full((rank + 1, 2), rank), range(1, size + 1))] == [
        [[r, r]] * (r + 1) for r in range(size)
    ]
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.bool):
        x = torch.arange(6).view(2, 3).to(dtype)
        got = world.broadcast(x if rank == size - 1 else None, size - 1, mesh.device)
        assert got.dtype == dtype and torch.equal(got.float(), x.float())
    assert copy.deepcopy(world) is world
    assert world.hear(rank) == list(range(size)) and world.tell(rank, 1) == 1
    assert world.any(rank == size - 1) and not world.any(False)
    assert world.first(lambda: f"from {rank}") == "from 0"
    assert world.by_first(lambda: rank, -1) == (0 if rank == 0 else -1)
    made: list[int] = []

    def job(i: int) -> Tensor:
        made.append(i)
        return torch.full((i + 1,), float(i))

    found = world.spread([None, *((lambda i=i: job(i)) for i in range(size + 1)), None], mesh.device)
    assert found[0] is found[-1] is None
    assert [f.tolist() for f in found[1:-1] if f is not None] == [
        [float(i)] * (i + 1) for i in range(size + 1)
    ]
    assert made == ([0, size] if rank == 0 else [rank])
    check_failures(mesh)


def check_failures(mesh: Mesh) -> None:
    """What one rank raises, all raise, and the group goes on working."""
    world, rank, size = mesh.world, mesh.ranks.rank, mesh.ranks.size

    def damaged() -> Tensor:
        raise CheckpointError("weights: must be whole, got half.")

    def foreign() -> Tensor:
        raise KeyError("lost")

    with pytest.raises(CheckpointError, match=r"^weights: must be whole, got half\.$"):
        world.first(damaged)
    for turn in (0, size - 1):
        jobs = [damaged if i == turn else lambda: torch.zeros(1) for i in range(size)]
        with pytest.raises(CheckpointError, match="got half"):
            world.spread(jobs, mesh.device)
    with pytest.raises(KeyError if rank == 0 else ClipError, match="lost"):
        world.first(foreign)
    x = torch.arange(5.0)
    world.check_same(x, "x")
    with pytest.raises(ClipError, match=f"x: must be the same on all {size} ranks"):
        world.check_same(x.flip(0) if rank == 1 else x, "x")


# --- exchange --------------------------------------------------------------------------------------


def coded_operands(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, shard: Shard
) -> Operands:
    """8-bit codes with a scale per token and head, and one number per head: three dtypes in one exchange."""
    (q,), (k, v) = (exact := exact_operands(qkv, q_gain, k_gain, cos, sin, shard)).queries, exact.keys
    scale = k.abs().amax(-1).float().clamp_min(1e-9) / 448
    codes = (k / scale[..., None]).to(torch.float8_e4m3fn)
    return Operands((q,), (codes, scale, v.half()), (torch.arange(q.shape[1]).float(),))


def coded_attend(operands: Operands, out: torch.dtype) -> Tensor:
    (q,), (codes, scale, v), (number,) = operands.queries, operands.keys, operands.shared
    assert codes.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and v.dtype == torch.float16
    y = ops.attention(q, (codes.float() * scale[..., None]).to(q.dtype), v.to(q.dtype))
    return (y.float() + number[:, None]).to(out)


def check_exchange(mesh: Mesh) -> None:
    for heads in (1, 2, 4, 6, 8):
        for tokens, dtype in ((mesh.ranks.size, torch.float32), (37, torch.float32), (48, torch.bfloat16)):
            check_attention(mesh.context, heads, tokens, dtype, exact_operands, exact_attend)
    check_attention(mesh.context, 6, 37, torch.bfloat16, coded_operands, coded_attend)


def packed_projection(heads: int, tokens: int, K: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(heads)
    qkv = torch.randn(tokens, 3 * heads * K, generator=g).to(dtype)
    angles = torch.randn(tokens, K // 2, generator=g)
    return qkv, *torch.randn(2, K, generator=g), angles.cos(), angles.sin()


def check_attention(
    group: Group, heads: int, tokens: int, dtype: torch.dtype, produce: Produce, attend: Attend
) -> None:
    shard, (qkv, *rest) = Shard(group, tokens), packed_projection(heads, tokens, 8, dtype)
    whole = attend(produce(qkv, *rest, Shard(ALONE, tokens)), dtype).flatten(1)
    if produce is exact_operands:
        assert torch.equal(whole, exact(qkv, *rest, 0))
    outputs = []
    for parts in (1, 2, 3):
        own = Exchanged(group, produce, attend, parts)(shard.split(qkv), *rest, 0)
        assert own.dtype == dtype
        outputs.append(shard.join(own))
    assert all(torch.equal(output, outputs[0]) for output in outputs), (heads, tokens)
    # Ranks that share the queries of a head have other row counts in their products, and may round otherwise.
    bound = 0.0 if Grid(heads, shard).rows == 1 else 2 * torch.finfo(dtype).eps
    assert (outputs[0] - whole).abs().max() <= bound * whole.abs().max(), (heads, tokens)


# --- network and sampler ---------------------------------------------------------------------------

HEAD_WIDTH = 16
SIZES = dict(blocks=4, control_every=2, adaln_rank=8, text_width=16, text_dim=24, text_tokens=5)


@dataclass(frozen=True)
class Case:
    """A clip of the smallest networks: 3 latent frames of 3 x 5 tokens, 45 in all."""

    heads: int = 4
    kind: str = "single"
    known: int = 0
    is_mapped: bool = False
    is_guided: bool = False
    guidance: float = 3.0
    grid: tuple[int, int, int] = (3, 6, 10)
    config: NetworkConfig = field(init=False)

    def __post_init__(self) -> None:
        changes: dict[str, Any] = {
            "single": {"image_width": 12, "image_tokens": 3},
            "multi": {"branches": 4},
        }.get(self.kind, {"timestep_scale": 1.0})
        sizes = SIZES | {"heads": self.heads, "width": self.heads * HEAD_WIDTH, "image_width": None}
        config = NetworkConfig.tiny(**sizes | changes)
        object.__setattr__(self, "config", config)


CASES = {
    "single": Case(),
    "two heads, an image": Case(heads=2, grid=(1, 8, 8)),
    "six heads, known frame, maps, guide": Case(heads=6, known=1, is_mapped=True, is_guided=True),
    "multi, maps": Case(kind="multi", is_mapped=True),
    "distilled, known frame": Case(kind="distilled", known=1),
    "no guidance": Case(guidance=0.0),
}
STATES = {name: random_state(case.config) for name, case in CASES.items()}


def sampled(name: str, mesh: Mesh) -> Tensor:
    """Latents of a case after two steps."""
    case, g = CASES[name], torch.Generator().manual_seed(3)
    c, grid = case.config, case.grid
    attend = exact if mesh.context.size == 1 else Exchanged(mesh.context)
    with torch.device("meta"):
        network = Network(c, attend, mesh.context)
    network.load_state_dict(checkpoint.to_ours(STATES[name], c, torch.float32), assign=True)
    shape = (1, 16, *grid)
    noise, gt = torch.randn(shape, generator=g), torch.randn(1, 16, case.known, *grid[1:], generator=g)
    texts = torch.randn(2, c.text_tokens, c.text_width, generator=g)
    controls: list[Tensor | None] = list(torch.randn(c.branches, 16, *grid, generator=g))
    if case.kind == "multi":
        controls[1] = None
    maps = torch.rand(c.branches, grid[0], grid[1] // 2, grid[2] // 2, generator=g)
    guide = (
        sampler.Guide(torch.randn(shape, generator=g), torch.rand(grid, generator=g), 0)
        if case.is_guided
        else None
    )
    mask = (torch.arange(grid[0]) < case.known).float()
    known = sampler.Known(gt) if case.known else None
    with torch.inference_mode():
        prompts = [network.read_prompt(text) for text in texts]
        held = network.read_controls(controls, maps if case.is_mapped else [0.7] * c.branches, grid, mask)
        if case.kind == "distilled":
            schedule = sampler.distilled_schedule(2)
            times = sampler.distilled_times(schedule, grid[0], case.known)
            (ctx,) = network.prepare(prompts[:1], held, network.tabulate(times), grid, mask)
            return sampler.sample_distilled(
                Single(network, ctx), noise, schedule, known=known, dtype=torch.float32
            )
        schedule = sampler.base_schedule(2)
        tables = network.tabulate(sampler.base_times(schedule))
        contexts = network.prepare(prompts[: 2 if case.guidance else 1], held, tables, grid, mask)
        pair: sampler.Pair = Pair(network, *contexts)
        if mesh.cfg.size > 1 and len(contexts) > 1:
            pair = Halves(Single(network, contexts[mesh.cfg.rank]), mesh.cfg)
        return sampler.sample(
            pair, noise, schedule, guidance=case.guidance, known=known, guide=guide, dtype=torch.float32
        )


@pytest.fixture(scope="module")
def alone() -> dict[str, np.ndarray]:
    """Latents of every case from one rank."""
    latents = {name: sampled(name, Mesh.alone("cpu")).numpy() for name in CASES}
    assert all(0.5 < x.std() < 50 for x in latents.values())
    return latents


def _timeout_s(group: Group) -> float:
    assert group.handle is not None
    return float(group.handle._get_backend(torch.device("cpu")).options._timeout.total_seconds())


def work(context: int, cfg: int) -> dict[str, np.ndarray]:
    """What a rank does in this file: every check of groups and exchange, then every case."""
    mesh = Mesh.open(Plan(device="cpu", context=context, cfg=cfg), timeout_s=60)
    for group in (mesh.world, mesh.context, mesh.cfg):
        assert group.size == 1 or _timeout_s(group) == 60
    try:
        check_groups(mesh)
        check_exchange(mesh)
        return {name: sampled(name, mesh).numpy() for name in CASES}
    finally:
        mesh.close()


@pytest.mark.parametrize("context, cfg", [(2, 1), (1, 2), (3, 1), (2, 2), (6, 1)], ids=str)
def test_ranks_give_what_one_gives(context: int, cfg: int, alone: dict[str, np.ndarray]) -> None:
    found = ranks.run(context * cfg, work, context, cfg)
    for name, expected in alone.items():
        assert all(np.array_equal(other[name], found[0][name]) for other in found[1:]), (
            f"{name}: ranks differ"
        )
        if context == 1:
            assert np.array_equal(found[0][name], expected), name
        gap = np.abs(found[0][name] - expected).max() / np.abs(expected).max()
        assert gap <= TOLERANCE, f"{name}: {gap:.2e}"
