"""What does not fit into memory is made in strips: the same clip, once, with a note."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cosmos_fast.recipe import Plan
from cosmos_fast.vae import VAE, VAEConfig
from cosmos_fast.vae_split import SharedVAEStage
from cosmos_fast.vae_stage import Request, VAEStage

FRAMES, H, W = 9, 64, 32
FULL = torch.OutOfMemoryError("CUDA out of memory.")


@pytest.fixture(scope="module")
def vae() -> VAE:
    torch.manual_seed(0)
    model = VAE(VAEConfig(base=4))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=1.5 * weight[0].numel() ** -0.5 if weight.dim() > 3 else 0.5)
    return model


def stage(vae: VAE, **plan: Any) -> VAEStage:
    return VAEStage(vae, Plan(**plan), torch.device("cpu"), torch.float32)


def request(*seeds: int) -> Request:
    clips = [np.random.default_rng(seed).integers(0, 256, (FRAMES, H, W, 3), np.uint8) for seed in seeds]
    return Request([lambda start, stop, clip=clip: clip[start:stop] for clip in clips], (FRAMES, H, W))


def short_of(method: str, monkeypatch: pytest.MonkeyPatch, windows: int = 0) -> None:
    """The VAE's `method` runs out of memory for a whole picture, behind so many windows."""
    whole = getattr(VAE, method)

    def streamed(self: VAE, *given: Any) -> Iterator[Tensor]:
        found = whole(self, *given)
        for _ in range(windows):
            yield next(found)
        raise FULL

    monkeypatch.setattr(VAE, method, streamed)


def decoded(one: VAEStage, z: Tensor, frames: int = FRAMES) -> np.ndarray:
    return np.concatenate(list(one.decode(z, frames)))


@torch.inference_mode()
def test_encoding_goes_on_in_strips_clip_by_clip(vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = stage(vae).encode(request(1, 2))
    short_of("encode_stream", monkeypatch)
    one = stage(vae)
    torch.testing.assert_close(one.encode(request(1, 2)), expected, rtol=1e-3, atol=1e-3)
    assert len(one.notes) == 1 and one.notes[0].startswith("encode: out of GPU memory, made in 4 strips")


@pytest.mark.parametrize("windows", [0, 1, 2])
@pytest.mark.parametrize("frames", [FRAMES, FRAMES - 2])
@torch.inference_mode()
def test_decoding_goes_on_in_strips_where_it_stopped(
    vae: VAE, monkeypatch: pytest.MonkeyPatch, windows: int, frames: int
) -> None:
    z = torch.randn(1, 16, 3, H // 8, W // 8, generator=torch.Generator().manual_seed(1))
    expected = decoded(stage(vae), z, frames)
    short_of("decode_stream", monkeypatch, windows)
    one = stage(vae)
    found = decoded(one, z, frames)
    assert found.shape == expected.shape == (frames, H, W, 3)
    assert np.abs(found.astype(int) - expected).max() <= 1  # other strips, another order of sums
    assert [note.split(":")[0] for note in one.notes] == ["decode"]


@torch.inference_mode()
def test_what_is_in_strips_already_or_shared_is_not_tried_again(
    vae: VAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> Iterator[Any]:
        raise FULL
        yield

    z = torch.randn(1, 16, 3, H // 8, W // 8)
    monkeypatch.setattr("cosmos_fast.vae_strips.decode", full)
    monkeypatch.setattr("cosmos_fast.vae_strips.encode", lambda *given: next(full()))
    one = stage(vae, vae_strips=4)
    with pytest.raises(torch.OutOfMemoryError):
        decoded(one, z)
    with pytest.raises(torch.OutOfMemoryError):
        one.encode(request(1))
    assert one.notes == []
    short_of("decode_stream", monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):  # once, not for ever
        decoded(stage(vae), z)
    monkeypatch.setattr(SharedVAEStage, "_whole", lambda self, z: full())
    shared = object.__new__(SharedVAEStage)
    VAEStage.__init__(shared, vae, Plan(), torch.device("cpu"), torch.float32)
    with pytest.raises(torch.OutOfMemoryError):  # the others would wait for this rank's rows
        decoded(shared, z)
    assert shared.notes == []
