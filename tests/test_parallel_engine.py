"""A clip made by several ranks is the clip that one makes: engine, prompts, shared VAE. Over gloo, on the CPU.

Strips of the VAE and spread tokens change the sizes of products and so their rounding, which a code of a pixel shows where
it lies on an edge: nearly all codes are equal, and none is further off than CODES.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import media
import numpy as np
import pytest
import ranks
import torch
from system import clip_of, open_engine, request
from torch import Tensor

from cosmos_fast.formats import ClipError
from cosmos_fast.parallel import ALONE, Group, Mesh
from cosmos_fast.recipe import Plan
from cosmos_fast.vae import VAE, VAEConfig
from cosmos_fast.vae_rows import Rows
from cosmos_fast.vae_split import SharedVAEStage
from cosmos_fast.vae_stage import Request, VAEStage

CODES, EQUAL = 2, 0.99
H, W, FRAMES = 64, 32, 9


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_of(tmp_path_factory.mktemp("clips") / "street.mp4", 9)


def halves(path: Path) -> str:
    pixels = np.zeros((9, 64, 64, 3), np.uint8)
    pixels[:, :, 32:] = 255
    return str(media.write(path, pixels, codec="ffv1", pix_fmt="bgr0"))


def made(models: Path, model: str, fields: dict[str, Any], plan: Plan) -> tuple[np.ndarray | None, str]:
    """Frames of a clip on the first rank, and their digest on all."""
    engine = open_engine(models, model, plan=plan)
    try:
        frames = engine.generate(request(**fields)).frames
        return (frames if engine.mesh.is_first else None), hashlib.sha256(frames.tobytes()).hexdigest()
    finally:
        engine.mesh.close()


@pytest.mark.parametrize(
    "model, context, cfg, wanted",
    [
        ("edge/distilled", 3, 1, {"max_frames": 9}),
        ("multi", 2, 2, {"vis": {"control_weight": 0.5}, "guide": True}),
    ],
    ids=["context, distilled, two chunks", "both, controls with a mask and a guide"],
)
def test_ranks_make_the_clip_that_one_makes(
    models: Path, clip: Path, tmp_path: Path, model: str, context: int, cfg: int, wanted: dict[str, Any]
) -> None:
    fields = {"video": clip, "max_frames": 5} | wanted
    if fields.pop("guide", False):
        mask = halves(tmp_path / "half.mkv")
        fields |= {"guided_generation_mask": mask, "edge": {"mask_path": mask}}
    alone, _ = made(models, model, fields, Plan(device="cpu"))
    found = ranks.run(
        context * cfg, made, models, model, fields, Plan(device="cpu", context=context, cfg=cfg)
    )
    assert len({digest for _, digest in found}) == 1, "ranks made different frames"
    frames = found[0][0]
    assert alone is not None and frames is not None and alone.std() > 5
    gap = np.abs(frames.astype(int) - alone)
    assert gap.max() <= CODES and (gap == 0).mean() > EQUAL, (gap.max(), (gap == 0).mean())


def beside(models: Path, clip: Path) -> tuple[list[str], list[str]]:
    """Digests of a clip's parts: of a stream left in its middle while the next one has begun, and of that."""
    engine = open_engine(models, "edge", plan=Plan(device="cpu", context=2))
    try:
        streams = [engine.stream(request(clip, max_frames=9)) for _ in range(2)]
        left, whole = ([hashlib.sha256(next(stream).frames).hexdigest()] for stream in streams)
        streams[0].close()  # type: ignore[attr-defined]
        return left, whole + [hashlib.sha256(part.frames).hexdigest() for part in streams[1]]
    finally:
        engine.mesh.close()


def test_a_stream_left_in_its_middle_does_not_touch_the_next(models: Path, clip: Path) -> None:
    first, second = ranks.run(2, beside, models, clip)
    assert first == second and first[0] == first[1][:1] and len(set(first[1])) == 2


# --- the VAE alone ---------------------------------------------------------------------------------


def small_vae() -> VAE:
    torch.manual_seed(0)
    model = VAE(VAEConfig(base=4))
    for weight in model.parameters():
        torch.nn.init.normal_(
            weight, std=1.5 * max(weight[0].numel(), 1) ** -0.5 if weight.dim() > 3 else 0.5
        )
    return model


def pictures(seed: int, frames: int = FRAMES) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, H, W, 3), np.uint8)


def requests(count: int) -> list[Request | None]:
    """`count` clips, nothing, and a clip of one frame."""

    def of(clip: np.ndarray) -> Request:
        return Request([lambda start, stop: clip[start:stop]], clip.shape[:3])

    return [*(of(pictures(seed)) for seed in range(count)), None, of(pictures(9, 1))]


def coded(stage: VAEStage, count: int) -> tuple[list[np.ndarray | None], np.ndarray]:
    """Latents of every request, and the frames of the first."""
    with torch.inference_mode():
        latents = stage.encode_all(requests(count))
        z = latents[0]
        assert z is not None
        frames = np.concatenate(list(stage.decode(z, FRAMES - 1)))
    return [None if z is None else z.numpy() for z in latents], frames


def share(size: int, counts: tuple[int, ...]) -> list[Any]:
    mesh = Mesh.open(Plan(device="cpu", context=size), timeout_s=60)
    try:
        stage = SharedVAEStage(small_vae(), Plan(), mesh.device, torch.float32, mesh.world)
        cut = []
        original = stage._strip
        stage._strip = lambda *given: cut.append(given[1]) or original(*given)  # type: ignore[method-assign]
        return [(*coded(stage, count), [cut.pop() for _ in cut[:]]) for count in counts]
    finally:
        mesh.close()


@pytest.mark.parametrize("size", [2, 3, 9])
def test_a_shared_vae_is_the_vae(size: int) -> None:
    """Nine ranks are more than the eight latent rows: the last one has none of a clip."""
    counts = (1, 2) if size < 9 else (1,)
    alone = [coded(VAEStage(small_vae(), Plan(), torch.device("cpu"), torch.float32), n) for n in counts]
    found = ranks.run(size, share, size, counts)
    for index, (latents, frames) in enumerate(alone):
        for rank, results in enumerate(found):
            theirs, their_frames, cut = results[index]
            for mine, other in zip(latents, theirs, strict=True):
                assert (mine is None) == (other is None)
                if mine is not None:
                    assert np.abs(other - mine).max() < 1e-5 * np.abs(mine).max()
            gap = np.abs(their_frames.astype(int) - frames)
            assert frames.shape == gap.shape and gap.max() <= 1 and (gap == 0).mean() > EQUAL
            assert np.array_equal(their_frames, found[0][index][1]), f"rank {rank} has other frames"
            # One clip is cut, two are not: so low a picture would be overlap more than strip.
            assert bool(cut) == (counts[index] == 1)


def test_ranks_take_as_many_times_more_frames_as_they_are() -> None:
    asked: list[tuple[int, int]] = []

    def clip(start: int, stop: int) -> np.ndarray:
        asked.append((start, stop))
        return np.zeros((stop - start, 64, 32, 3), np.uint8)

    stage = SharedVAEStage(small_vae(), Plan(), torch.device("cpu"), torch.float32, Group(1, 2))
    with torch.inference_mode():
        stage._strip(Request([clip], (17, 64, 32)), Rows(4, 8))
    assert asked == [(0, 1), (1, 9), (9, 17)]


def test_clips_are_cut_where_it_saves_work() -> None:
    def pay(clips: int, size: int) -> bool:
        stage = SharedVAEStage(small_vae(), Plan(), torch.device("cpu"), torch.float32, Group(0, size))
        stage.vae.config = VAEConfig()
        shape = (93, 704, 1280)
        return stage._cuts_pay([Request([], shape)] * clips + [Request([], (1, 704, 1280))])

    assert pay(0, 2) and pay(1, 2) and pay(3, 2) and not pay(2, 2) and not pay(4, 2) and not pay(4, 4)
    assert pay(1, 8) and pay(3, 8)


def test_frames_that_are_not_finite_end_the_clip() -> None:
    stage = SharedVAEStage(small_vae(), Plan(), torch.device("cpu"), torch.float32, ALONE)
    z: Tensor = torch.full((1, 16, 1, 8, 4), float("nan"))
    with pytest.raises(ClipError, match="decode: frames must be finite"), torch.inference_mode():
        list(stage.decode(z, 1))
