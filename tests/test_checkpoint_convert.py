"""Weights across formats: diffusers folders, the VAE, conversion, inspection, and the random-checkpoint tool."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cosmos_fast import checkpoint as ck
from cosmos_fast import registry
from cosmos_fast.config import NetworkConfig, published_shapes
from cosmos_fast.formats import CONTROLS, CheckpointError
from cosmos_fast.network_keys import diffusers_names
from cosmos_fast.vae_keys import VAEConfig, diffusers_vae_keys, vae_layout

SMALL = NetworkConfig.tiny(
    width=32, heads=2, blocks=4, control_every=2, adaln_rank=4, text_width=12, text_dim=16, image_width=10
)
VAE = VAEConfig(base=4)
TOOL = Path(__file__).parents[1] / "tools" / "make_checkpoint.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("make_checkpoint", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small(tool, monkeypatch):
    """The tool at sizes smaller than its own, so that a file takes no time."""
    kinds = {
        "multi": replace(SMALL, image_width=None, branches=4),
        "distilled": replace(SMALL, image_width=None, timestep_scale=1.0),
    }
    monkeypatch.setattr(tool, "config_of", lambda kind, size: kinds.get(kind, SMALL))
    monkeypatch.setattr(tool.VAEConfig, "tiny", classmethod(lambda cls: VAE))
    return tool


def assert_same(left, right) -> None:
    assert set(left) == set(right)
    assert all(
        torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left
    )


# ------------------------------------------------------------------------------------------------ diffusers


def test_folder_made_for_diffusers_fills_its_classes_and_comes_back(small, tmp_path):
    """The real classes accept the folder without a missing or unexpected key, and what they save is read."""
    diffusers = pytest.importorskip("diffusers")
    (made,) = small.make(tmp_path / "made", fmt="diffusers")
    for folder, cls in (
        ("transformer", diffusers.CosmosTransformer3DModel),
        ("controlnet", diffusers.CosmosControlNetModel),
    ):
        model = cls.from_config(cls.load_config(made / folder)).bfloat16()
        model.load_state_dict(load_file(made / folder / "diffusion_pytorch_model.safetensors"), strict=True)
        model.save_pretrained(tmp_path / "saved" / folder, max_shard_size="60KB")
    assert list((tmp_path / "saved" / "transformer").glob("*.index.json"))
    loaded = ck.load_state(tmp_path / "saved", SMALL)
    assert_same(ck.to_published(loaded.state, SMALL), small.random_state(SMALL, 0, "edge"))
    assert ck.load_state(made).config == SMALL
    assert ck.inspect(tmp_path / "saved").problems == ()


def test_diffusers_counts_at_full_size():
    places = [
        (place, math.prod(shape))
        for name, shape in published_shapes(NetworkConfig.single()).items()
        for place in diffusers_names(name)
    ]
    assert len(set(places)) == len(places) == 822 + 8
    sizes = {
        part: sum(n for (where, _), n in places if where == part) for part in ("transformer", "controlnet")
    }
    assert sizes == {"transformer": 2_413_864_960, "controlnet": 471_255_040}


def test_diffusers_folders_that_do_not_fit(small, tmp_path):
    (folder,) = small.make(tmp_path / "x", fmt="diffusers")
    weights = folder / "controlnet" / "diffusion_pytorch_model.safetensors"
    good = load_file(weights)
    save_file({**good, "time_embed.norm.weight": good["time_embed.norm.weight"] + 1}, weights)
    with pytest.raises(CheckpointError, match=r"must agree.*t_embedding_norm\.weight.*different models"):
        ck.load_state(folder)
    save_file({**good, "odd.weight": torch.ones(1)}, weights)
    with pytest.raises(CheckpointError, match=r"unexpected: controlnet/odd\.weight"):
        ck.load_state(folder)
    weights.unlink()
    weights.parent.joinpath("config.json").unlink()
    weights.parent.rmdir()
    with pytest.raises(CheckpointError, match="got transformer/ only"):
        ck.load_state(folder)


# ------------------------------------------------------------------------------------------------------ VAE


def vae_state(config: VAEConfig = VAE) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in vae_layout(config).items()}


def test_vae_from_every_container(tmp_path):
    state = vae_state()
    torch.save(state, tmp_path / "tokenizer.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "x.safetensors")
    theirs = {theirs: state[ours] for theirs, ours in diffusers_vae_keys(VAE).items()}
    (tmp_path / "pipeline" / "vae").mkdir(parents=True)
    save_file(theirs, tmp_path / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors")
    for name in ("tokenizer.pth", "old.pth", "x.safetensors", "pipeline", "pipeline/vae"):
        assert_same(ck.load_vae_state(tmp_path / name, dtype=None), state)
        assert ck.inspect(tmp_path / name).kind == "vae"
    assert {t.dtype for t in ck.load_vae_state(tmp_path / "tokenizer.pth").values()} == {torch.bfloat16}


def test_vae_that_is_none(small, tmp_path):
    network = small.make(tmp_path, with_vae=True)[0]
    with pytest.raises(
        CheckpointError, match=r"must be the Wan 2\.1 video VAE, got a Cosmos-Transfer2\.5 denoiser"
    ):
        ck.load_vae_state(network)
    with pytest.raises(CheckpointError, match="expected a Cosmos-Transfer2.5 network, got a video VAE"):
        ck.load_state(tmp_path / "tokenizer.pth")
    state = vae_state()
    state.pop("decoder.head.2.bias")
    state["encoder.conv1.bias"][0] = math.nan
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=r"missing: decoder\.head\.2\.bias"):
        ck.load_vae_state(tmp_path / "bad.pth")
    torch.save({**state, "decoder.head.2.bias": torch.zeros(3)}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=r"'encoder\.conv1\.bias' must be finite, got 1 NaN"):
        ck.load_vae_state(tmp_path / "bad.pth")


# -------------------------------------------------------------------------------------- convert and inspect


@pytest.mark.parametrize("fmt", ["pt", "diffusers", "safetensors"])
def test_convert(small, tmp_path, fmt):
    source = small.make(tmp_path / "in", fmt=fmt)[0]
    report = ck.convert(source, tmp_path / "out.safetensors", torch.float32)
    assert (report.kind, report.problems, report.dtypes) == ("single", (), {"float32": report.tensors})
    state = load_file(tmp_path / "out.safetensors")
    expected = small.random_state(SMALL, 0, "edge")
    assert_same(state, {f"net.{name}": tensor.float() for name, tensor in expected.items()})
    assert ck.load_state(tmp_path / "out.safetensors").config == SMALL


def test_convert_the_vae(tmp_path):
    torch.save(vae_state(), tmp_path / "tokenizer.pth")
    assert ck.convert(tmp_path / "tokenizer.pth", tmp_path / "tokenizer.safetensors", None).kind == "vae"
    assert_same(load_file(tmp_path / "tokenizer.safetensors"), vae_state())


def test_convert_refuses_and_leaves_nothing(small, tmp_path):
    source = small.make(tmp_path / "in")[0]
    for target in (source, tmp_path, tmp_path / "out.pt"):
        with pytest.raises(CheckpointError, match=r"another file named \*\.safetensors"):
            ck.convert(source, target)
    state = torch.load(source)
    state["net.blocks.0.mlp.layer1.weight"][3, 4] = math.inf
    torch.save(state, source)
    with pytest.raises(CheckpointError, match=r"layer1\.weight' must be finite"):
        ck.convert(source, tmp_path / "out.safetensors")
    torch.save({**state, "net.evil": print}, source)
    with pytest.raises(CheckpointError, match="print"):
        ck.convert(source, tmp_path / "out.safetensors")
    assert not list(tmp_path.glob("out*"))


def test_inspect(small, tmp_path):
    path = small.make(tmp_path)[0]
    report = ck.inspect(path)
    shapes = published_shapes(SMALL)
    assert (report.format, report.kind, report.config, report.problems) == ("pt", "single", SMALL, ())
    assert (report.tensors, report.parameters) == (len(shapes), sum(map(math.prod, shapes.values())))
    assert report.dtypes == {"bfloat16": len(shapes)}
    assert len(report.ignored) == 7
    (tmp_path / "text.pt").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "Git-LFS" in ck.inspect(tmp_path / "text.pt").problems[0]
    assert "no such file" in ck.inspect(tmp_path / "absent.pt").problems[0]


# ----------------------------------------------------------------------------------------------------- tool


def test_made_files_are_laid_out_as_published_and_reproducible(small, tmp_path):
    for kind, ids in (("edge", ["edge"]), ("multi", CONTROLS), ("distilled", ["edge/distilled"])):
        paths = small.make(tmp_path / kind, kind, with_vae=True)
        published = [registry.find(name) for name in (*ids, "vae")]
        assert paths == [tmp_path / kind / item.file for item in published]
        again = small.make(tmp_path / "again", kind)
        for left, right in zip(paths, again, strict=False):
            a, b = torch.load(left), torch.load(right)
            assert all(torch.equal(a[k], b[k]) for k in a if isinstance(a[k], torch.Tensor))
    config, _, notes = ck.load_state(registry.resolve(tmp_path / "multi"))
    assert config.branches == 4
    assert len(notes) == 1  # the four bases are equal, or a second note would say otherwise
    distilled = registry.resolve("edge/distilled", local_dir=tmp_path / "distilled")
    assert ck.load_state(distilled).config.timestep_scale == 1.0
    other = small.make(tmp_path / "seed", seed=1)[0]
    first = ck.load_state(tmp_path / "edge" / registry.find("edge").file).state
    assert not torch.equal(ck.load_state(other).state["x_embed.weight"], first["x_embed.weight"])


def test_full_size_kinds_are_the_published_ones(tool):
    assert tool.config_of("vis", "2b") == NetworkConfig.single()
    assert tool.config_of("multi", "2b") == NetworkConfig.multi()
    assert tool.config_of("distilled", "2b") == NetworkConfig.distilled()
    assert tool.config_of("edge", "tiny") == NetworkConfig.tiny()
    buffers = tool.extras(NetworkConfig.single())
    rho = buffers["pos_embedder.dim_spatial_range"].float()
    assert rho.shape == (21,) and buffers["pos_embedder.dim_temporal_range"].shape == (22,)
    assert rho[:4].tolist() == pytest.approx([0, 0.0476074, 0.0952148, 0.1425781], abs=1e-6)


def test_command_line(tool, tmp_path, capsys):
    assert tool.main([str(tmp_path), "--format", "safetensors", "--device", "cpu"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert NetworkConfig.from_json(ck.open_checkpoint(line).metadata[ck.CONFIG_KEY]) == NetworkConfig.tiny()
    weights = ck.load_state(line).state
    spread = weights["blocks.0.fc1.weight"].float().std().item() * math.sqrt(256)
    assert spread == pytest.approx(1, abs=0.02)
