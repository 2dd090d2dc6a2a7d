"""8-bit linear layers: what the steps promise, the pass over a network, 8-bit files, the proof, and a clip end to end."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tools")]

import published  # noqa: E402
import system  # noqa: E402

from cosmos_fast import checkpoint as ck  # noqa: E402
from cosmos_fast import embedded, ops_linear8, quant, reference, registry, te_linears, testing  # noqa: E402
from cosmos_fast.config import NetworkConfig  # noqa: E402
from cosmos_fast.dispatch import TABLE, use  # noqa: E402
from cosmos_fast.engine import Engine  # noqa: E402
from cosmos_fast.formats import CheckpointError, EnvironmentProblem, Rows  # noqa: E402
from cosmos_fast.fp8_weights import is_computed, is_stored, published_matrices, quantised_rows  # noqa: E402
from cosmos_fast.network import Block, Network  # noqa: E402
from cosmos_fast.network_keys import our_shapes, to_ours, to_published  # noqa: E402
from cosmos_fast.ops import EPS, Pending  # noqa: E402
from cosmos_fast.ops_linear8 import Quantised  # noqa: E402
from cosmos_fast.recipe import Recipe  # noqa: E402
from cosmos_fast.self_attention import SelfAttention  # noqa: E402
from cosmos_fast.self_attention8 import Fp8  # noqa: E402
from cosmos_fast.text import TinyText  # noqa: E402

testing.kernels_from_checkout()
TINY = NetworkConfig.tiny(
    width=64, heads=1, blocks=4, control_every=2, adaln_rank=8, text_width=48, text_dim=32
)
CPU = torch.device("cpu")
HALF_STEP = 2.0**-4
"""Largest relative rounding error of a normal e4m3 code."""


def wide(x: Quantised) -> Tensor:
    return x.codes.double() * x.steps.double()[:, None]


# --- rows ------------------------------------------------------------------------------------------


def test_rows_keep_their_digits_whatever_their_outliers() -> None:
    """The norm as step costs nothing: values down to 1/600 of the rms keep three bits, with an outlier or without."""
    x = torch.randn(4, 2048, generator=torch.Generator().manual_seed(0))
    x[1, 7], x[2] = 40.0 * math.sqrt(2048), x[2] * 1e8
    got = ops_linear8.quantised(x)
    rms = (x.double().norm(dim=1) / math.sqrt(2048))[:, None]
    gap = (wide(got) - x).abs()
    normal = x.abs() > rms / 600
    assert bool((gap[normal] <= (x.abs() * HALF_STEP * 1.0001)[normal]).all())
    assert bool((gap <= rms / 600)[~normal].all()) and normal.float().mean() > 0.98
    torch.testing.assert_close(got.steps, x.norm(dim=1) / 448)


def test_rows_of_zeros_and_rows_that_are_not_finite() -> None:
    x = torch.zeros(3, 32)
    x[1, 4] = math.nan
    got = ops_linear8.quantised(x)
    assert got.steps[0] > 0 and not got.codes[::2].float().any()
    w, w_steps = quantised_rows(torch.randn(16, 32))
    y = ops_linear8.linear(got, w, w_steps)
    assert y[1].isnan().all() and not y[::2].any()


def test_what_is_quantised_stays_as_it_is() -> None:
    once = ops_linear8.quantised(torch.randn(2, 32).bfloat16())
    assert ops_linear8.quantised(once) is once and once.dtype == torch.bfloat16


def test_norm_and_residual_are_those_of_the_wide_op() -> None:
    x, branch, hint = (torch.randn(6, 64).bfloat16() for _ in range(3))
    gate, shift, scale = (torch.randn(2, 64).bfloat16() for _ in range(3))
    pending, rows = Pending(branch, gate, (hint,), torch.full((1, 1), 0.5)), Rows(3)
    total, h = ops_linear8.residual_adaln(x, pending, shift, scale, rows)
    same, exact = reference.residual_adaln(
        x, branch, gate, [hint], torch.full((1, 1), 0.5), shift, scale, 3, 0, EPS, torch.float32
    )
    assert torch.equal(total, same) and h.dtype == torch.bfloat16
    assert testing.rel_error(wide(h), exact) < 0.04
    alone, h = ops_linear8.residual_adaln(x, None, shift, scale, rows)
    assert alone is x
    assert torch.equal(
        h.codes, ops_linear8.quantised(reference.adaln(x, shift, scale, 3, 0, EPS, torch.float32)).codes
    )


def test_the_hidden_step_is_a_bound_and_costs_little() -> None:
    """Cauchy and Schwarz: no code above 448, even where a row of h lies along a row of W; error as with the row's own step."""
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(256, 128, generator=generator) / 8
    x = torch.randn(64, 128, generator=generator)
    x[:32] = w[:32] * torch.linspace(1, 100, 32)[:, None]  # the worst direction
    h, (codes, scale) = ops_linear8.quantised(x), quantised_rows(w)
    hidden = ops_linear8.linear_gelu(h, codes, scale, quant.reach(codes, scale))
    exact = F.gelu(wide(h) @ (codes.double() * scale.double()[:, None]).T)
    assert float(hidden.codes.float().abs().max()) <= 448 and hidden.steps.shape == (64,)
    assert bool((exact.abs() / hidden.steps[:, None] <= 448).all())
    own = ops_linear8.quantised(exact.float())
    assert testing.rel_error(wide(hidden), exact) < 1.1 * testing.rel_error(wide(own), exact)


@pytest.mark.interpret
def test_the_short_gelu_is_within_a_code() -> None:
    from cosmos_fast.kernels.quantise import gelu_fp8

    x = torch.linspace(-8, 8, 4096)[None].contiguous()
    args = x, torch.tensor([8 / 448])
    assert testing.faults("gelu_fp8", gelu_fp8(*args), args) == []


# --- which layers ----------------------------------------------------------------------------------


def test_the_rule_covers_what_meets_every_token_and_nothing_else() -> None:
    layers = {
        name.removesuffix(".weight")
        for name in our_shapes(NetworkConfig.single())
        if name.endswith(".weight")
    }
    leaves = {name.split("blocks.")[1].partition(".")[2] for name in layers if is_computed(name)}
    assert leaves == {"qkv", "attn_out", "cross.q", "cross.image_q", "cross.out", "fc1", "fc2"}
    assert {n.split("blocks.")[1].partition(".")[2] for n in layers if is_stored(n)} == {
        "cross.kv",
        "cross.image_kv",
    }
    wide_layers = {name for name in layers if not is_computed(name) and not is_stored(name)}
    assert {
        "x_embed",
        "text_proj",
        "image_proj",
        "head.linear",
        "control.0.before_proj",
        "control.0.after_proj.3",
    } <= wide_layers
    assert not any(".blocks." in f".{name}" for name in wide_layers)


def test_the_published_network_fits_3_gib() -> None:
    shapes, matrices = ck.published_shapes(NetworkConfig.single()), published_matrices(NetworkConfig.single())
    held = sum(
        math.prod(s) * (1 if n in matrices else 2) + (4 * s[0] if n in matrices else 0)
        for n, s in shapes.items()
    )
    assert held / 2**30 <= 3.0


# --- the pass --------------------------------------------------------------------------------------


def build(state: dict[str, Tensor], linear: str) -> Network:
    with torch.device("meta"):
        network = Network(TINY)
    return quant.loaded(network, state, linear)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return published.random_state(TINY)


def velocity(network: Network) -> Tensor:
    given = published.inputs(TINY, (2, 4, 6), "cpu", torch.bfloat16, steps=12)
    with torch.no_grad():
        return published.bind(network, given)[0](given.z[None], 10)


def test_the_pass_changes_the_layers_and_little_else(weights: dict[str, Tensor]) -> None:
    state = to_ours(weights, TINY, torch.bfloat16)
    exact, eight = build(dict(state), "bf16"), build(handed := dict(state), "fp8")
    assert handed == {}  # what is wide does not outlive its codes
    assert isinstance(eight.blocks[1].fc1, quant.Fp8LinearGelu) and isinstance(eight.head.linear, nn.Linear)
    assert {*exact.state_dict()} == {name for name in eight.state_dict() if not name.endswith("_scale")}
    assert eight.state_dict()["blocks.0.qkv.weight"].dtype == torch.float8_e4m3fn
    error = published.relative_l2(velocity(eight), velocity(exact))
    assert 0.005 < error < 0.06, error  # 0.03: half of it is that of one layer


def test_each_layer_takes_what_the_one_before_gives(weights: dict[str, Tensor]) -> None:
    """Rows are quantised once, by the op that makes them: only attention's results need a kernel of their own.

    And of those not self-attention's where that is in 8 bits, in a network whose layers are, too.
    """
    network = build(to_ours(weights, TINY, torch.bfloat16), "fp8")
    blocks = TINY.blocks + TINY.num_control_blocks
    assert kernels_that_quantise(network) == 2 * blocks  # attn_out and cross.out of every block
    exact, before = network.blocks[0].attend, velocity(network)
    attending(network, Fp8())
    assert kernels_that_quantise(network) == blocks
    assert 1e-4 < published.relative_l2(velocity(network), before) < 0.05
    wide = attending(build(to_ours(weights, TINY, torch.bfloat16), "bf16"), Fp8())
    assert kernels_that_quantise(wide) == 0 and velocity(wide).isfinite().all()
    attending(network, exact)
    assert torch.equal(velocity(network), before)


def attending(network: Network, attend: SelfAttention) -> Network:
    for block in network.modules():
        if isinstance(block, Block):
            block.attend = attend
    return network


def kernels_that_quantise(network: Network) -> int:
    """How often rows are quantised by an op of their own in one velocity."""
    seen: list[str] = []
    op = TABLE["quantise"]

    def counted(x: Tensor) -> Any:
        seen.append("quantise")
        return reference.quantise(x)

    kept, op.candidates = op.candidates, tuple(replace(c, load=lambda: counted) for c in op.candidates[-1:])
    try:
        with use():
            velocity(network)
    finally:
        op.candidates = kept
    return len(seen)


def test_a_file_in_8_bits_gives_the_network_that_quantising_gives(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    state = to_ours(weights, TINY, torch.bfloat16)
    whole = ck.save(tmp_path / "x.safetensors", state, TINY)
    report = ck.convert(whole, tmp_path / "x8.safetensors", model="single", is_8_bit=True)
    assert report.problems == () and report.dtypes["float8_e4m3fn"] == len(published_matrices(TINY))
    again = ck.convert(
        tmp_path / "x8.safetensors", tmp_path / "y8.safetensors", model="single", is_8_bit=True
    )
    assert (tmp_path / "x8.safetensors").read_bytes() == (
        tmp_path / "y8.safetensors"
    ).read_bytes() and not again.problems
    loaded = ck.load_state(tmp_path / "x8.safetensors", model="single")
    assert any("8 bits" in note for note in loaded.notes)
    eight = build(dict(loaded.state), "fp8")
    assert torch.equal(velocity(eight), velocity(build(dict(state), "fp8")))
    for linear in ("bf16", "fp8_te"):
        with pytest.raises(CheckpointError, match="stored in 8 bits.*--recipe fp8"):
            build(dict(loaded.state), linear)


def test_damaged_8_bit_files_are_named(weights: dict[str, Tensor], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    whole = ck.save(tmp_path / "x.safetensors", to_ours(weights, TINY, torch.bfloat16), TINY)
    ck.convert(whole, tmp_path / "x8.safetensors", model="single", is_8_bit=True)
    good, meta = load_file(tmp_path / "x8.safetensors"), {ck.CONFIG_KEY: TINY.to_json()}
    name = "net.blocks.1.mlp.layer1.weight"

    def refused(match: str, **changes: Any) -> None:
        tensors = {k: v for k, v in ({**good} | changes).items() if v is not None}
        save_file(tensors, tmp_path / "bad.safetensors", meta)
        with pytest.raises(CheckpointError, match=match):
            ck.load_state(tmp_path / "bad.safetensors", model="single")
        assert ck.inspect(tmp_path / "bad.safetensors", is_finite_checked=True).problems

    nan = good[name].clone()
    nan.view(torch.uint8)[2, 3] = 0xFF
    refused(r"layer1\.weight' must be finite, got 1 NaN", **{name: nan})
    refused("must be those of the rule, got otherwise: blocks.1.mlp", **{f"{name}_scale": None})
    refused("scales without codes", **{"net.odd.weight_scale": torch.ones(3)})
    refused(r"\(rows,\) fp32 scales", **{f"{name}_scale": torch.ones(3)})
    refused("must be those of the rule", **{name: good[name].bfloat16() * 1, f"{name}_scale": None})


def test_an_8_bit_vae_is_refused(tmp_path: Path) -> None:
    from test_checkpoint_convert import vae_state

    torch.save(vae_state(), tmp_path / "tokenizer.pth")
    with pytest.raises(CheckpointError, match="only a denoiser can be stored in 8 bits"):
        ck.convert(tmp_path / "tokenizer.pth", tmp_path / "x.safetensors", is_8_bit=True)


def test_to_published_still_names_what_an_8_bit_state_is_not(weights: dict[str, Tensor]) -> None:
    state = build(to_ours(weights, TINY, torch.bfloat16), "fp8").state_dict()
    with pytest.raises(CheckpointError, match="unexpected"):
        to_published(state, TINY)


# --- this machine ----------------------------------------------------------------------------------


def test_the_proof_passes_here_and_refuses_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    quant.prove(CPU)
    for op, wrong in (
        ("linear_fp8", lambda a, s, w, t, b, out: reference.linear_fp8(a, s, w, t.flip(0), b, out)),
        ("linear_gelu_fp8", lambda a, s, steps, w, t: reference.linear_gelu_fp8(a, s, steps * 1.1, w, t)),
    ):
        monkeypatch.setattr(
            TABLE[op],
            "candidates",
            tuple(replace(c, load=lambda f=wrong: f) for c in TABLE[op].candidates[-1:]),
        )
        with (
            use(),
            pytest.raises(EnvironmentProblem, match=f"{op}: reference must agree with fp64.*recipe exact"),
        ):
            quant.prove(CPU)
        monkeypatch.undo()
    with use():
        quant.prove(CPU)


def test_a_gpu_without_8_bit_products_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An A100 would otherwise run the reference."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    with (
        use(),
        pytest.raises(EnvironmentProblem, match=r"linear_fp8: needs a GPU of compute capability 8\.9"),
    ):
        quant.prove(torch.device("cuda"))


def test_transformer_engine_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EnvironmentProblem, match="fp8_te: needs a CUDA device, got cpu"):
        te_linears.engine(CPU)
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(EnvironmentProblem, match=r"needs the package transformer_engine.*Install"):
        te_linears.engine(torch.device("cuda"))


# --- a clip ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("fp8")
    return system.make_models(folder / "models"), system.clip_of(folder / "in.mp4", 5)


def test_a_clip_from_the_command_line(clip: tuple[Path, Path], tmp_path: Path) -> None:
    models, source = clip
    request = system.write_spec(tmp_path, "street", source)
    out = tmp_path / "out"
    run = system.call(
        "generate", request, "-o", out, "--checkpoint", models, "--recipe", "fp8", "--device", "cpu"
    )
    assert run.code == 0, run.err
    assert '"linear": "fp8"' in (out / "street.json").read_text() and (out / "street.mp4").stat().st_size > 0


def test_the_embedded_networks_take_it() -> None:
    """Outliers and all of real weights: the error of one call stays near that of its layers."""
    given = None
    found = {}
    for linear in ("bf16", "fp8"):
        engine_config, state = embedded.state("edge")
        with torch.device("meta"):
            network = Network(engine_config)
        network = quant.loaded(network, to_ours(state, engine_config, torch.bfloat16), linear)
        given = given or published.inputs(engine_config, (3, 12, 20), "cpu", torch.bfloat16)
        with torch.no_grad():
            found[linear] = published.bind(network, given)[0](given.z[None], 10)
    assert published.relative_l2(found["fp8"], found["bf16"]) < 0.05


def test_the_recipe_is_one_of_bf16() -> None:
    assert Recipe.fp8().linear == "fp8" and Recipe.fp8().dtype == "bf16"
    with pytest.raises(ValueError, match="linear must be bf16 where dtype is fp32"):
        Recipe(dtype="fp32", linear="fp8")


def test_the_engine_needs_a_checkpoint_of_the_recipes_bits(clip: tuple[Path, Path], tmp_path: Path) -> None:
    models, _ = clip
    edge = registry.resolve(models)["edge"]
    ck.convert(edge, tmp_path / "e.safetensors", model="single", is_8_bit=True)
    with pytest.raises(CheckpointError, match="stored in 8 bits"):
        Engine(
            tmp_path / "e.safetensors",
            model="edge",
            vae=models / "tokenizer.pth",
            text=TinyText.load(models / "text.safetensors"),
        )
