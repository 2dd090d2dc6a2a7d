"""head_norm and qk_norm_rope: norms, rotations, and what they must not touch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cosmos_fast import ops, testing
from cosmos_fast.formats import cuts
from cosmos_fast.ops import EPS

testing.kernels_from_checkout()


def kernels() -> Any:
    from cosmos_fast.kernels import norm_rope

    return norm_rope


@pytest.mark.interpret
def test_heads_have_the_norm_of_their_gain() -> None:
    x, gain = torch.randn(5, 3 * 32) * 50, torch.full((32,), 2.0)
    y = kernels().head_norm(x, gain, EPS)
    torch.testing.assert_close(y.square().mean(-1), torch.full((5, 3), 4.0))
    assert torch.equal(kernels().head_norm(torch.zeros(2, 64), gain, EPS), torch.zeros(2, 2, 32))


@pytest.mark.interpret
def test_rotation_keeps_norms_and_products_of_tokens_at_one_place() -> None:
    qkv, gain, angle = torch.randn(4, 3 * 2 * 32), torch.ones(32), torch.rand(4, 16) * 6
    still = kernels().qk_norm_rope(qkv, gain, gain, torch.ones(4, 16), torch.zeros(4, 16), EPS)
    turned = kernels().qk_norm_rope(qkv, gain, gain, angle.cos(), angle.sin(), EPS)
    for a, b in zip(still, turned, strict=True):
        torch.testing.assert_close(a.norm(dim=-1), b.norm(dim=-1))
    products = [(q * k).sum(-1) for q, k in (still, turned)]
    torch.testing.assert_close(*products, rtol=1e-4, atol=1e-4)


@pytest.mark.interpret
def test_a_quarter_turn_swaps_the_halves() -> None:
    qkv, gain = torch.randn(3, 3 * 64), torch.ones(64)
    plain = kernels().head_norm(qkv[:, :64], gain, EPS)
    q, _ = kernels().qk_norm_rope(qkv, gain, gain, torch.zeros(3, 32), torch.ones(3, 32), EPS)
    torch.testing.assert_close(q, torch.cat((-plain[..., 32:], plain[..., :32]), -1))


@pytest.mark.interpret
def test_q_and_k_have_gains_of_their_own_and_v_counts_for_nothing() -> None:
    qkv, ones, still = torch.randn(2, 3 * 64), torch.ones(64), (torch.ones(2, 32), torch.zeros(2, 32))
    qkv[:, 128:] = float("nan")
    q, k = kernels().qk_norm_rope(qkv, ones, 3 * ones, *still, EPS)
    torch.testing.assert_close(q[:, 0], kernels().head_norm(qkv[:, :64], ones, EPS)[:, 0])
    torch.testing.assert_close(k[:, 0], 3 * kernels().head_norm(qkv[:, 64:128], ones, EPS)[:, 0])


@pytest.mark.interpret
def test_the_norm_is_rounded_before_the_rotation() -> None:
    """As the published network does it, in two modules."""
    qkv, gain, angle = torch.randn(6, 3 * 2 * 64).half(), torch.randn(64).half(), torch.rand(6, 32) * 6
    q, _ = kernels().qk_norm_rope(qkv, gain, gain, angle.cos(), angle.sin(), EPS)
    low, high = kernels().head_norm(qkv[:, :128], gain, EPS).float().chunk(2, -1)
    c, s = angle.cos()[:, None], angle.sin()[:, None]
    expected = torch.cat((low * c - high * s, high * c + low * s), -1).half()
    assert torch.equal(q, expected)


def test_v_is_a_view_of_the_projection() -> None:
    qkv, gain, still = torch.randn(3, 3 * 2 * 32), torch.ones(32), (torch.ones(3, 16), torch.zeros(3, 16))
    q, k, v = ops.qk_norm_rope(qkv, gain, gain, *still)
    assert q.shape == k.shape == v.shape == (3, 2, 32)
    assert v.data_ptr() == qkv[:, 128:].data_ptr() and torch.equal(v.flatten(1), qkv[:, 128:])


def test_wrong_operands_are_named() -> None:
    gain = torch.ones(32)
    with pytest.raises(RuntimeError, match=r"qkv must be contiguous \(L, 3\*N\*K\)"):
        ops.qk_norm_rope(torch.zeros(2, 64), gain, gain, torch.zeros(2, 16), torch.zeros(2, 16))
    with pytest.raises(RuntimeError, match=r"cos and sin must be \(2, 16\) float32"):
        ops.qk_norm_rope(torch.zeros(2, 96), gain, gain, torch.zeros(2, 16), torch.zeros(3, 16))
    with pytest.raises(RuntimeError, match="with K = 32"):
        ops.head_norm(torch.zeros(2, 48), gain)


@pytest.mark.interpret
@pytest.mark.parametrize("columns, parts", [(1, 1), (2, 1), (2, 2), (3, 2), (2, 3), (6, 4)])
def test_what_travels_is_bit_for_bit_what_one_rank_makes(columns: int, parts: int) -> None:
    qkv, gains, angle = torch.randn(5, 3 * 6 * 32).half(), torch.randn(2, 32).half(), torch.rand(5, 16) * 6
    given = qkv, *gains, angle.cos(), angle.sin()
    q, k = kernels().qk_norm_rope(*given, EPS)
    own = cuts(6 // columns, parts)
    found = [kernels().qkv_packed(*given, columns, heads.start, heads.stop, EPS) for heads in own]
    for i, x in enumerate((q, k, qkv[:, 384:].view(5, 6, 32))):
        heads = torch.cat([part[:, :, i] for part in found], dim=2)  # (columns, L, heads of a column, K)
        assert torch.equal(heads.transpose(0, 1).flatten(1, 2), x)
