"""What the VAE holds while it runs: counted, tensor by tensor, and as the plan tells it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cosmos_fast import costs, vae
from cosmos_fast.config import NetworkConfig
from cosmos_fast.dispatch import use
from cosmos_fast.recipe import Plan, Recipe
from cosmos_fast.vae import VAE, VAEConfig, channels_last_
from cosmos_fast.vae_keys import vae_memory, wide_blocks

HEIGHT, WIDTH = 64, 96  # borders of zeros are a twentieth of a frame


class LiveBytes(TorchDispatchMode):
    """Counts the memory of every tensor that ops make inside: what is held, and the most that was.

    What an op of ours takes inside and frees again is not seen; the kernels of a GPU take nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {value.untyped_storage()._cdata for value in tree_leaves(args) if isinstance(value, Tensor)}
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in self.known | given:
                self._add(value.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.held -= size


@pytest.fixture(scope="module")
def model() -> VAE:
    torch.manual_seed(0)
    return channels_last_(VAE(VAEConfig(base=8)))


def latents(frames: int = 4) -> Tensor:
    shape = (1, 16, frames, HEIGHT // 8, WIDTH // 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def consumed(parts: Iterator[Tensor]) -> None:
    for part in parts:
        del part


def peak_of(model: VAE, side: str, window: int) -> int:
    z = latents()
    clip = torch.zeros(1, 3, 25, HEIGHT, WIDTH)
    with LiveBytes() as live:
        if side == "decode":
            consumed(model.decode_stream(z, window))
        else:
            consumed(model.encode_stream(iter([clip[:, :, :1], *clip[:, :, 1:].split(4 * window, dim=2)])))
    return live.peak


def test_the_count_sees_what_is_held_and_what_is_freed() -> None:
    x = torch.zeros(1000)
    with LiveBytes() as live:
        y = x + 1
        z = y.view(10, 100)
        del y
        assert (live.held, live.peak) == (4000, 4000)
        del z
        assert live.held == 0
        x.add_(1)
        _ = (x + 1) + (x + 2)
    assert live.peak == 12000


@pytest.mark.parametrize(("side", "window"), [("decode", 1), ("decode", 2), ("encode", 1), ("encode", 2)])
def test_a_pass_holds_what_the_plan_counts(model: VAE, side: str, window: int) -> None:
    told = 4 * vae_memory(HEIGHT, WIDTH, 4 * window, window, model.config)[side == "decode"]
    # Beside what is told: borders of zeros, and the frames that a window gives.
    assert 0.9 * told < peak_of(model, side, window) < 1.1 * told


def test_the_last_stage_in_parts_saves_memory_and_no_bit_changes(
    model: VAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = dict.fromkeys(("conv3d", "conv_half", "conv_double", "norm_silu"), "reference")
    z = latents()
    with use(**ops):
        parts, held = [model.decode(z, window) for window in (1, 2)], peak_of(model, "decode", 1)
        monkeypatch.setattr(vae, "WIDE_FRAMES", 1000)
        whole, most = [model.decode(z, window) for window in (1, 2)], peak_of(model, "decode", 1)
    assert all(torch.equal(a, b) for a, b in zip(parts, whole, strict=True))
    assert held < 0.92 * most


def test_a_pass_of_one_window_is_not_cut(model: VAE) -> None:
    z = latents(2)
    assert torch.allclose(model.decode(z, None), model.decode(z, 1), atol=1e-5)


def test_blocks_behind_the_last_doubling_of_time_are_cut() -> None:
    assert wide_blocks() == 4
    assert wide_blocks(VAEConfig(temporal=(True, False, True))) == 3


def test_720p_decodes_below_six_gib_with_its_weights() -> None:
    found = costs.memory_bytes(NetworkConfig(), Recipe(), Plan(), 93, 1280, 704)
    assert found["decode"] - found["weights"] + 2 * costs.VAE_PARAMETERS < 5.9 * 2**30
    assert found["encode"] - found["weights"] == 2 * vae_memory(704, 1280, 4, 1)[0]
