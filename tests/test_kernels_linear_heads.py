"""linear_head_norm: what a norm over a tile must keep apart, widths of tiles and heads, and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cosmos_fast import ops, testing
from cosmos_fast.dispatch import use
from cosmos_fast.ops import EPS

testing.kernels_from_checkout()


def kernels() -> Any:
    from cosmos_fast.kernels import linear_heads

    return linear_heads


@pytest.mark.interpret
def test_heads_have_the_norm_of_their_gain_whatever_their_scale() -> None:
    x, w, gain = torch.randn(5, 32), torch.randn(4 * 16, 32), torch.full((16,), 3.0)
    w[:16] *= 1e3
    w[16:32] *= 1e-2
    y = kernels().linear_head_norm(x, w, gain, EPS)
    torch.testing.assert_close(y.square().mean(-1), torch.full((5, 4), 9.0), rtol=2e-3, atol=0)


@pytest.mark.interpret
@pytest.mark.parametrize("width", [16, 32, 128])
@pytest.mark.parametrize("programs", [1, 3])
def test_every_tile_gives_the_same(width: int, programs: int) -> None:
    """Tiles of one head, of two, and of more than there are; tiles narrower than a head."""
    from cosmos_fast.kernels.tiles import Tiles

    tiles = Tiles(16, width, 16, 4, 2, group=2, programs=programs)
    for K in (16, 64):
        args = torch.randn(37, 40).half(), torch.randn(3 * K, 40).half() / 6, torch.randn(K).half(), EPS
        out = kernels().linear_head_norm(*args, tiles=tiles)
        assert testing.faults("linear_head_norm", out, args) == []


@pytest.mark.interpret
@pytest.mark.parametrize("K", [8, 24, 96])
def test_heads_that_are_no_part_of_a_tile(K: int) -> None:
    args = torch.randn(7, 40).half(), torch.randn(3 * K, 40).half() / 6, torch.randn(K).half(), EPS
    assert testing.faults("linear_head_norm", kernels().linear_head_norm(*args), args) == []


@pytest.mark.interpret
def test_a_nan_stays_in_its_token() -> None:
    x, w = torch.randn(3, 16), torch.randn(32, 16)
    x[1, 5] = float("nan")
    y = kernels().linear_head_norm(x, w, torch.ones(16), EPS)
    assert y[1].isnan().all() and torch.isfinite(y[::2]).all()


def test_composed_is_what_the_two_published_modules_give_bit_for_bit() -> None:
    x, w, gain = torch.randn(9, 64).bfloat16(), torch.randn(32, 64).bfloat16() / 4, torch.randn(16).bfloat16()
    with use(linear_head_norm="composed"):
        assert torch.equal(ops.linear_head_norm(x, w, gain), ops.head_norm(F.linear(x, w), gain))


@pytest.mark.parametrize(
    ("x", "w", "gain", "rule"),
    [
        (torch.zeros(4, 16), torch.zeros(32, 24), torch.ones(16), "x must be (L, D) and w (N*K, D)"),
        (torch.zeros(4, 16), torch.zeros(32, 16).half(), torch.ones(16), "of one dtype"),
        (torch.zeros(4, 12), torch.zeros(32, 12), torch.ones(16), "D must be a multiple of 8"),
        (torch.zeros(4, 16), torch.zeros(36, 16), torch.ones(16), "w (N*K, D)"),
        (torch.zeros(4, 32)[:, ::2], torch.zeros(32, 16), torch.ones(16), "must be contiguous"),
    ],
)
def test_wrong_operands_are_named(x: Any, w: Any, gain: Any, rule: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(rule)):
        ops.linear_head_norm(x, w, gain)
