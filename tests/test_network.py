"""The network against diffusers (same weights, fp32), and the exactness of what is hoisted and shared."""

from __future__ import annotations

import pytest
import torch
from oracle import Oracle, random_state

from cosmos_fast import checkpoint, ops
from cosmos_fast.config import NetworkConfig
from cosmos_fast.formats import Rows
from cosmos_fast.linears import linear
from cosmos_fast.network import Network, Pair, Single, TextImageKeys, TextKeys

GRID = (3, 8, 12)
TOLERANCE = 1e-4
"""Max absolute difference in fp32, on outputs of size about 5."""

SIZES = dict(
    width=128, heads=2, blocks=8, control_every=4, adaln_rank=16, text_width=48, text_dim=64, text_tokens=9
)
KINDS = {
    "single": NetworkConfig.tiny(**SIZES, image_width=24, image_tokens=7),
    "distilled": NetworkConfig.tiny(**SIZES, image_width=None, timestep_scale=1.0),
    "multi": NetworkConfig.tiny(**SIZES, image_width=None, branches=4),
}


def build(
    config: NetworkConfig, state: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32
) -> Network:
    with torch.device("meta"):
        network = Network(config)
    network.load_state_dict(checkpoint.to_ours(state, config, dtype), assign=True, strict=True)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def models():
    return {kind: (build(c, s := random_state(c)), Oracle(c, s)) for kind, c in KINDS.items()}


def inputs(config: NetworkConfig, grid=GRID, seed: int = 1):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(16, *grid, generator=g)
    text = torch.randn(config.text_tokens, config.text_width, generator=g)
    image = torch.randn(config.image_tokens, config.image_width or 1, generator=g)
    controls = [torch.randn(16, *grid, generator=g) for _ in range(config.branches)]
    return z, text, image, controls


def context(network, text, image, controls, weights, times, grid=GRID, mask=None, step_times=None):
    mask = torch.zeros(grid[0]) if mask is None else mask
    prompt = network.read_prompt(text, image)
    held = network.read_controls(controls, weights, grid, mask)
    return network.prepare([prompt], held, network.tabulate(times), grid, mask, rounded_rope=False)[0]


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert 2 < theirs.abs().max() < 60
    assert (ours - theirs).abs().max() <= TOLERANCE


@pytest.mark.parametrize("with_image", [True, False])
@pytest.mark.parametrize("known", [0, 1])
def test_single(models, with_image, known):
    network, oracle = models["single"]
    z, text, image, controls = inputs(network.config)
    mask = (torch.arange(GRID[0]) < known).float()
    times = torch.tensor([[999], [437]])
    ctx = context(network, text, image if with_image else None, controls, [1.0], times, mask=mask)
    shown = image if with_image else torch.zeros_like(image)
    for step in range(2):
        theirs = oracle(z, times[step] * 0.001, text, shown, controls, [1.0], mask)
        assert_close(network(z, step, ctx), theirs)


def test_single_weight_is_rounded_to_bf16_and_zero_control_still_speaks(models):
    network, oracle = models["single"]
    z, text, image, controls = inputs(network.config)
    times = torch.tensor([[500]])
    ctx = context(network, text, image, controls, [0.3], times)
    theirs = oracle(z, times[0] * 0.001, text, image, controls, [0.30078125], torch.zeros(GRID[0]))
    assert_close(network(z, 0, ctx), theirs)
    ctx = context(network, text, image, [None], [1.0], times)
    theirs = oracle(z, times[0] * 0.001, text, image, [None], [1.0], torch.zeros(GRID[0]))
    assert_close(network(z, 0, ctx), theirs)


def test_weight_map(models):
    network, oracle = models["single"]
    z, text, image, controls = inputs(network.config)
    maps = torch.rand(1, GRID[0], GRID[1] // 2, GRID[2] // 2)
    times = torch.tensor([[500]])
    ctx = context(network, text, image, controls, maps, times)
    assert_close(
        network(z, 0, ctx), oracle(z, times[0] * 0.001, text, image, controls, maps, torch.zeros(GRID[0]))
    )


def test_one_frame(models):
    network, oracle = models["single"]
    grid = (1, 8, 12)
    z, text, image, controls = inputs(network.config, grid)
    times = torch.tensor([[700]])
    ctx = context(network, text, image, controls, [1.0], times, grid)
    assert_close(
        network(z, 0, ctx), oracle(z, times[0] * 0.001, text, image, controls, [1.0], torch.zeros(1))
    )


def test_per_frame_times(models):
    network, oracle = models["distilled"]
    z, text, _, controls = inputs(network.config)
    times = torch.tensor([[1e-4, 0.83, 0.83]])
    ctx = context(network, text, None, controls, [1.0], times, mask=torch.tensor([1.0, 0, 0]))
    theirs = oracle(z, times[0], text, None, controls, [1.0], torch.tensor([1.0, 0, 0]))
    assert_close(network(z, 0, ctx), theirs)


@pytest.mark.parametrize("active", [(0, 1, 2, 3), (0, 2), (3,)])
def test_multi(models, active):
    network, oracle = models["multi"]
    z, text, _, controls = inputs(network.config)
    given = [c if j in active else None for j, c in enumerate(controls)]
    weights, times = [1.0, 0.3, 0.7, 1.0], torch.tensor([[812]])
    ctx = context(network, text, None, given, weights, times)
    assert ctx.controls.branches == active
    theirs = oracle(z, times[0] * 0.001, text, None, given, weights, torch.zeros(GRID[0]))
    assert_close(network(z, 0, ctx), theirs)


def test_multi_with_maps(models):
    network, oracle = models["multi"]
    z, text, _, controls = inputs(network.config)
    maps, times = torch.rand(4, GRID[0], GRID[1] // 2, GRID[2] // 2), torch.tensor([[812]])
    ctx = context(network, text, None, controls, maps, times)
    theirs = oracle(z, times[0] * 0.001, text, None, controls, maps, torch.zeros(GRID[0]))
    assert_close(network(z, 0, ctx), theirs)


def test_multi_leaves_out_a_control_of_weight_zero(models):
    network, _ = models["multi"]
    z, text, _, controls = inputs(network.config)
    times = torch.tensor([[812]])
    without = context(network, text, None, [controls[0], None, None, None], [1.0, 0, 0, 0], times)
    zeroed = context(network, text, None, controls, [1.0, 0.0, 0.0, 0.0], times)
    assert zeroed.controls.branches == (0,)
    assert torch.equal(network(z, 0, without), network(z, 0, zeroed))


def test_folded_image_equals_attending_to_zero_features(models):
    """The constant that replaces image attention is what attending to 256 equal tokens gives."""
    network, _ = models["single"]
    z, text, image, controls = inputs(network.config)
    times = torch.tensor([[500]])
    folded = context(network, text, None, controls, [1.0], times)
    full = context(network, text, torch.zeros_like(image), controls, [1.0], times)
    assert type(folded.prompt.blocks[0]) is TextKeys and type(full.prompt.blocks[0]) is TextImageKeys
    torch.testing.assert_close(network(z, 0, folded), network(z, 0, full), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_pair_shares_block_zero_exactly(models, kind, monkeypatch):
    """Both prompts see one self-attention of block 0, bit for bit what each would compute alone."""
    network, _ = models[kind]
    z, text, _, controls = inputs(network.config)
    times, mask = torch.tensor([[500]]), torch.zeros(GRID[0])
    prompts = [network.read_prompt(text), network.read_prompt(-text)]
    held = network.read_controls(controls, [1.0] * len(controls), GRID, mask)
    cond, uncond = network.prepare(prompts, held, network.tabulate(times), GRID, mask)
    alone = Single(network, cond)(z[None], 0), Single(network, uncond)(z[None], 0)
    calls = []
    original = ops.qk_norm_rope
    monkeypatch.setattr(ops, "qk_norm_rope", lambda *a: calls.append(1) or original(*a))
    both = Pair(network, cond, uncond)(z[None], 0)
    blocks = network.config.blocks + len(controls) * network.config.num_control_blocks
    assert len(calls) == 2 * blocks - (1 + len(controls))
    assert not torch.equal(*both) and all(map(torch.equal, both, alone))


def test_one_gate_for_all_tokens_is_part_of_the_product():
    """No less exact than a rounded product, times its gate, added: both against fp64."""
    layer = linear(48, 32).bfloat16().requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    x, h, gate = (torch.randn(n, d, generator=g).bfloat16() for n, d in ((200, 32), (200, 48), (1, 32)))
    exact = x.double() + gate.double() * (h.double() @ layer.weight.double().T)
    kept, owed = layer.onto(x, h, gate, keep=True)
    assert kept is x and owed is not None
    apart = ops.residual(x, owed, Rows(200))
    settled, nothing = layer.onto(x, h, gate)
    assert nothing is None and settled is x
    errors = [float((y.double() - exact).norm() / exact.norm()) for y in (settled, apart)]
    assert errors[0] <= 1.2 * errors[1] < 4e-3


def test_gates_of_frames_stay_owed():
    layer = linear(48, 32).requires_grad_(False)
    x, h, gate = torch.randn(6, 32), torch.randn(6, 48), torch.randn(3, 32)
    before = x.clone()
    kept, owed = layer.onto(x, h, gate)
    assert kept is x and torch.equal(x, before)
    torch.testing.assert_close(
        ops.residual(x, owed, Rows(2)), x + gate.repeat_interleave(2, 0) * (h @ layer.weight.T)
    )


@pytest.mark.parametrize("kind", ["single", "multi", "distilled"])
def test_blocks_overwrite_nothing_that_is_kept(models, kind):
    """A second call on the same latent, context and stem gives the same."""
    network, _ = models[kind]
    z, text, _, controls = inputs(network.config)
    before = z.clone(), [c.clone() for c in controls]
    ctx = context(network, text, None, controls, [1.0] * len(controls), torch.tensor([[500]]))
    stem = network.stem(z, 0, ctx)
    first = network.body(stem, 0, ctx)
    assert torch.equal(first, network.body(stem, 0, ctx)) and torch.equal(first, network(z, 0, ctx))
    assert torch.equal(z, before[0]) and all(map(torch.equal, controls, before[1]))


def test_rope_exponents_are_rounded_to_bf16(models):
    network, _ = models["single"]
    z, text, image, controls = inputs(network.config)
    times, mask = torch.tensor([[500]]), torch.zeros(GRID[0])
    prompts, tables = [network.read_prompt(text, image)], network.tabulate(times)
    held = network.read_controls(controls, [1.0], GRID, mask)
    rounded = network.prepare(prompts, held, tables, GRID, mask)[0]
    difference = (
        (network(z, 0, rounded) - network(z, 0, context(network, text, image, controls, [1.0], times)))
        .abs()
        .max()
    )
    assert 1e-5 < difference < 1


def test_bf16_stays_near_fp32(models):
    exact, _ = models["single"]
    state = random_state(exact.config)
    network = build(exact.config, state, torch.bfloat16)
    z, text, image, controls = inputs(exact.config)
    times = torch.tensor([[500]])
    theirs = exact(z, 0, context(exact, text, image, controls, [1.0], times))
    half = [c.bfloat16() for c in controls]
    ours = network(z.bfloat16(), 0, context(network, text.bfloat16(), image.bfloat16(), half, [1.0], times))
    assert ours.dtype == torch.float32
    assert (ours - theirs).norm() / theirs.norm() < 0.02


def test_refuses_what_it_cannot_mean(models):
    network, _ = models["distilled"]
    _, text, image, controls = inputs(KINDS["single"])
    with pytest.raises(ValueError, match="image context"):
        network.read_prompt(text, image)
    with pytest.raises(ValueError, match="1 branches, got 2"):
        network.read_controls(controls * 2, [1.0, 1.0], GRID, torch.zeros(3))


@pytest.mark.parametrize(("config", "count"), [
    (NetworkConfig.single(), 822), (NetworkConfig.multi(), 933), (NetworkConfig.distilled(), 660),
])  # fmt: skip
def test_full_size_loads_on_meta(config, count):
    """The published tensors, and nothing else, fill the full-size network."""
    from cosmos_fast.config import published_shapes

    shapes = published_shapes(config)
    assert len(shapes) == count
    with torch.device("meta"):
        network = Network(config)
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
        ours = checkpoint.to_ours(state, config, torch.bfloat16)
    network.load_state_dict(ours, strict=True, assign=True)
    assert sum(p.numel() for p in network.parameters()) == sum(t.numel() for t in state.values())
