"""The engine from request to frames, with the smallest networks: determinism, chunks, controls, masks, guidance."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import media
import numpy as np
import pytest
import torch
from system import CHUNK, clip_of, open_engine, request
from torch import Tensor

from cosmos_fast import sampler
from cosmos_fast.chunking import seed_chain
from cosmos_fast.engine import Engine, Step
from cosmos_fast.formats import ClipError, EnvironmentProblem, SpecError
from cosmos_fast.text import TinyText
from cosmos_fast.vae_stage import Request

IMAGE: dict[str, Any] = {"num_video_frames_per_chunk": 1}


@pytest.fixture(scope="module")
def edge(models: Path) -> Engine:
    return open_engine(models, "edge")


@pytest.fixture(scope="module")
def multi(models: Path) -> Engine:
    return open_engine(models, "multi")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_of(tmp_path_factory.mktemp("clips") / "street.mp4", 13)


def lossless(path: Path, pixels: np.ndarray) -> Path:
    return media.write(path, np.ascontiguousarray(pixels), codec="ffv1", pix_fmt="bgr0")


def flat(path: Path, level: int, frames: int = 13) -> Path:
    return lossless(path, np.full((frames, 64, 64, 3), level, np.uint8))


def halves(path: Path, frames: int = 13) -> Path:
    """Black left half, white right half."""
    pixels = np.zeros((frames, 64, 64, 3), np.uint8)
    pixels[:, :, 32:] = 255
    return lossless(path, pixels)


def image(engine: Engine, clip: Path, **changes: Any) -> np.ndarray:
    """One frame as numbers that can be subtracted."""
    return engine.generate(request(clip, **(IMAGE | changes))).frames[0].astype(int)


# --- the same again ---


def test_stream_and_generate_and_a_fresh_engine_give_the_same_bytes(
    edge: Engine, models: Path, clip: Path
) -> None:
    spec = request(clip, max_frames=9)
    parts = list(edge.stream(spec))
    assert [len(part.frames) for part in parts] == [5, 4]
    streamed = np.concatenate([part.frames for part in parts])
    assert streamed.shape == (9, 256, 256, 3) and streamed.dtype == np.uint8
    assert np.array_equal(edge.generate(spec).frames, streamed)
    assert np.array_equal(open_engine(models).generate(spec).frames, streamed)


def test_seed_and_prompt_and_steps_change_the_picture(edge: Engine, clip: Path) -> None:
    base = image(edge, clip)
    for changes in ({"seed": 1}, {"prompt": "A frozen lake."}, {"num_steps": 2}):
        assert np.abs(image(edge, clip, **changes) - base).mean() > 0.5, changes


def test_engine_leaves_global_random_state_alone(edge: Engine, clip: Path) -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    image(edge, clip)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


# --- chunks ---


@pytest.mark.parametrize(
    "overlap, frames, keeps", [(0, 13, [5, 5, 3]), (1, 13, [5, 4, 4]), (2, 10, [5, 3, 2])]
)
def test_chunk_chain_keeps_every_frame_once(
    edge: Engine, clip: Path, overlap: int, frames: int, keeps: list[int]
) -> None:
    spec = request(clip, max_frames=frames, num_conditional_frames=overlap, seed=7)
    parts = list(edge.stream(spec))
    assert [len(part.frames) for part in parts] == keeps
    assert [part.chunk.drop for part in parts] == [0, overlap, overlap]
    assert [part.seed for part in parts] == seed_chain(7, 3)
    source = media.read(clip, size=(256, 256), filter="area")[:frames]
    assert np.array_equal(np.concatenate([part.source for part in parts]), source)
    assert sum(len(part.controls["edge"]) for part in parts) == frames


def test_only_the_known_frames_link_chunks(edge: Engine, clip: Path, tmp_path: Path) -> None:
    pixels = media.read(clip)
    other = pixels.copy()
    other[:4] = other[:4, ::-1]
    clips = [lossless(tmp_path / f"{i}.mkv", frames) for i, frames in enumerate((pixels, other))]
    # Frames 4 on are equal, so the second chunk (4..8) sees the same files: only the known frame can differ.
    tied = [list(edge.stream(request(path, max_frames=9)))[1] for path in clips]
    assert np.array_equal(tied[0].source, tied[1].source)
    assert np.array_equal(tied[0].controls["edge"], tied[1].controls["edge"])
    assert not np.array_equal(tied[0].frames, tied[1].frames)
    free = [list(edge.stream(request(path, num_conditional_frames=0)))[1] for path in clips]
    assert np.array_equal(free[0].frames, free[1].frames)


def test_a_stream_leaves_the_callers_autograd_mode_alone(edge: Engine, clip: Path) -> None:
    parts = edge.stream(request(clip, max_frames=9))
    next(parts)
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    parts.close()


def test_each_clip_is_timed_from_zero(edge: Engine, clip: Path) -> None:
    first = edge.generate(request(clip)).stages["denoise"]["seconds"]
    edge.stages.seconds["denoise"] = 1000.0
    assert edge.generate(request(clip)).stages["denoise"]["seconds"] < 1000.0 > first


def test_steps_are_told_in_order(edge: Engine, clip: Path) -> None:
    told: list[Step] = []
    edge.generate(request(clip, "told", max_frames=9, num_steps=2), told.append)
    assert [(s.name, s.stage, s.chunk, s.chunks, s.step, s.steps) for s in told] == [
        ("told", "denoise", chunk, 2, step, 2) for chunk in (0, 1) for step in (1, 2)
    ]


def test_stopping_in_a_step_leaves_the_engine_usable(edge: Engine, clip: Path) -> None:
    base = image(edge, clip)

    def stop(step: Step) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edge.generate(request(clip), stop)
    assert np.array_equal(image(edge, clip), base)


def test_stages_are_timed(edge: Engine, clip: Path) -> None:
    stages = edge.generate(request(clip, **IMAGE)).stages
    assert {"text", "inputs", "encode", "denoise", "decode"} <= set(stages)
    assert all(stage["seconds"] >= 0 for stage in stages.values())


# --- guidance ---


def test_guidance_zero_has_no_negative_branch(edge: Engine, clip: Path) -> None:
    negatives = ("blurry", "a very long list of faults")
    alone = [image(edge, clip, guidance=0, negative_prompt=text) for text in negatives]
    both = [image(edge, clip, guidance=3, negative_prompt=text) for text in negatives]
    assert np.array_equal(alone[0], alone[1])
    assert not np.array_equal(both[0], both[1])
    assert not np.array_equal(alone[0], both[0])


def test_distilled_takes_four_steps_without_guidance(models: Path, clip: Path) -> None:
    engine = open_engine(models, "edge/distilled")
    told: list[Step] = []
    spec = request(clip, max_frames=CHUNK, num_steps=None)
    frames = engine.generate(spec, told.append).frames
    assert frames.shape == (CHUNK, 256, 256, 3) and [step.step for step in told] == [1, 2, 3, 4]
    base = image(engine, clip)
    assert np.array_equal(image(engine, clip, guidance=7, negative_prompt="anything"), base)
    assert not np.array_equal(image(engine, clip, seed=1), base)


# --- controls, weights, masks ---


def test_weights_are_keyed_by_control(multi: Engine, clip: Path) -> None:
    vis = image(multi, clip, vis={"control_weight": 0.3})
    assert np.array_equal(image(multi, clip, edge={"control_weight": 0.0}, vis={"control_weight": 0.3}), vis)
    assert not np.array_equal(image(multi, clip, vis={"control_weight": 1.0}), vis)
    edge = image(multi, clip, edge={"control_weight": 0.3})
    assert not np.array_equal(edge, vis)
    both = image(multi, clip, edge={"control_weight": 0.3}, vis={"control_weight": 0.3})
    assert not np.array_equal(both, vis) and not np.array_equal(both, edge)


def test_masks_say_where_a_control_acts(multi: Engine, clip: Path, tmp_path: Path) -> None:
    masks = {"all": flat(tmp_path / "all.mkv", 255), "half": halves(tmp_path / "half.mkv")}

    def masked(name: str | None) -> np.ndarray:
        mask = {} if name is None else {"mask_path": str(masks[name])}
        return image(multi, clip, edge={"control_weight": 0.5} | mask, vis={"control_weight": 0.5})

    plain, everywhere, half = masked(None), masked("all"), masked("half")
    assert np.abs(everywhere - plain).max() <= 1  # the same weights, summed as maps instead of scalars
    assert np.abs(half - plain).mean() > 0.2
    assert np.array_equal(masked("half"), half)


def test_part_shows_the_masks_it_used(multi: Engine, clip: Path, tmp_path: Path) -> None:
    mask = halves(tmp_path / "half.mkv")
    part = next(multi.stream(request(clip, **IMAGE, edge={"mask_path": str(mask)}, vis={})))
    assert set(part.masks) == {"edge"} and part.masks["edge"].shape == (1, 256, 256)
    assert not part.masks["edge"][0, :, :100].any() and part.masks["edge"][0, :, 156:].all()


def test_control_from_a_file_is_taken_as_it_is(models: Path, clip: Path, tmp_path: Path) -> None:
    engine = open_engine(models, "depth")
    near, far = (flat(tmp_path / f"{level}.mkv", level) for level in (200, 60))
    pictures = [image(engine, clip, depth={"control_path": str(path)}) for path in (near, far)]
    assert not np.array_equal(*pictures)
    part = next(engine.stream(request(clip, **IMAGE, depth={"control_path": str(near)})))
    assert (part.controls["depth"] == 200).all()


def test_black_control_is_no_control(
    models: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(models, "depth")
    encoded: list[int] = []
    original = engine.vae.encode_stream
    monkeypatch.setattr(engine.vae, "encode_stream", lambda *given: encoded.append(1) or original(*given))
    for level, count in ((0, 0), (9, 1)):
        control = flat(tmp_path / f"{level}.mkv", level)
        spec = request(clip, max_frames=CHUNK, depth={"control_path": str(control)})
        assert engine.generate(spec).frames.std() > 5
        assert len(encoded) == count


# --- guided generation ---


def test_guide_is_the_input_where_the_mask_is_white(
    edge: Engine, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guides: list[sampler.Guide] = []
    original = sampler.sample

    def spy(*args: Any, guide: sampler.Guide, **options: Any) -> Tensor:
        guides.append(guide)
        return original(*args, guide=guide, **options)

    monkeypatch.setattr(sampler, "sample", spy)
    mask = halves(tmp_path / "half.mkv")
    part = next(edge.stream(request(clip, max_frames=CHUNK, guided_generation_mask=str(mask))))
    (guide,) = guides
    assert guide.threshold == 25 and guide.weight_THW.shape == (2, 32, 32)
    assert not guide.weight_THW[:, :, :12].any() and (guide.weight_THW[:, :, 20:] == 1).all()
    with torch.inference_mode():
        source = part.source
        x0 = edge._vae.encode(
            Request([lambda start, stop: source[start:stop]], source.shape[:3], torch.float32)
        )
    assert torch.equal(guide.x0_BCTHW, x0)
    assert part.guided is not None and part.guided.shape == (CHUNK, 256, 256)


def test_guided_mask_and_threshold_change_the_picture(edge: Engine, clip: Path, tmp_path: Path) -> None:
    labels = np.zeros((13, 64, 64), np.uint8)
    np.savez(tmp_path / "all.npz", labels + 3)
    masks = {"white": flat(tmp_path / "white.mkv", 255), "half": halves(tmp_path / "half.mkv")}
    masks["labels"] = tmp_path / "all.npz"
    common: dict[str, Any] = {"num_steps": 2}
    free = image(edge, clip, **common)
    held = {
        name: image(edge, clip, **common, guided_generation_mask=str(path)) for name, path in masks.items()
    }
    first_step = image(
        edge, clip, **common, guided_generation_mask=str(masks["white"]), guided_generation_step_threshold=0
    )
    assert np.array_equal(held["white"], held["labels"])
    pairs = [
        (free, held["white"]),
        (free, held["half"]),
        (held["white"], held["half"]),
        (first_step, held["white"]),
    ]
    assert not any(np.array_equal(*pair) for pair in pairs)


def test_guided_threshold_below_zero_guides_nothing(edge: Engine, clip: Path, tmp_path: Path) -> None:
    white = str(flat(tmp_path / "white.mkv", 255))
    none = image(edge, clip, guided_generation_mask=white, guided_generation_step_threshold=-1)
    assert np.array_equal(none, image(edge, clip))


# --- what the VAE returns ---


def patched_decode(monkeypatch: pytest.MonkeyPatch, engine: Engine, change: Any) -> None:
    decode = engine.vae.decode_stream

    def decoded(z: Tensor, window: int = 1) -> Iterator[Tensor]:
        for part in decode(z, window):
            yield change(part)

    monkeypatch.setattr(engine.vae, "decode_stream", decoded)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_frames_are_an_error(
    edge: Engine, clip: Path, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    def spoil(part: Tensor) -> Tensor:
        part = part.clone()
        part[..., 3, 3] = bad
        return part

    patched_decode(monkeypatch, edge, spoil)
    with pytest.raises(ClipError, match="decode: frames must be finite"):
        image(edge, clip)


def test_values_beyond_white_and_black_are_clamped(
    edge: Engine, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patched_decode(monkeypatch, edge, lambda part: torch.where(part > 0, 5.0, -5.0).to(part.dtype))
    frame = image(edge, clip)
    assert set(np.unique(frame)) == {0, 255}


# --- what does not fit together ---


def test_request_for_another_model_is_refused(edge: Engine, clip: Path) -> None:
    with pytest.raises(SpecError, match="edge takes the edge control alone, got vis"):
        edge.generate(request(clip, vis={}))


def test_text_of_another_width_is_refused(models: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="embeddings of width 64, got 32"):
        open_engine(models, text=TinyText(width=32, tokens=8))
