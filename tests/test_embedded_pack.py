"""Packing a model into few bits and reading it back: exact bounds, sharing, damage, and the default of the commands.

The networks are random and the smallest there are; tests/test_embedded.py is about the weights that ship.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from system import CHUNK, call, fields, open_engine, request, write_spec

import cosmos_fast.embedded as embedded
from cosmos_fast import models as located
from cosmos_fast import video
from cosmos_fast.checkpoint import load_state
from cosmos_fast.engine import Engine
from cosmos_fast.formats import CONTROLS, CheckpointError, EnvironmentProblem, MediaError, SpecError
from cosmos_fast.lowbit import BITS, pack, read_packed, unpack, write_packed
from cosmos_fast.network_keys import to_ours
from cosmos_fast.recipe import Recipe
from cosmos_fast.tiny_style import TinyStyle
from tools.pack_model import pack_model

PARTS = ("base", *CONTROLS, "distilled", "vae", "text")
CARD = {
    "chunk_frames": [CHUNK, 1], "resolutions": ["256"],
    "defaults": {"resolution": "256", "num_video_frames_per_chunk": CHUNK, "num_steps": 1},
}  # fmt: skip


@pytest.fixture(scope="session")
def packed(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(models, source, dirs_exist_ok=True)
    (source / "model.json").write_text(json.dumps(CARD))
    target = tmp_path_factory.mktemp("packed") / "tiny"
    pack_model(source, target, dict.fromkeys(PARTS, 8), 20 << 20)
    return target


@pytest.fixture
def tiny(packed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The packed random model in the place of the one that ships."""
    monkeypatch.setattr(embedded, "FOLDER", packed)
    yield packed


# --- few bits ---


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    group=st.sampled_from((0, 8, 64)),
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    seed=st.integers(0, 1 << 20),
)
def test_every_value_comes_back_within_a_step(
    bits: int, group: int, rows: int, columns: int, seed: int
) -> None:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10 ** (seed % 7 - 4)
    back = unpack(pack(x, bits, group))
    assert back.shape == x.shape and back.dtype == torch.float32
    flat = (
        x if group == 0 else torch.nn.functional.pad(x.reshape(-1), (0, -x.numel() % group)).view(-1, group)
    )
    peak = flat.abs().amax(1, keepdim=True).expand_as(flat).reshape(-1)[: x.numel()].view_as(x)
    # Clipping may cost a large value up to 30 % of the peak, never the group more than plain rounding would.
    assert bool(((back - x).abs() <= 0.32 * peak + 1e-12).all())
    assert (back - x).norm() <= x.numel() ** 0.5 * peak.max() / (2 ** (bits - 1) - 1)


def test_error_shrinks_with_every_bit_and_eight_bits_round_to_half_a_step() -> None:
    x = torch.randn(64, 256)
    errors = [float((unpack(pack(x, bits, 64)) - x).norm() / x.norm()) for bits in BITS]
    assert all(b < 0.62 * a for a, b in zip(errors, errors[1:], strict=False)), errors
    assert errors[BITS.index(4)] < 0.11
    rows = unpack(pack(x, 8))
    assert bool(((rows - x).abs() <= 0.501 * x.abs().amax(1, keepdim=True) / 127 + 1e-3 * x.abs()).all())


def test_zeros_stay_zero_and_one_large_row_does_not_drown_the_others() -> None:
    x = torch.randn(4, 300) * torch.tensor([1e-3, 1.0, 0.0, 100.0])[:, None]
    back = unpack(pack(x, 8))
    assert bool((back[2] == 0).all())
    for row in (0, 1, 3):
        assert (back[row] - x[row]).norm() / x[row].norm() < 0.01
    assert bool((unpack(pack(torch.zeros(3, 5), 4, 8)) == 0).all())


@pytest.mark.parametrize("bits", [2, 7, 16])
def test_unknown_bits_and_bad_values_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="bits must be one of"):
        pack(torch.ones(2, 2), bits)
    with pytest.raises(ValueError, match="finite"):
        pack(torch.tensor([[1.0, float("nan")]]), 8)


def test_a_packed_file_takes_the_space_it_should_and_keeps_vectors(tmp_path: Path) -> None:
    state = {"w": torch.randn(128, 256), "conv": torch.randn(16, 16, 3, 3, 3), "gain": torch.randn(256)}
    path = write_packed(tmp_path / "x.safetensors", state, 4, 64)
    back = read_packed(path)
    assert set(back) == set(state) and torch.equal(back["gain"], state["gain"])
    assert back["conv"].shape == state["conv"].shape
    numbers = 128 * 256 + 16 * 16 * 27
    assert path.stat().st_size < numbers * 4.25 / 8 + 256 * 4 + 1500
    save_file({"w": torch.ones(2)}, tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match="must be 'cosmos-fast packed 1', got 'no format'"):
        read_packed(tmp_path / "y.safetensors")


# --- the model in parts ---


@pytest.mark.parametrize("model", embedded.MODELS)
def test_every_network_comes_back_as_it_was(tiny: Path, models: Path, model: str) -> None:
    config, state = embedded.state(model)
    kind = "distilled" if model == embedded.DISTILLED else "single"
    wanted = load_state(located.locate(models, model).files, dtype=torch.float32, model=kind)
    assert config == wanted.config
    ours = to_ours(state, config)
    for name, tensor in wanted.state.items():
        assert (ours[name] - tensor).norm() / tensor.norm() < 0.012, name


def test_a_base_tensor_and_a_copy_of_it_are_stored_once(models: Path, packed: Path, tmp_path: Path) -> None:
    base, edge = (set(read_packed(packed / f"{part}.safetensors")) for part in ("base", "edge"))
    assert not any(name.startswith("control_") for name in base)
    assert edge and all(name.startswith("control_") for name in edge)
    source = tmp_path / "source"
    shutil.copytree(models, source)
    (source / "model.json").write_text(json.dumps(CARD))
    name = "control_blocks.0.mlp.layer1.weight"
    for path in (source / "general").rglob("*.pt"):
        file = torch.load(path, weights_only=False)
        file[f"net.{name}"] = file["net.blocks.1.mlp.layer1.weight"].clone()
        torch.save(file, path)
    figures = pack_model(source, tmp_path / "out", dict.fromkeys(PARTS, 8), 20 << 20)
    small = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert small == figures["bytes"]
    assert figures["files"]["edge"] < (packed / "edge.safetensors").stat().st_size - 64 * 256
    again = read_packed(tmp_path / "out" / "edge.safetensors")
    assert f"same:{name}=blocks.1.mlp.layer1.weight" in again and name not in again
    filled = embedded.branch(read_packed(tmp_path / "out" / "base.safetensors"), again)
    assert filled[name].shape == (256, 64)


def test_too_large_a_result_leaves_no_files(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models, tmp_path / "source")
    with pytest.raises(SystemExit, match="must fit"):
        pack_model(tmp_path / "source", tmp_path / "out", dict.fromkeys(PARTS, 8), 10_000)
    assert not (tmp_path / "out").exists()


def test_damage_and_absence_are_told(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(packed, tmp_path / "tiny")
    monkeypatch.setattr(embedded, "FOLDER", tmp_path / "tiny")
    path = tmp_path / "tiny" / "vis.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="vis.safetensors: must have the SHA-256"):
        embedded.state("vis")
    embedded.state("edge")  # another network does not read that file
    path.unlink()
    with pytest.raises(EnvironmentProblem, match="must be readable"):
        embedded.state("multi")
    with pytest.raises(CheckpointError, match="must be one of"):
        embedded.state("lidar")
    (tmp_path / "tiny" / "index.json").unlink()
    with pytest.raises(EnvironmentProblem, match="name other weights with --checkpoint"):
        embedded.files("edge")


# --- style images ---


def test_style_tokens_are_the_colours_of_their_patches() -> None:
    image = np.zeros((128, 192, 3), np.uint8)
    image[:8, :12] = (255, 0, 51)  # token 0 covers 8 x 12 pixels
    tokens = TinyStyle().encode(image, (320, 192))
    assert tokens.shape == (256, 48) and tokens.dtype == torch.float32
    assert torch.allclose(tokens[0].view(16, 3), torch.tensor([1.0, -1.0, -0.6]).expand(16, 3), atol=1e-6)
    assert bool((tokens[1:] == -1).all())
    image[:] = 0
    image[8:10, 12:15, 1] = 255  # the first cell of the token one right and one down
    cells = TinyStyle().encode(image)[17].view(4, 4, 3)
    assert cells[0, 0].tolist() == [-1.0, 1.0, -1.0] and bool((cells[1:] == -1).all())
    with pytest.raises(MediaError, match="uint8"):
        TinyStyle().encode(image.astype(np.float32))


# --- engine and commands without a checkpoint ---


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    frames = np.random.default_rng(0).integers(0, 256, (7, 64, 64, 3), dtype=np.uint8)
    with video.Writer(tmp_path / "in.mp4", (64, 64), 8) as writer:
        writer.write(frames)
    return tmp_path / "in.mp4"


def test_an_engine_without_arguments_is_the_tiny_model(tiny: Path, models: Path, clip: Path) -> None:
    engine = Engine(recipe=Recipe.fp32())
    assert engine.model == "multi" and engine.limits["chunk_lengths"] == (CHUNK, 1)
    assert "vae" in engine.files and all(str(tiny) in str(f["path"]) for f in engine.files.values())
    one = {"max_frames": 1, "num_video_frames_per_chunk": 1}
    result = engine.generate(request(clip, **one))
    far = open_engine(models, "multi").generate(request(clip, **one))
    # 8 bits move the picture a little; weights in a wrong place would move it as far as other noise does.
    off = np.abs(result.frames.astype(int) - far.frames).mean()
    other = np.abs(engine.generate(request(clip, **one, seed=3)).frames.astype(int) - result.frames).mean()
    assert off < 0.25 * other


def test_generate_says_what_it_used_and_keeps_to_its_sizes(tiny: Path, clip: Path, tmp_path: Path) -> None:
    spec = tmp_path / "street.json"
    open_keys = {"resolution", "num_video_frames_per_chunk", "num_steps"}
    spec.write_text(
        json.dumps({k: v for k, v in fields(clip).items() if k not in open_keys} | {"max_frames": CHUNK})
    )
    run = call("generate", spec, "-o", tmp_path / "out", "--recipe", "fp32", "--device", "cpu")
    assert run.code == 0, run.err
    assert "the tiny model inside the package" in run.err
    record = json.loads((tmp_path / "out" / "street.json").read_text())
    assert record["spec"]["resolution"] == "256" and record["spec"]["num_video_frames_per_chunk"] == CHUNK
    assert len(record["chunks"]) == 1 and record["model"] == "edge"
    assert any("the tiny model inside the package" in note for note in record["notes"])
    assert any(note.startswith("resolution: '256', which is this model's own") for note in record["notes"])
    assert set(record["checkpoint"]) == {"base", "edge", "vae"}
    again = call("generate", spec, "-o", tmp_path / "out", "--recipe", "fp32", "--device", "cpu", "--resume")
    assert again.code == 0 and "already done" in again.err


@pytest.mark.parametrize(
    "change, said",
    [
        ({"resolution": "720"}, "resolution: must be one the model was trained for (256), got 720"),
        ({"num_video_frames_per_chunk": 93}, "must be a length the models were trained for (5, 1), got 93"),
    ],
)
def test_what_the_tiny_model_cannot_do_is_refused(tiny: Path, clip: Path, tmp_path: Path, change: dict, said: str) -> None:  # fmt: skip
    run = call("plan", write_spec(tmp_path, "street", clip, **change))
    assert run.code == 2 and said in run.err and "Leave it out" in run.err


def test_embeddings_need_the_weights_they_were_made_for(tiny: Path, clip: Path, tmp_path: Path) -> None:
    (tmp_path / "p.safetensors").touch()
    spec = write_spec(tmp_path, "street", clip)
    run = call("generate", spec, "-o", tmp_path / "out", "--text-embeddings", tmp_path / "p.safetensors")
    assert run.code == 2 and "--checkpoint published" in run.err and not (tmp_path / "out").exists()


def test_names_of_checkpoints(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert located.locate("tiny", "vis") == located.locate(None, "vis")
    assert set(located.locate(None, "edge/distilled").files) == {"base", "edge", "distilled"}
    asked = []
    monkeypatch.setattr(located.registry, "resolve", lambda name: asked.append(name) or Path("x"))
    assert located.locate("published", "depth").model == "depth" and asked == ["depth"]
    assert located.locate("edge", None).model == "edge" and asked == ["depth", "edge"]
    with pytest.raises(CheckpointError, match="published needs a model"):
        located.locate("published", None)
    with pytest.raises(SpecError, match="model: must be one of"):
        located.locate(None, "lidar")


def test_a_missing_model_is_a_fault_of_the_machine(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "FOLDER", tmp_path / "nothing")
    run = call("plan", write_spec(tmp_path, "street", clip))
    assert run.code == 3 and "Install cosmos-fast again" in run.err
