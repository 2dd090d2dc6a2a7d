"""Style images as the published encoder sees them: the chain of pixels, the mask, the cache, the engine's use."""

from __future__ import annotations

import builtins
import gc
import itertools
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rails
import system
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from system import clip_of, generate, open_engine, request, write_spec

from cosmos_fast import style as module
from cosmos_fast.disk_cache import DiskCache
from cosmos_fast.formats import (
    RESOLUTIONS,
    CheckpointError,
    EnvironmentProblem,
    MediaError,
    SpecError,
)
from cosmos_fast.network import Network
from cosmos_fast.resample import pillow_resize
from cosmos_fast.style import SiglipStyle, patch_grid, preprocess

GOLDEN = Path(__file__).parent / "golden" / "guardrails.npz"
SIZE = (128, 64)


def picture(seed: int = 0, height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rails.make_tower(tmp_path_factory.mktemp("siglip2"), "siglip2")


# --- resampling ---


@pytest.mark.parametrize(
    "filter, enum", [("lanczos", Image.Resampling.LANCZOS), ("bicubic", Image.Resampling.BICUBIC)]
)
@pytest.mark.parametrize("before, after", [((37, 53), (64, 48)), ((333, 517), (96, 200)), ((90, 20), (7, 5)), ((5, 5), (5, 9))])  # fmt: skip
def test_resize_is_pillows(before: tuple[int, int], after: tuple[int, int], filter: str, enum: Any) -> None:
    pixels = np.where(picture(1, *before) > 127, 255, 0).astype(
        np.uint8
    )  # hard edges overshoot: both ends clip
    ours = pillow_resize(torch.from_numpy(pixels)[None], after, filter)[0].numpy()
    # Width first, in two calls: Pillow itself changed which pass goes first.
    wide = Image.fromarray(pixels).resize((after[0], before[0]), enum)
    assert np.array_equal(ours, np.asarray(wide.resize(after, enum)))


def test_resize_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"frames must be \(F, H, W, 3\) uint8, got \(4, 4, 3\)"):
        pillow_resize(torch.zeros(4, 4, 3, dtype=torch.uint8), (2, 2), "lanczos")
    with pytest.raises(ValueError, match="a filter of lanczos, bicubic, got"):
        pillow_resize(torch.zeros(1, 4, 4, 3, dtype=torch.uint8), (2, 2), "area")


# --- pixels to patches ---


@pytest.mark.parametrize("height, width, grid", [(704, 1280, (12, 21)), (704, 960, (14, 18)), (960, 960, (16, 16)), (1280, 704, (21, 12))])  # fmt: skip
def test_patch_grid_of_the_published_sizes(height: int, width: int, grid: tuple[int, int]) -> None:
    assert patch_grid(height, width) == grid


def test_patch_grid_is_that_of_transformers_at_every_working_size() -> None:
    theirs = pytest.importorskip("transformers.models.siglip2.image_processing_pil_siglip2")
    for width, height in set(itertools.chain(*(sizes.values() for sizes in RESOLUTIONS.values()))):
        found = theirs.get_image_size_for_max_num_patches(height, width, 16, 256)
        assert patch_grid(height, width) == (found[0] // 16, found[1] // 16), (height, width)


def test_patches_are_those_of_the_published_processor() -> None:
    """Recorded from transformers' torchvision processor, fed by Pillow, for a picture of formulas."""
    y, x, c = np.meshgrid(np.arange(90), np.arange(120), np.arange(3), indexing="ij")
    image = ((x * 7 + y * 13 + c * 29 + (x * y) % 31 * 5) % 256).astype(np.uint8)
    found, golden = preprocess(image, (1280, 704)), np.load(GOLDEN)
    assert found.grid == (12, 21) and found.mask.tolist() == [1] * 252 + [0] * 4
    np.testing.assert_allclose(
        found.values[golden["style_rows"]].numpy(), golden["style_patches"], rtol=0, atol=1e-5
    )


def test_levels_are_scaled_by_255_over_256_and_patches_run_row_column_colour() -> None:
    image = np.zeros((64, 128, 3), np.uint8)
    image[..., 1], image[:, 64:, 2] = 255, 128
    found = preprocess(image, (128, 64))
    assert found.grid == patch_grid(64, 128)
    first = found.values[0].view(16, 16, 3)
    expected = (np.array([0, 255, 0]) * 255 / 256 - 127.5) / 127.5
    np.testing.assert_allclose(first.reshape(-1, 3).numpy(), np.tile(expected, (256, 1)), atol=1e-6)
    assert (
        found.values[found.grid[1] - 1].view(16, 16, 3)[..., 2].mean() > -0.01
    )  # right end of the first row
    assert not found.values[found.mask == 0].any()


def test_preprocess_refuses_other_pictures() -> None:
    with pytest.raises(MediaError, match=r"style image: must be uint8 \(H, W, 3\), got float32"):
        preprocess(picture().astype(np.float32), SIZE)
    with pytest.raises(ValueError, match="sizes must be positive, got 0x5"):
        patch_grid(0, 5)


# --- the encoder ---


def encoder(folder: Path, **changes: Any) -> SiglipStyle:
    return SiglipStyle(folder, **({"device": "cpu", "dtype": torch.float32} | changes))


def test_empty_slots_are_hidden_as_keys_and_handed_on_as_rows(tower: Path) -> None:
    features = encoder(tower).encode(picture(), SIZE)
    assert features.shape == (256, 32) and features.dtype == torch.float32
    model = module.load_vision_tower(
        tower, "siglip2", has_head=False, dtype=torch.float32, device=torch.device("cpu"), extra="style"
    )
    patches = preprocess(picture(), SIZE)
    count = int(patches.mask.sum())
    assert count == 242  # 11 x 22
    alone = model(
        pixel_values=patches.values[None, :count], pixel_attention_mask=torch.ones(1, count, dtype=torch.int),
        spatial_shapes=torch.tensor([patches.grid]),
    ).last_hidden_state[0]  # fmt: skip
    torch.testing.assert_close(features[:count], alone, rtol=1e-4, atol=1e-5)
    assert (features[count:].abs().mean(1) > 0.1).all()
    unmasked = model(
        pixel_values=patches.values[None], pixel_attention_mask=torch.ones(1, 256, dtype=torch.int),
        spatial_shapes=torch.tensor([patches.grid]),
    ).last_hidden_state[0]  # fmt: skip
    assert (features[:count] - unmasked[:count]).abs().max() > 1e-3


def test_published_precision_and_both_layouts_of_the_folder(tower: Path, tmp_path: Path) -> None:
    alone = rails.make_tower(tmp_path, "siglip2", is_whole=False)
    both = [SiglipStyle(folder, device="cpu").encode(picture(), SIZE) for folder in (tower, alone)]
    assert both[0].dtype == torch.bfloat16 and torch.equal(*both)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """A weak reference to every model that was read."""
    seen: list[weakref.ref[Any]] = []
    kept = module.load_vision_tower

    def load(*args: Any, **kwargs: Any) -> Any:
        model = kept(*args, **kwargs)
        seen.append(weakref.ref(model))
        return model

    monkeypatch.setattr(module, "load_vision_tower", load)
    return seen


def test_model_is_read_once_per_image_and_freed(
    tower: Path, tmp_path: Path, loads: list[weakref.ref[Any]]
) -> None:
    cache = DiskCache(tmp_path / "cache", 1 << 20)
    first = encoder(tower, cache=cache)
    assert loads == []
    features = first.encode(picture(), SIZE)
    gc.collect()
    assert loads[0]() is None
    assert first.encode(picture(), SIZE) is features and len(loads) == 1
    assert torch.equal(encoder(tower, cache=cache).encode(picture(), SIZE), features) and len(loads) == 1
    encoder(tower, cache=cache).encode(picture(1), SIZE)
    encoder(tower, cache=cache).encode(picture(), (64, 128))
    assert len(loads) == 3


def test_a_damaged_cache_entry_is_made_again(
    tower: Path, tmp_path: Path, loads: list[weakref.ref[Any]]
) -> None:
    cache = DiskCache(tmp_path / "cache", 1 << 20)
    features = encoder(tower, cache=cache).encode(picture(), SIZE)
    (entry,) = cache.folder.iterdir()
    entry.write_bytes(b"\x00" * 40)
    assert torch.equal(encoder(tower, cache=cache).encode(picture(), SIZE), features) and len(loads) == 2
    assert torch.equal(encoder(tower, cache=cache).encode(picture(), SIZE), features) and len(loads) == 2


def changed(tower: Path, folder: Path, change: Any) -> Path:
    state = load_file(tower / "model.safetensors")
    change(state)
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text((tower / "config.json").read_text())
    return folder


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("vision_model.post_layernorm.bias"), "got no post_layernorm.bias .1 tensors are missing"),
        (lambda s: s.update({"vision_model.post_layernorm.bias": torch.zeros(3)}), r"must be \(32,\) as config.json"),
        (lambda s: s["vision_model.post_layernorm.bias"].fill_(float("nan")), "must be finite, got NaN"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused(tower: Path, tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        encoder(changed(tower, tmp_path / "bad", change)).encode(picture(), SIZE)


def test_missing_folder_config_package_and_download(
    tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match="must be an existing folder or one of .*style"):
        encoder(tmp_path / "nowhere").check()
    with pytest.raises(CheckpointError, match=r"must hold config.json, got no config.json"):
        encoder(tmp_path).check()
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no route")),
    )
    with pytest.raises(EnvironmentProblem, match="siglip2-so400m-patch16-naflex.*Connect once"):
        SiglipStyle(device="cpu").check()
    kept = builtins.__import__

    def importing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "transformers":
            raise ImportError(name)
        return kept(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(
        EnvironmentProblem, match=r"needs the package transformers.*pip install 'cosmos-fast\[style\]'"
    ):
        encoder(tower).check()


# --- in the engine ---


@pytest.fixture(scope="module")
def models256(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest networks, with as many image tokens as the encoder gives."""
    from dataclasses import replace

    kept = system.smallest

    def smallest(kind: str, size: str = "tiny") -> Any:
        config = kept(kind, size)
        return replace(config, image_tokens=256) if config.image_width else config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(system, "smallest", smallest)
        return system.make_models(tmp_path_factory.mktemp("models256"))


IMAGE: dict[str, Any] = {"num_video_frames_per_chunk": 1}


def test_style_reaches_the_positive_pass_alone_from_a_file_or_a_frame(
    tower: Path, models256: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = clip_of(tmp_path / "street.mp4", 5)
    Image.fromarray(picture()).save(tmp_path / "style.png")
    engine = open_engine(models256, "edge", style=encoder(tower))
    seen: list[Any] = []
    kept = Network.read_prompt

    def read(self: Network, text: Any, image: Any = None) -> Any:
        seen.append(image)
        return kept(self, text, image)

    monkeypatch.setattr(Network, "read_prompt", read)
    wanted = engine.style.encode(picture(), (256, 256))  # type: ignore[union-attr]
    plain = engine.generate(request(clip, **IMAGE)).frames
    assert seen == [None, None]
    styled = engine.generate(request(clip, **IMAGE, image_context_path=str(tmp_path / "style.png"))).frames
    assert torch.equal(seen[2], wanted) and seen[3] is None
    assert not np.array_equal(plain, styled)
    frames = [engine.generate(request(clip, **IMAGE, context_frame_index=index)).frames for index in (0, 4)]
    assert not np.array_equal(frames[0], frames[1])
    from cosmos_fast.video import Source, probe

    with Source(probe(clip)) as source:
        first = source.read(0, 1)[0]
    assert torch.equal(seen[4], engine.style.encode(first, (256, 256))) and seen[5] is None  # type: ignore[union-attr]


def test_transparent_style_is_laid_over_white(models256: Path, tmp_path: Path) -> None:
    clip = clip_of(tmp_path / "street.mp4", 5)
    Image.fromarray(np.zeros((32, 32, 4), np.uint8), "RGBA").save(tmp_path / "clear.png")
    seen: list[np.ndarray] = []

    class Spy:
        def encode(self, image_HW3: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
            seen.append(image_HW3)
            return torch.zeros(256, 32)

    engine = open_engine(models256, "edge", style=Spy())
    engine.generate(request(clip, **IMAGE, image_context_path=str(tmp_path / "clear.png")))
    assert seen[0].shape == (32, 32, 3) and (seen[0] == 255).all()


def test_features_of_another_size_stop_the_clip(models: Path, tower: Path, tmp_path: Path) -> None:
    clip = clip_of(tmp_path / "street.mp4", 5)
    engine = open_engine(models, "edge", style=encoder(tower))
    tokens = engine.network.config.image_tokens
    if tokens == 256:
        pytest.skip("the smallest networks take as many tokens as the encoder gives")
    with pytest.raises(EnvironmentProblem, match=rf"features must be \({tokens}, 32\).*got \(256, 32\)"):
        engine.generate(request(clip, **IMAGE, context_frame_index=0))


def test_networks_without_image_context_refuse_a_style(models256: Path, tower: Path, tmp_path: Path) -> None:
    clip = clip_of(tmp_path / "street.mp4", 5)
    for model in ("multi", "edge/distilled"):
        engine = open_engine(models256, model, style=encoder(tower))
        with pytest.raises(SpecError, match="context_frame_index: must not be set for the"):
            engine.planned(request(clip, context_frame_index=0))
    older = open_engine(models256, "edge", style=encoder(tower))
    from dataclasses import replace

    older.network.config = replace(older.network.config, image_width=None)
    with pytest.raises(
        SpecError, match="must not be set for this checkpoint, got 0. It takes no style image"
    ):
        older.planned(request(clip, context_frame_index=0))


def test_command_line_takes_an_encoder_and_finds_its_faults_first(
    models256: Path, tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = clip_of(tmp_path / "street.mp4", 5)
    styled = write_spec(tmp_path, "styled", clip, **IMAGE, context_frame_index=0)
    cache = ("--cache-dir", tmp_path / "cache")
    run = generate(models256, tmp_path / "out", styled, "--style-encoder", tower, *cache)
    assert run.code == 0 and len(list((tmp_path / "cache" / "style").iterdir())) == 1, run.err
    plain = write_spec(tmp_path, "plain", clip, **IMAGE)
    run = generate(models256, tmp_path / "out", plain, "--style-encoder", tmp_path / "nowhere", *cache)
    assert run.code == 0, run.err  # no clip needs it
    run = generate(models256, tmp_path / "no", styled, "--style-encoder", tmp_path / "nowhere", *cache)
    assert run.code == 3 and "must be an existing folder" in run.err and not (tmp_path / "no").exists()
    run = generate(models256, tmp_path / "no", styled, *cache)
    assert (
        run.code == 2 and "No encoder for style images" in run.err
    )  # weights of another width than published


def test_command_line_offers_style_where_it_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from cosmos_fast import models
    from cosmos_fast.config import NetworkConfig

    published, own = {"edge": NetworkConfig.single()}, {"edge": system.smallest("edge")}
    assert models.offers_style(None, None, own)  # the tiny model inside the package has an encoder of its own
    assert models.offers_style("published", None, {}) and models.offers_style("x", None, published)
    assert models.offers_style("x", "folder", own) and not models.offers_style("x", None, own)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not models.offers_style("published", None, {}) and models.offers_style(None, None, own)


def test_the_first_release_is_known_to_take_no_style_image(tmp_path: Path) -> None:
    from cosmos_fast.models import local_configs
    from cosmos_fast.planning import preflight

    spec = request(clip_of(tmp_path / "street.mp4", 5), context_frame_index=0, num_video_frames_per_chunk=93)
    with pytest.raises(
        SpecError, match="must not be set for this checkpoint, got 0. It takes no style image"
    ):
        preflight([spec], configs=local_configs("edge/older", "auto"))
    assert preflight([spec], configs=local_configs("edge", "auto")).clips[0].style == 0


def test_published_networks_get_the_published_encoder_unread(models256: Path) -> None:
    from cosmos_fast.config import NetworkConfig
    from cosmos_fast.models import Located, open_style

    located = Located("edge", models256)
    found = open_style(None, located, NetworkConfig.single(), "cpu")
    assert isinstance(found, SiglipStyle)
    assert open_style(None, located, NetworkConfig.multi(), "cpu") is None
    assert open_style(None, located, system.smallest("edge"), "cpu") is None
    assert isinstance(open_style(models256, located, system.smallest("edge"), "cpu"), SiglipStyle)
