"""Convolutions and norm of the VAE in Triton: every way to cut them, what they do to the history, and the VAE on them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_fast import convolution as library
from cosmos_fast import ops_vae, reference, testing
from cosmos_fast.dispatch import use
from cosmos_fast.vae import VAE, Stream, VAEConfig, channels_last_

testing.kernels_from_checkout()

LAST = torch.channels_last_3d


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def conv_args(C: int, O: int, *sides: int, residual: bool = True) -> tuple[Any, ...]:  # noqa: E741
    F_, H, W = sides
    x, w = draw(1, C, F_ + 2, H + 2, W + 2), draw(O, C, 3, 3, 3, seed=1) * (27 * C) ** -0.5
    added = draw(1, O, F_, H, W, seed=2).half() if residual else None
    return (
        x.half().contiguous(memory_format=LAST),
        w.half().contiguous(memory_format=LAST),
        draw(O, seed=3).half(),
        added,
        1,
    )


# Tiles as (m, low, high, k, parts, fold, flatten): pixels end inside a row and inside a frame, channels inside a tile.
CUTS = {
    "one accumulator": (32, 64, 0, 16, 1, True, True),
    "in pieces, the last ones empty": (32, 64, 0, 16, 4, True, True),
    "two accumulators": (16, 32, 16, 32, 2, True, True),
    "two tiles of channels": (32, 16, 0, 16, 1, True, True),
    "taps one by one": (32, 32, 16, 32, 1, False, True),
    "tile by tile": (64, 32, 16, 64, 1, True, False),
}


@pytest.mark.interpret
@pytest.mark.parametrize("cut", CUTS)
def test_every_cut_gives_the_same(cut: str) -> None:
    from cosmos_fast.kernels import convolution

    m, low, high, k, parts, fold, flatten = CUTS[cut]
    tiles = convolution.Tiles(m, low, high, k, 4, 2, parts=parts, fold=fold, flatten=flatten)
    args = conv_args(16, 24, 2, 5, 7) if cut != "two accumulators" else conv_args(24, 40, 2, 5, 7)
    assert testing.faults("conv3d", convolution.conv3d(*args, tiles=tiles), args) == []


@pytest.mark.interpret
@pytest.mark.parametrize("op", ["conv_half", "conv_double"])
@pytest.mark.parametrize("high", [0, 16])
def test_frames_halved_and_doubled_in_tiles_that_end_inside_a_row(op: str, high: int) -> None:
    from cosmos_fast.kernels import convolution

    args = draw(1, 24, 1, 4, 38).half(), (draw(40, 24, 3, 3) / 15).half(), draw(40).half()
    tiles = convolution.Tiles(16, 32, high, 32, 4, 2, parts=2)
    assert testing.faults(op, getattr(convolution, op)(*args, tiles=tiles), args) == []


@pytest.mark.interpret
def test_a_residual_and_an_input_in_another_layout_are_taken() -> None:
    from cosmos_fast.kernels import convolution

    x, w, b, added, stride = conv_args(8, 8, 1, 3, 4)
    wide = torch.cat((added, added), 2)[:, :, ::2].contiguous()
    args = x.contiguous(), w.contiguous(), b, wide[:, :, :1], stride
    assert testing.faults("conv3d", convolution.conv3d(*args), args) == []


@pytest.mark.interpret
def test_taps_of_the_phases_are_the_sums_that_nearest_neighbour_makes() -> None:
    from cosmos_fast.kernels.convolution import fold_taps

    w = draw(5, 3, 3, 4)
    phases = fold_taps(w)
    rows = [[[0], [1, 2]], [[0, 1], [2]]]  # taps on the first and second pixel, for phase 0 and 1
    for p in range(2):
        for q in range(2):
            for a in range(2):
                for b in range(2):
                    total = sum(w[:, i, j] for i in rows[p][a] for j in rows[q][b])
                    assert torch.allclose(phases[2 * p + q, :, a, b], total, atol=1e-6)


@pytest.mark.interpret
@pytest.mark.parametrize("frames", [1, 2, 4])
@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format])
def test_history_is_read_before_it_is_rewritten(frames: int, layout: torch.memory_format) -> None:
    from cosmos_fast.kernels import norm_silu

    x, gamma = draw(2, 12, frames, 3, 5).contiguous(memory_format=layout), draw(12, 1, 1, 1)
    past = draw(2, 12, 2, 3, 5, seed=4).contiguous(memory_format=layout)
    before, address = past.clone(), past.data_ptr()
    y = norm_silu.norm_silu(x, gamma, past, past)
    expected = reference.norm_silu(x, gamma, before, None)
    assert torch.allclose(y, expected, atol=2e-6) and past.data_ptr() == address
    assert torch.allclose(past, expected[:, :, -2:, 1:-1, 1:-1], atol=2e-6)
    border = y.clone()
    border[:, :, :, 1:-1, 1:-1] = 0
    assert not border.any()


def test_the_library_norm_keeps_the_same_history() -> None:
    x, gamma, past = draw(1, 8, 1, 2, 3), draw(8, 1, 1, 1), draw(1, 8, 2, 2, 3, seed=5)
    keep, other = torch.empty_like(past), torch.empty_like(past)
    expected = reference.norm_silu(x, gamma, past, keep)
    assert torch.allclose(library.norm_silu(x, gamma, past, other), expected, atol=2e-6)
    assert torch.allclose(keep, other, atol=2e-6) and torch.equal(keep[:, :, 0], past[:, :, 1])


def norm_of_zeros_and_of_huge(norm: Any) -> Tensor:
    x = torch.zeros(1, 8, 1, 2, 2, dtype=torch.float16)
    x[..., 0, 0] = 6e4
    return norm(x, torch.ones(8, 1, 1, 1, dtype=torch.float16), None, None)


@pytest.mark.interpret
def test_norm_of_zeros_is_zero_and_of_huge_is_finite() -> None:
    from cosmos_fast.kernels import norm_silu

    y = norm_of_zeros_and_of_huge(norm_silu.norm_silu)
    assert torch.isfinite(y).all() and y[0, :, 2, 1, 1].min() > 0.5 and not y[0, :, 2, 2, 2].any()


@pytest.mark.interpret
def test_the_vae_on_the_kernels_is_the_vae_on_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    from cosmos_fast.kernels import attention_wide, convolution, norm_silu

    torch.manual_seed(0)
    vae = channels_last_(VAE(VAEConfig(base=4)))
    z = torch.randn(1, 16, 2, 1, 1)
    names = ("conv3d", "conv_half", "conv_double", "norm_silu", "attention_wide")
    with use(**dict.fromkeys(names, "reference")):
        pixels = vae.decode(z)
        latents = vae.encode(pixels, 4)
    kernels: dict[str, Any] = {
        "conv3d": lambda x, w, b, residual=None, stride=1: convolution.conv3d(x, w, b, residual, stride),
        "conv_half": convolution.conv_half,
        "conv_double": convolution.conv_double,
        "norm_silu": norm_silu.norm_silu,
        "attention_wide": attention_wide.attention_wide,
    }
    for name in names:
        monkeypatch.setattr(ops_vae, name, kernels[name])
    torch.testing.assert_close(vae.decode(z), pixels, atol=2e-5, rtol=0)
    torch.testing.assert_close(vae.encode(pixels, 4), latents, atol=2e-5, rtol=0)


def folded(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """conv_double through four phases of taps summed in fp32 and rounded once: what the kernel computes."""
    out = library.frames_like(x, (x.shape[0], len(weight), x.shape[2], 2 * x.shape[3], 2 * x.shape[4]))
    side = [torch.tensor([[1.0, 0, 0], [0, 1, 1]]), torch.tensor([[1.0, 1, 0], [0, 0, 1]])]
    for p in range(2):
        for q in range(2):
            taps = torch.einsum("ai,bj,ocij->ocab", side[p], side[q], weight.float()).to(weight.dtype)
            padded = F.pad(x, (1 - q, q, 1 - p, p))
            out[:, :, :, p::2, q::2] = F.conv3d(padded, taps[:, :, None], bias)
    return out


def test_folding_the_upsampling_is_exact_in_fp32_and_costs_no_precision_in_bf16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, w, b = draw(1, 8, 2, 3, 5), draw(4, 8, 3, 3) / 8, draw(4)
    assert torch.allclose(folded(x, w, b), reference.conv_double(x, w, b), atol=2e-6)
    torch.manual_seed(1)
    low = VAE(VAEConfig.tiny()).bfloat16()
    exact = VAE(VAEConfig.tiny())
    exact.load_state_dict(low.state_dict())
    z = torch.randn(1, 16, 3, 4, 6)
    pixels = exact.decode(z)
    plain = (low.decode(z).float() - pixels).norm()
    monkeypatch.setattr(ops_vae, "conv_double", folded)
    assert (low.decode(z).float() - pixels).norm() < 1.2 * plain


@pytest.mark.gpu
def test_gpu_the_vae_in_bf16_is_as_near_to_fp32_on_the_kernels_as_on_the_libraries() -> None:
    torch.manual_seed(0)
    low = channels_last_(VAE(VAEConfig()).bfloat16()).cuda()
    exact = VAE(VAEConfig()).cuda()
    exact.load_state_dict(low.state_dict())
    channels_last_(exact)
    z, x = torch.randn(1, 16, 4, 12, 22).cuda(), torch.rand(1, 3, 13, 96, 176).cuda() * 2 - 1
    pixels, latents = exact.decode(z), exact.encode(x, 4)
    names = {
        "conv3d": "cudnn", "conv_half": "library", "conv_double": "library", "norm_silu": "composed",
        "attention_wide": "sdpa",
    }  # fmt: skip
    with use(**names):
        plain = (low.decode(z).float() - pixels).norm(), (low.encode(x, 4).float() - latents).norm()
    with use(**dict.fromkeys(names, "triton")):
        ours = (low.decode(z).float() - pixels).norm(), (low.encode(x, 4).float() - latents).norm()
        assert torch.equal(low.decode(z, 1)[:, :, :5], low.decode(z[:, :, :2], 1)), "windows change nothing"
    assert ours[0] < 1.2 * plain[0] and ours[1] < 1.2 * plain[1]


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (lambda x, w, b: ops_vae.conv3d(x, w[:, :2], b), "x must be (B, C, F, H, W), weight (O, C, t, r, s)"),
        (lambda x, w, b: ops_vae.conv3d(x, w.half(), b), "of one dtype"),
        (lambda x, w, b: ops_vae.conv3d(x[:, :, :2], w, b), "as many frames, rows and columns"),
        (lambda x, w, b: ops_vae.conv3d(x, w, b, x), "residual must be (1, 3, 1, 2, 3)"),
        (lambda x, w, b: ops_vae.conv3d(x, w, b, None, 0), "time_stride must be at least 1"),
        (lambda x, w, b: ops_vae.conv_half(x, w[:, :, 0], b), "H must be at least 2 and W even"),
        (lambda x, w, b: ops_vae.conv_double(x, w, b), "weight must be (O, C, 3, 3)"),
        (lambda x, w, b: ops_vae.norm_silu(x, b), "gamma have C values"),
        (lambda x, w, b: ops_vae.norm_silu(x, torch.ones(4), x), "past and keep must be (1, 4, 2, 4, 5)"),
    ],
)
def test_wrong_operands_are_named(call: Any, rule: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(rule)):
        call(torch.zeros(1, 4, 3, 4, 5), torch.zeros(3, 4, 3, 3, 3), torch.zeros(3))


def test_a_pass_of_one_window_keeps_no_history() -> None:
    layer = torch.nn.Identity()
    assert Stream(keep=False).past(layer, draw(1, 4, 3, 2, 2)) is None
    held = Stream().past(layer, draw(1, 4, 3, 2, 2))
    assert held is not None and held.shape == (1, 4, 2, 2, 2) and not held.any()
