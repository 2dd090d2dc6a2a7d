"""The denoiser's weights: published names and shapes, packing, what is refused, and the four-file assembly."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cosmos_fast import checkpoint as ck
from cosmos_fast.config import NetworkConfig, published_shapes
from cosmos_fast.formats import CONTROLS, CheckpointError
from cosmos_fast.network_keys import looks_like

SMALL = NetworkConfig.tiny(
    width=32, heads=2, blocks=4, control_every=2, adaln_rank=4, text_width=12, text_dim=16, image_width=10,
    text_tokens=512, image_tokens=256,
)  # fmt: skip
NO_IMAGE = replace(SMALL, image_width=None)
MULTI = replace(SMALL, image_width=None, branches=4)
DISTILLED_NAME = "41f07f13-f2e4-4e34-ba4c-86f595acbc20_ema_bf16.pt"


def random_state(config: NetworkConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).bfloat16()
        for name, shape in published_shapes(config).items()
    }


def save_pt(path: Path, state, **more) -> Path:
    torch.save({**{f"net.{name}": t for name, t in state.items()}, **more}, path)
    return path


def assert_same(left, right) -> None:
    assert set(left) == set(right)
    assert all(
        torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left
    )


# ------------------------------------------------------------------------------------------ names and shapes


@pytest.mark.parametrize(
    ("config", "tensors", "parameters"),
    [
        (NetworkConfig.single(), 822, 2_763_070_464),
        (NetworkConfig.multi(), 933, 3_254_666_240),
        (NetworkConfig.distilled(), 660, 2_358_047_744),
    ],
)
def test_published_totals(config, tensors, parameters):
    shapes = published_shapes(config)
    assert len(shapes) == tensors
    assert sum(map(math.prod, shapes.values())) == parameters
    ours = ck.our_shapes(config)
    assert sum(map(math.prod, ours.values())) == parameters


def test_published_shapes_by_hand():
    single, multi = published_shapes(NetworkConfig.single()), published_shapes(NetworkConfig.multi())
    assert single["x_embedder.proj.1.weight"] == (2048, 72)
    assert single["t_embedder.1.linear_2.weight"] == (6144, 2048)
    assert single["crossattn_proj.0.weight"] == (1024, 100352)
    assert single["img_context_proj.0.weight"] == (2048, 1152)
    assert single["blocks.27.self_attn.k_norm.weight"] == (128,)
    assert single["blocks.0.cross_attn.v_proj.weight"] == (2048, 1024)
    assert single["blocks.13.cross_attn.k_img.weight"] == (2048, 2048)
    assert single["blocks.5.mlp.layer2.weight"] == (2048, 8192)
    assert single["control_blocks.3.adaln_modulation_mlp.1.weight"] == (256, 2048)
    assert single["control_blocks.3.adaln_modulation_cross_attn.2.weight"] == (6144, 256)
    assert single["control_embedder.proj.1.weight"] == (2048, 520)
    assert single["control_blocks.0.before_proj.bias"] == (2048,)
    assert single["final_layer.adaln_modulation.2.weight"] == (4096, 256)
    assert single["final_layer.linear.weight"] == (64, 2048)
    assert "control_blocks.1.before_proj.weight" not in single
    assert "control_blocks.4.after_proj.weight" not in single
    assert multi["control_embedder.3.proj.1.weight"] == (2048, 520)
    assert multi["control_blocks_2.3.after_proj.weight"] == (2048, 2048)
    assert not any("img" in name for name in multi)


@pytest.mark.parametrize("config", [SMALL, NO_IMAGE, MULTI, replace(SMALL, blocks=5)])
def test_packing_is_a_bijection(config):
    published = random_state(config)
    entries = ck.layout(config)
    assert sorted(entry.published for entry in entries) == sorted(published)
    places = {(entry.ours, entry.part) for entry in entries}
    assert len(places) == len(entries)
    assert all((e.part is None) == (e.parts == 1) for e in entries)
    ours = ck.to_ours(published, config)
    assert {name: tuple(t.shape) for name, t in ours.items()} == ck.our_shapes(config)
    assert_same(ck.to_published(ours, config), published)


def test_packing_order():
    state = random_state(SMALL)
    ours = ck.to_ours(state, SMALL, torch.float32)
    d = SMALL.width
    attention, cross = "blocks.1.self_attn.", "control_blocks.1.cross_attn."
    for part, name in enumerate("qkv"):
        piece = ours["blocks.1.qkv.weight"][part * d : (part + 1) * d]
        assert torch.equal(piece, state[f"{attention}{name}_proj.weight"].float())
    assert torch.equal(
        ours["control.0.blocks.1.cross.image_kv.weight"][d:], state[f"{cross}v_img.weight"].float()
    )
    for part, name in enumerate(("self_attn", "cross_attn", "mlp")):
        for ours_name, number in (("down", 1), ("up", 2)):
            theirs = state[f"blocks.3.adaln_modulation_{name}.{number}.weight"]
            assert torch.equal(ours[f"blocks.3.mod.{ours_name}"][part], theirs.float())
    assert torch.equal(ours["control.0.after_proj.1.bias"], state["control_blocks.1.after_proj.bias"].float())


def test_config_is_read_from_shapes():
    for config in (SMALL, NO_IMAGE, MULTI, NetworkConfig.single(), NetworkConfig.multi()):
        assert ck.infer_config(published_shapes(config)) == config
    shapes = published_shapes(NetworkConfig.distilled())
    assert ck.infer_config(shapes, model="distilled") == NetworkConfig.distilled()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 2050}, "multiple of heads"),
        ({"heads": 2048}, "at least 6"),
        ({"blocks": 0}, "blocks must be a positive integer"),
        ({"branches": 2}, "branches must be 1 or 4"),
        ({"branches": 4}, "no image context"),
        ({"control_every": 29}, "must not exceed blocks"),
        ({"timestep_scale": 0}, "positive number"),
    ],
)
def test_config_refuses_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(NetworkConfig.single(), **changes)


def test_config_as_json():
    assert NetworkConfig.from_json(MULTI.to_json()) == MULTI
    for text, message in (
        ("{", "expected JSON"),
        ("[]", "JSON object"),
        ('{"depth": 3}', "unknown keys depth"),
    ):
        with pytest.raises(ValueError, match=message):
            NetworkConfig.from_json(text)


# -------------------------------------------------------------------------------------------------- loading


def test_load_from_every_container(tmp_path):
    state = random_state(SMALL)
    expected = ck.to_ours(state, SMALL)
    save_pt(
        tmp_path / "a.pt",
        state,
        **{
            "net.accum_iteration": torch.tensor(3),
            "net.pos_embedder.seq": torch.zeros(128),
            "net.blocks.0.self_attn.q_norm._extra_state": io.BytesIO(b"x"),
            "net.t_embedding_norm._extra_state": torch.empty(0, dtype=torch.uint8),
        },
    )
    save_file({f"net_ema.{k}": t for k, t in state.items()}, tmp_path / "b.safetensors")
    save_file(state, tmp_path / "c.safetensors")
    for name in ("a.pt", "b.safetensors", "c.safetensors"):
        config, ours, notes = ck.load_state(tmp_path / name)
        assert (config, notes) == (SMALL, ())
        assert_same(ours, expected)
    assert len(ck.inspect(tmp_path / "a.pt").ignored) == 4
    half = ck.load_state(tmp_path / "a.pt", dtype=torch.float32).state
    assert all(t.dtype == torch.float32 for t in half.values())


def test_averaged_weights_are_preferred(tmp_path):
    import torch.distributed.checkpoint as dcp

    state = random_state(SMALL)
    raw = {f"net.{k}": t + 1 for k, t in state.items()}
    critic = {f"net_fake_score.{k}": t + 2 for k, t in state.items()}
    averaged = {f"net_ema.{k}": t.float() for k, t in state.items()}
    with pytest.warns(UserWarning):
        dcp.save(raw | averaged | critic, checkpoint_id=tmp_path / "iter_000000010" / "model", no_dist=True)
    assert_same(ck.load_state(tmp_path / "iter_000000010").state, ck.to_ours(state, SMALL))


def test_loaded_tensors_do_not_follow_the_file(tmp_path):
    state = random_state(SMALL)
    save_file(state, tmp_path / "x.safetensors")
    ours = ck.load_state(tmp_path / "x.safetensors").state
    with (tmp_path / "x.safetensors").open("r+b") as file:
        file.seek(-4096, io.SEEK_END)
        file.write(bytes(4096))
    assert_same(ours, ck.to_ours(state, SMALL))


def test_small_model_carries_its_config(tmp_path):
    config = replace(NO_IMAGE, text_tokens=9, timestep_scale=1.0)
    state = ck.to_ours(random_state(config), config)
    path = ck.save(tmp_path / "x.safetensors", state, config, {"who": "us"})
    loaded = ck.load_state(path)
    assert loaded.config == config
    assert_same(loaded.state, state)
    assert_same({k.removeprefix("net."): t for k, t in load_file(path).items()}, random_state(config))
    assert ck.inspect(path).kind == "distilled"


def test_time_scale_is_never_guessed(tmp_path):
    state = random_state(NO_IMAGE)
    unnamed, named = save_pt(tmp_path / "x.pt", state), save_pt(tmp_path / DISTILLED_NAME, state)
    with pytest.raises(CheckpointError, match="may be the distilled one"):
        ck.load_state(unnamed)
    assert ck.load_state(unnamed, model="single").config.timestep_scale == 0.001
    assert ck.load_state(unnamed, model="distilled").config.timestep_scale == 1.0
    assert ck.load_state(named).config.timestep_scale == 1.0
    assert ck.load_state(unnamed, NO_IMAGE).config == NO_IMAGE
    with pytest.raises(CheckpointError, match="is the distilled network, got model 'single'"):
        ck.load_state(named, model="single")
    with pytest.raises(CheckpointError, match="is not the distilled network"):
        ck.load_state(save_pt(tmp_path / "image.pt", random_state(SMALL)), model="distilled")
    with pytest.raises(CheckpointError, match="must be 'single' or 'distilled'"):
        ck.load_state(unnamed, model="edge")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("blocks.2.mlp.layer1.weight"), r"1 tensors missing: blocks\.2\.mlp\.layer1\.weight"),
        (lambda s: s.update({"blocks.0.odd.weight": torch.ones(1)}), r"unexpected: blocks\.0\.odd\.weight"),
        (
            lambda s: s.update({"blocks.3.self_attn.q_proj.weight": torch.ones(32, 31)}),
            r"another shape: blocks\.3\.self_attn\.q_proj\.weight \[32, 31\] instead of \[32, 32\]",
        ),
        (lambda s: s["x_embedder.proj.1.weight"].view(-1)[7:8].fill_(math.nan), r"x_embedder.*1 NaN"),
        (
            lambda s: s["control_blocks.0.after_proj.bias"][:2].fill_(math.inf),
            r"after_proj\.bias.*2 NaN or inf",
        ),
        (lambda s: s.update({"t_embedding_norm.weight": torch.ones(32, dtype=torch.int8)}), "bf16.*got int8"),
        (lambda s: [s.pop(k) for k in list(s) if ".q_norm." in k], "12 tensors missing.*, \\.\\.\\."),
        (
            lambda s: [s.pop(k) for k in list(s) if k.startswith("control_")],
            "Predict2.5 network without a control",
        ),
    ],
)
def test_unfit_tensors_are_named(tmp_path, spoil, message):
    state = random_state(SMALL)
    spoil(state)
    path = save_pt(tmp_path / "x.pt", state)
    with pytest.raises(CheckpointError, match=message) as error:
        ck.load_state(path, SMALL)
    assert str(path) in str(error.value)
    assert ck.inspect(path, is_finite_checked=True).problems


def test_large_but_finite_values_pass(tmp_path):
    """Their sum overflows fp32, which alone must not condemn them."""
    state = {k: t.float() for k, t in random_state(SMALL).items()}
    state["final_layer.linear.weight"].fill_(3e38)
    assert (
        ck.load_state(save_pt(tmp_path / "x.pt", state), dtype=None).state["head.linear.weight"].max() == 3e38
    )


def test_wrong_kind_for_the_config(tmp_path):
    multi, single = tmp_path / "m.pt", tmp_path / "s.pt"
    save_pt(multi, random_state(MULTI)), save_pt(single, random_state(SMALL))
    for path, config, message in (
        (multi, NO_IMAGE, "looks like a multi-control"),
        (single, MULTI, "looks like a single-control"),
        (single, NO_IMAGE, "looks like a network with image context"),
    ):
        with pytest.raises(CheckpointError, match=message):
            ck.load_state(path, config)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("encoder.downsamples.0.residual.2.weight", "video VAE"),
        ("blocks.0.self_attn.q_proj.lora_A.weight", "LoRA"),
        ("model.layers.0.mlp.up_proj.weight", "text encoder"),
        ("vision_model.head.weight", "image or text encoder"),
        ("view_embeddings.weight", "multiview"),
        ("transformer_blocks.0.attn1.to_q.weight", "diffusers transformer alone"),
        ("x_embedder.proj.1.weight", "Predict2.5"),
        ("something", "another model"),
    ],
)
def test_other_models_are_recognised(tmp_path, name, words):
    save_file({name: torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=words):
        ck.load_state(tmp_path / "x.safetensors")
    assert looks_like(published_shapes(SMALL)) == ""


# --------------------------------------------------------------------------------------- four-file assembly


def four_files(folder: Path) -> dict[str, Path]:
    base = random_state(SMALL, 0)
    paths = {}
    for j, control in enumerate(CONTROLS):
        own = random_state(SMALL, 10 + j)
        state = {k: own[k] if k.startswith("control_") or "img" in k else t for k, t in base.items()}
        paths[control] = save_pt(folder / f"{control}.pt", state)
    return paths


def test_assembly(tmp_path):
    paths = four_files(tmp_path)
    config, ours, notes = ck.load_state(dict(reversed(paths.items())))
    assert config == MULTI
    assert_same({k: t for k, t in ours.items() if "control" not in k}, {
        k: t for k, t in ck.to_ours(random_state(SMALL), SMALL).items() if "control" not in k and "image" not in k
    })  # fmt: skip
    for j in range(4):
        theirs = random_state(SMALL, 10 + j)
        assert torch.equal(ours[f"control.{j}.embed.weight"], theirs["control_embedder.proj.1.weight"])
        assert torch.equal(
            ours[f"control.{j}.after_proj.1.weight"], theirs["control_blocks.1.after_proj.weight"]
        )
    assert len(notes) == 1 and "image-context weights of edge, vis, depth, seg" in notes[0]


def test_assembly_takes_the_base_of_seg_and_says_so(tmp_path):
    paths = four_files(tmp_path)
    name = "blocks.1.mlp.layer2.weight"
    state = {k.removeprefix("net."): t for k, t in torch.load(paths["vis"]).items()}
    state[name][0, 0] += 1
    save_pt(paths["vis"], state)
    config, ours, notes = ck.load_state(paths)
    assert torch.equal(ours["blocks.1.fc2.weight"], random_state(SMALL)[name])
    assert f"1 base tensors of vis differ from seg's, which are used: {name}" in notes[0]


def test_assembly_refuses(tmp_path):
    paths = four_files(tmp_path)
    with pytest.raises(
        CheckpointError, match="one checkpoint for each of edge, vis, depth, seg, got edge, vis"
    ):
        ck.load_state({key: paths[key] for key in ("edge", "vis")})
    assert ck.load_state({"vis": paths["vis"]}).config == SMALL
    wider = replace(SMALL, text_width=20)
    with pytest.raises(CheckpointError, match="equal sizes, got others in depth"):
        ck.load_state({**paths, "depth": save_pt(tmp_path / "wide.pt", random_state(wider))})
    with pytest.raises(CheckpointError, match="edge must be a single-control network, got a multi-control"):
        ck.load_state({**paths, "edge": save_pt(tmp_path / "m.pt", random_state(MULTI))})
    with pytest.raises(CheckpointError, match="got the distilled"):
        ck.load_state({**paths, "edge": save_pt(tmp_path / DISTILLED_NAME, random_state(NO_IMAGE))})
