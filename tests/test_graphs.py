"""Graphed networks: every step, bit for bit what the eager call gives, from one capture."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from oracle import random_state

from cosmos_fast import checkpoint
from cosmos_fast.config import NetworkConfig
from cosmos_fast.formats import EnvironmentProblem
from cosmos_fast.graphs import Captured, Graphed, pays
from cosmos_fast.network import Network, Pair, Single

GRID = (2, 4, 6)
CONFIG = NetworkConfig.tiny(
    width=64, heads=2, blocks=2, control_every=1, adaln_rank=8, text_width=16, text_dim=16
)


def bind(device="cpu", dtype=torch.float32, config=CONFIG, grid=GRID) -> Pair:
    with torch.device("meta"):
        network = Network(config)
    network.load_state_dict(checkpoint.to_ours(random_state(config), config, dtype, device), assign=True)
    network.eval().requires_grad_(False)
    text = torch.randn(2, config.text_tokens, config.text_width).to(device, dtype)
    mask = torch.zeros(grid[0], device=device, dtype=dtype)
    held = network.read_controls([torch.randn(16, *grid)], [1.0], grid, mask)
    tables = network.tabulate(torch.tensor([[900], [500], [100]]))
    return Pair(network, *network.prepare([network.read_prompt(t) for t in text], held, tables, grid, mask))


def rerunning(log: list[int]):
    """A capture for the CPU: a replay runs the recorded call again and writes into the recorded outputs."""

    def capture(call):
        outputs = call()
        as_tuple = (lambda o: o) if isinstance(outputs, tuple) else (lambda o: (o,))

        def replay() -> None:
            log.append(1)
            for kept, new in zip(as_tuple(outputs), as_tuple(call()), strict=True):
                if kept is not None:
                    kept.copy_(new)

        return Captured(outputs, replay, 123)

    return capture


def latent(seed: int, device="cpu", dtype=torch.float32, grid=GRID):
    return torch.randn(1, 16, *grid, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def test_one_capture_serves_every_step_bitwise() -> None:
    pair, log = bind(), []
    graphed = Graphed(pair, rerunning(log))
    assert (graphed.captures, graphed.pool_bytes) == (0, 0)
    for replays, step in enumerate((2, 0, 1, 0), start=1):
        z = latent(step + 10 * replays)
        assert all(map(torch.equal, graphed(z, step), pair(z, step)))
        assert len(log) == replays
    assert (graphed.captures, graphed.pool_bytes) == (1, 123) and graphed.capture_s > 0


def test_results_outlive_the_next_call() -> None:
    graphed = Graphed(bind(), rerunning([]))
    kept = graphed(latent(1), 0)
    before = [v.clone() for v in kept]
    graphed(latent(2), 1)
    assert all(map(torch.equal, kept, before))


def test_single_and_unguided_pair() -> None:
    pair, z = bind(), latent(3)
    single = Single(pair.network, pair.cond)
    assert torch.equal(Graphed(single, rerunning([]))(z, 1), single(z, 1))
    alone = Pair(pair.network, pair.cond)
    v, nothing = Graphed(alone, rerunning([]))(z, 1)
    assert nothing is None and torch.equal(v, alone(z, 1)[0])


def test_leaves_the_bound_network_alone() -> None:
    pair = bind()
    before = [mod.table.clone() for mod in pair.cond.tables.blocks]
    Graphed(pair, rerunning([]))(latent(4), 2)
    assert all(torch.equal(m.table, t) for m, t in zip(pair.cond.tables.blocks, before, strict=True))
    assert pair.cond.tables.head.shape[0] == 3


def test_refusals() -> None:
    pair = bind()
    with pytest.raises(EnvironmentProblem, match="graphs: need a CUDA device, got cpu"):
        Graphed(pair)
    shared = SimpleNamespace(network=SimpleNamespace(ranks=SimpleNamespace(size=2)), ctx=pair.cond)
    with pytest.raises(EnvironmentProblem, match="graphs: ranks must not share tokens, got 2"):
        Graphed(shared, rerunning([]))
    graphed = Graphed(pair, rerunning([]))
    graphed(latent(1), 0)
    with pytest.raises(ValueError, match="latent must stay"):
        graphed(latent(1, grid=(1, 4, 6)), 0)
    with pytest.raises(ValueError, match="latent must stay"):
        graphed(latent(1, dtype=torch.float64), 0)
    for step in (-1, 3):
        with pytest.raises(ValueError, match=r"step must be in 0\.\.2"):
            graphed(latent(1), step)


@pytest.mark.parametrize(
    ("device", "tokens", "steps", "ranks", "expected"),
    [
        ("cuda", 3520, 35, 1, True),  # a picture at 720p
        ("cuda", 84480, 35, 1, False),  # a clip
        ("cuda", 3520, 4, 1, False),  # the few-step model: over before it pays
        ("cuda", 1760, 35, 2, False),  # exchanges are not recorded
        ("cpu", 3520, 35, 1, False),
    ],
)
def test_where_graphs_pay(device: str, tokens: int, steps: int, ranks: int, expected: bool) -> None:
    head = SimpleNamespace(shape=(steps, 1), device=torch.device(device))
    ctx = SimpleNamespace(tables=SimpleNamespace(head=head), cos=torch.empty(tokens, 1, device="meta"))
    assert pays(Single(SimpleNamespace(ranks=SimpleNamespace(size=ranks)), ctx)) is expected


@pytest.mark.gpu
@pytest.mark.parametrize("grid", [(1, 16, 16), (4, 16, 24)])
def test_cuda_graph_equals_eager_bitwise(device, grid) -> None:
    pair = bind(device, torch.bfloat16, NetworkConfig.tiny(), grid)
    graphed = Graphed(pair)
    for replays, step in enumerate((2, 0, 1), start=1):
        z = latent(replays, device, torch.bfloat16, grid)
        assert all(map(torch.equal, graphed(z, step), pair(z, step)))
    assert graphed.captures == 1 and graphed.pool_bytes > 0
