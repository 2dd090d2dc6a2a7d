"""linear_gelu: the error of its polynomial, what is not finite, tiles that end inside the operands, and what it refuses."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cosmos_fast import ops, testing
from cosmos_fast.dispatch import TABLE, use

testing.kernels_from_checkout()


def gelu_of(x: torch.Tensor, fine: bool = True) -> torch.Tensor:
    """The kernel's GELU of 8 * n values in fp32: one product with the unit matrix."""
    from cosmos_fast.kernels import linear_gelu

    return linear_gelu.linear_gelu(x.view(-1, 8), torch.eye(8), fine=fine).flatten()


@pytest.mark.interpret
def test_gelu_is_as_exact_as_fp32_allows_and_more_so_in_the_tail() -> None:
    x = torch.linspace(-9, 9, 8 * 2048)
    exact, mine, torchs = F.gelu(x.double()), gelu_of(x).double(), F.gelu(x).double()
    tail = (x.double() * torch.special.erfc(-x.double() / math.sqrt(2)) / 2)[x < -4]
    assert (mine - exact).abs().max() < 6e-7  # half an ulp of 9 is 4.8e-7
    near = x.abs() < 4
    assert (mine - exact)[near].abs().max() <= (torchs - exact)[near].abs().max()
    assert ((mine[x < -4] - tail) / tail).abs().max() < 1e-3


@pytest.mark.interpret
def test_the_polynomial_of_half_precision_is_far_below_its_rounding() -> None:
    x = torch.linspace(-9, 9, 8 * 4096)
    exact, mine = F.gelu(x.double()), gelu_of(x, fine=False).double()
    gap = (mine - exact).abs()
    assert gap.max() < 5.7e-6
    assert (gap <= exact.abs() * 2**-9 / 50 + 1e-7)[exact.abs() > 1e-3].all()  # bf16 rounds by up to 2^-9
    assert (mine.diff()[x[1:] < -2] <= 0).all(), "the tail must rise to 0 without a bump"


@pytest.mark.interpret
def test_gelu_of_extremes() -> None:
    x = torch.tensor([0.0, 1e30, -1e30, 60.0, -60.0, 1e-3, -1e-3, 11.0])
    expected = torch.tensor([0.0, 1e30, 0.0, 60.0, 0.0, 5.0039894e-4, -4.9960106e-4, 11.0])
    # Beyond 10.5 the tail stays at 4e-26 instead of falling to nothing.
    torch.testing.assert_close(gelu_of(x), expected, rtol=1e-5, atol=1e-24)


@pytest.mark.interpret
def test_a_nan_stays_in_its_row_and_is_not_hidden() -> None:
    from cosmos_fast.kernels import linear_gelu

    x, w = torch.randn(3, 16), torch.randn(8, 16)
    x[1, 5] = math.nan
    y = linear_gelu.linear_gelu(x, w)
    assert y[1].isnan().all() and torch.isfinite(y[::2]).all()


@pytest.mark.interpret
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("programs", [1, 3])
def test_every_cut_gives_the_same(parts: int, programs: int) -> None:
    from cosmos_fast.kernels import linear_gelu

    args = torch.randn(70, 40).half(), torch.randn(136, 40).half() / 4
    tiles = linear_gelu.Tiles(16, 64, 16, 4, 2, group=2, parts=parts, programs=programs)
    assert testing.faults("linear_gelu", linear_gelu.linear_gelu(*args, tiles=tiles), args) == []


@pytest.mark.interpret
def test_a_view_off_16_bytes_is_taken() -> None:
    from cosmos_fast.kernels import linear_gelu

    flat = torch.randn(1 + 4 * 16)
    x, w = flat[1:].view(4, 16), torch.randn(8, 16)
    assert testing.faults("linear_gelu", linear_gelu.linear_gelu(x, w), (x, w)) == []


def test_composed_is_what_the_two_published_modules_give_bit_for_bit() -> None:
    x, w = torch.randn(9, 64).bfloat16(), torch.randn(32, 64).bfloat16() / 4
    with use(linear_gelu="composed"):
        assert torch.equal(ops.linear_gelu(x, w), ops.gelu(F.linear(x, w)))
    assert TABLE["linear_gelu"].resolve(x.device, torch.float32)(x.float(), w.float()).dtype == torch.float32


@pytest.mark.parametrize(
    ("x", "w", "rule"),
    [
        (torch.zeros(4, 16), torch.zeros(8, 24), "x must be (L, D) and w (M, D)"),
        (torch.zeros(4, 16), torch.zeros(8, 16).half(), "of one dtype"),
        (torch.zeros(4, 12), torch.zeros(8, 12), "D and M must be multiples of 8"),
        (torch.zeros(4, 16), torch.zeros(9, 16), "D and M must be multiples of 8"),
        (torch.zeros(4, 32)[:, ::2], torch.zeros(8, 16), "must be contiguous"),
    ],
)
def test_wrong_operands_are_named(x: Any, w: Any, rule: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(rule)):
        ops.linear_gelu(x, w)
