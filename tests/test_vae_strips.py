"""The VAE strip by strip: equal to the whole picture, and as small as it says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conv_flop import MAPPING
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cosmos_fast import costs, vae_rows, vae_strips
from cosmos_fast.config import NetworkConfig
from cosmos_fast.recipe import Plan, Recipe
from cosmos_fast.vae import VAE, Stream, VAEConfig, channels_last_
from cosmos_fast.vae_keys import vae_convs, vae_flops, vae_history, vae_memory
from cosmos_fast.vae_rows import Rows, decode_path, shared_flops, strip_flops, strip_memory, strips

H, W, FRAMES = 224, 32, 9  # 28 latent rows: more than the convs reach from a strip in the middle


@pytest.fixture(scope="module")
def vae() -> VAE:
    torch.manual_seed(0)
    model = VAE(VAEConfig(base=8))
    for (
        weight
    ) in model.parameters():  # convs that keep what they get at its size, so that a wrong row is seen far
        torch.nn.init.normal_(
            weight, std=1.5 * weight[0].numel() ** -0.5 if weight.dim() > 3 and weight.shape[1] > 1 else 0.5
        )
    return model


@pytest.fixture(scope="module")
def clip() -> Tensor:
    return torch.rand(1, 3, FRAMES, H, W, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def latents(vae: VAE, clip: Tensor) -> Tensor:
    return vae.encode(clip, 4)


def encoded(vae: VAE, clip: Tensor, window: int | None, count: int) -> Tensor:
    _, _, frames, height, width = clip.shape
    return vae_strips.encode(
        vae,
        lambda start, stop, top, end: clip[:, :, start:stop, top:end],
        (frames, height, width),
        window,
        count,
    )


def decoded(vae: VAE, z: Tensor, window: int | None, count: int) -> Tensor:
    """All tiles put together; NaN where there was none, or two."""
    frames = 1 + 4 * (z.shape[2] - 1)
    x = torch.full((1, 3, frames, z.shape[3] * 8, z.shape[4] * 8), torch.nan)
    for frame, row, tile in vae_strips.decode(vae, z, window, count):
        place = x[:, :, frame : frame + tile.shape[2], row : row + tile.shape[3]]
        assert place.shape == tile.shape and place.isnan().all()
        place.copy_(tile)
    return x


def encoded_by_rows(vae: VAE, clip: Tensor, window: int, count: int) -> Tensor:
    """As ranks do it: each makes its rows, the features of all are put together, and each goes on with its rows of them."""
    frames, height = clip.shape[2:4]
    h, config = height // 8, vae.config

    def read(start: int, stop: int, top: int, end: int) -> Tensor:
        return clip[:, :, start:stop, top:end]

    cut = strips(h, count)
    found = [vae_strips.encode_strip(vae, read, frames, window, strip, h) for strip in cut]
    found = [vae_strips.encode_before(vae, found, strip) for strip in cut]
    assert [part.shape[1:4] for part in found] == [(config.top, 3, strip.height) for strip in cut]
    return torch.cat([vae_strips.encode_after(vae, found, strip) for strip in cut], dim=3)


def decoded_by_rows(vae: VAE, z: Tensor, window: int, count: int) -> Tensor:
    cut, h = strips(z.shape[3], count), z.shape[3]
    found, parts = [vae_strips.decode_before(vae, z, strip) for strip in cut], []
    for strip in cut:
        rows = decode_path(strip, h, vae.config).first
        mine = vae_strips.decode_after(vae, found, rows)
        assert mine.shape[3] == rows.height
        tiles = vae_strips.decode_strip(vae, mine, rows, window, strip, h)
        parts.append(torch.cat([tile.x for tile in tiles], dim=2))
    return torch.cat(parts, dim=3)


def difference(x: Tensor, y: Tensor) -> float:
    """The greatest, over the greatest number of y; NaN where x has one."""
    return float((x - y).abs().max() / y.abs().max())


@pytest.mark.parametrize(("window", "count"), [(4, 2), (4, 3), (8, 5), (None, 4), (4, 28)])
def test_encode_in_strips_is_the_encode(
    vae: VAE, clip: Tensor, latents: Tensor, window: int | None, count: int
) -> None:
    assert difference(encoded(vae, clip, window, count), latents) < 5e-6


@pytest.mark.parametrize(("window", "count"), [(1, 2), (1, 3), (2, 5), (None, 4), (1, 28)])
def test_decode_in_strips_is_the_decode(vae: VAE, latents: Tensor, window: int | None, count: int) -> None:
    assert difference(decoded(vae, latents, window, count), vae.decode(latents, 1)) < 5e-6


@pytest.mark.parametrize(("count", "window"), [(2, 8), (3, 1), (28, 2)])
def test_rows_of_the_blocks_at_latent_height_are_those_of_the_whole_picture(
    vae: VAE, clip: Tensor, latents: Tensor, count: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vae_strips, "LATENT_WINDOW", window)
    assert difference(encoded_by_rows(vae, clip, 4, count), latents) < 5e-6
    assert difference(decoded_by_rows(vae, latents, 1, count), vae.decode(latents, 1)) < 5e-6


def test_one_strip_and_more_strips_than_rows(vae: VAE, clip: Tensor, latents: Tensor) -> None:
    assert difference(encoded(vae, clip, 4, 1), latents) < 5e-6
    assert difference(decoded(vae, latents, 1, 1), vae.decode(latents, 1)) < 5e-6
    small = clip[:, :, :5, :24]
    assert difference(encoded(vae, small, 4, 9), vae.encode(small, 4)) < 5e-6
    assert strips(3, 9) == [Rows(0, 1), Rows(1, 2), Rows(2, 3)] and strips(88, 3)[-1] == Rows(58, 88)


def test_a_row_too_few_is_a_seam(
    vae: VAE, clip: Tensor, latents: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound of the tests above is far below what one missing row does."""
    grown = Rows.grown

    def less(self: Rows, by: int, height: int) -> Rows:
        return grown(self, max(by - 1, 0), height)

    monkeypatch.setattr(vae_rows.Rows, "grown", less)
    assert difference(encoded(vae, clip, 4, 2), latents) > 1e-4
    assert difference(decoded(vae, latents, 1, 2), vae.decode(latents, 1)) > 1e-4


@pytest.mark.parametrize("side", ["encode", "decode"])
@pytest.mark.parametrize("part", ["before", "after"])
def test_rows_taken_along_at_latent_height_are_those_that_reach(
    vae: VAE, side: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the whole picture, a NaN in one row comes through to the rows of a strip from these rows, and from no other."""
    h, strip = H // 8, Rows(12, 14)
    told = getattr(vae_rows, f"{side}_rows")(strip, h, vae.config)[part == "after"]
    for name in ("encode_rows", "decode_rows"):
        monkeypatch.setattr(vae_strips, name, lambda *given: (Rows(0, h), Rows(0, h)))
    monkeypatch.setattr(vae_strips, "_attended", lambda attention, x, rows: x)  # which all rows reach

    def reaches(row: int) -> bool:
        x = torch.ones(1, 16 if (side, part) == ("decode", "before") else vae.config.top, 1, h, 2)
        x[:, :, :, row] = torch.nan
        given = x if (side, part) == ("decode", "before") else [x]
        return bool(getattr(vae_strips, f"{side}_{part}")(vae, given, strip).isnan().any())

    assert [row for row in range(h) if reaches(row)] == [*range(*told)]


def test_strips_have_histories_of_their_own_height(
    vae: VAE, latents: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a decode carries is what the sizes say: the model of memory stands on it."""
    made: list[Stream] = []
    start = Stream.__init__

    def kept(self: Stream, keep: bool = True) -> None:
        start(self, keep)
        made.append(self)

    monkeypatch.setattr(Stream, "__init__", kept)
    decoded(vae, latents, 1, 3)
    h = latents.shape[3]
    for stream, strip in zip(made[2:], strips(h, 3), strict=True):
        _, convs = vae_rows.strip_convs(strip, H, W, 4, vae.config)
        assert stream.nbytes == 4 * sum(conv.width * conv.past for conv in convs)
    assert max(s.nbytes for s in made[2:]) < 0.6 * 4 * vae_history(H, W, vae.config)[1]


def test_flop_of_strips_are_those_that_run(vae: VAE, latents: Tensor) -> None:
    def run(count: int) -> int:
        with FlopCounterMode(display=False, custom_mapping=MAPPING) as counter:
            decoded(vae, latents, 1, count)
        return counter.get_total_flops()

    told = strip_flops(FRAMES, H, W, 3, vae.config)[1] - strip_flops(FRAMES, H, W, 1, vae.config)[1]
    # The time convs of the strips are counted for all frames but frame 0, as they run.
    assert run(3) - run(1) == pytest.approx(told, rel=1e-3)


def test_flop_of_ranks_are_those_that_run(vae: VAE, clip: Tensor, latents: Tensor) -> None:
    """All but the attention, which the counter does not know: keys of all rows, for each rank's queries."""
    h, w, config = H // 8, W // 8, vae.config
    for side, run in enumerate((encoded_by_rows, decoded_by_rows)):
        with FlopCounterMode(display=False, custom_mapping=MAPPING) as counter:
            run(vae, (clip, latents)[side], (4, 1)[side], 3)
        rows = 0
        for strip in strips(h, 3):
            taken = decode_path(strip, h, config).first
            found = vae_rows.decode_rows(taken, h, config) if side else vae_rows.encode_rows(strip, h, config)
            rows += found[1].height
        attended = 4 * latents.shape[2] * rows * w * h * w * config.top
        told = 3 * shared_flops(FRAMES, H, W, 3, config)[side]
        assert counter.get_total_flops() + attended == pytest.approx(told, rel=1e-3)
    assert shared_flops(93, 704, 1280, 1) == pytest.approx(vae_flops(93, 704, 1280))


def test_four_strips_decode_720p_below_three_gib() -> None:
    whole, cut = vae_memory(704, 1280, 4, 1), strip_memory(704, 1280, 4, 1, 4)
    assert [2 * n / 2**30 for n in cut] == pytest.approx([1.74, 1.99], abs=0.01)
    assert strip_memory(704, 1280, 4, 1, 1) == whole
    # More arithmetic: a fifth.
    for side in (0, 1):
        alone, four = (strip_flops(93, 704, 1280, count)[side] for count in (1, 4))
        assert 1.15 < 1 + (four - alone) / vae_flops(93, 704, 1280)[side] < 1.25
    assert strip_flops(93, 704, 1280, 1)[1] < vae_flops(93, 704, 1280)[1]
    encode, decode = vae_convs(4, 704, 1280, lead=0)
    assert encode and decode


def test_the_plan_counts_on_strips() -> None:
    def memory(plan: Plan) -> dict[str, int]:
        found = costs.memory_bytes(NetworkConfig(), Recipe(), plan, 93, 1280, 704)
        return {stage: found[stage] - found["weights"] for stage in ("encode", "denoise", "decode")}

    whole, cut = memory(Plan()), memory(Plan(vae_strips=4))
    assert cut["denoise"] == whole["denoise"]
    assert cut["decode"] < 3 * 2**30 < whole["decode"] and cut["encode"] < whole["encode"] / 2


def test_strips_come_from_top_to_bottom_with_all_their_frames(vae: VAE, latents: Tensor) -> None:
    def places() -> Iterator[tuple[int, int]]:
        for frame, row, _ in vae_strips.decode(vae, latents, 1, 2):
            yield row, frame

    assert list(places()) == [(row, frame) for row in (0, 112) for frame in (0, 1, 5)]


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_strips_on_the_device(device: torch.device, dtype: torch.dtype, bound: float) -> None:
    """With the kernels of the device, which get heights and widths that no whole picture has."""
    torch.manual_seed(0)
    model = VAE(VAEConfig(base=32)).to(device, dtype)
    for weight in model.parameters():
        scale = weight[0].numel() ** -0.5 if weight.dim() > 3 and weight.shape[1] > 1 else 0.5
        torch.nn.init.normal_(weight, std=1.2 * scale)
    channels_last_(model)
    x = torch.rand(1, 3, FRAMES, H, 64, device=device).mul_(2).sub_(1).to(dtype)
    kept, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        z = model.encode(x, 4)
        assert difference(encoded(model, x, 4, 3), z) < bound
        assert difference(decoded(model, z, 1, 3).to(device), model.decode(z, 1).float()) < bound
        if dtype == torch.bfloat16:  # by our kernels: bit for bit
            assert torch.equal(encoded_by_rows(model, x, 4, 2), z)
            assert torch.equal(decoded_by_rows(model, z, 1, 2), model.decode(z, 1))
    finally:
        torch.backends.cudnn.allow_tf32 = kept
