"""Attention of wide heads: where tiles end, rows that do not know of each other, what is not finite, what is refused."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from cosmos_fast import ops_vae, testing
from cosmos_fast.dispatch import TABLE, use

testing.kernels_from_checkout()


def draw(L: int, S: int, N: int, K: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(L, N, K).to(dtype), torch.randn(S, N, K).to(dtype), torch.randn(S, N, K).to(dtype)


# Tiles as (queries, keys, warps, stages).
CUTS = {
    "as on a GPU in half precision": (128, 32, 8, 2),
    "as in fp32": (16, 16, 4, 1),
    "wide": (32, 64, 4, 1),
}


@pytest.mark.interpret
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("L", "S", "N", "K"),
    [(150, 70, 1, 384), (128, 64, 2, 256), (1, 1, 1, 384), (33, 31, 2, 129), (7, 129, 3, 8)],
)
def test_every_cut_gives_the_same(cut: str, dtype: torch.dtype, L: int, S: int, N: int, K: int) -> None:
    from cosmos_fast.kernels import attention_wide as wide

    args = draw(L, S, N, K, dtype)
    y = wide.attention_wide(*args, tiles=wide.Tiles(*CUTS[cut]))
    assert testing.faults("attention_wide", y, args) == []


@pytest.mark.interpret
def test_operands_may_be_views_of_any_kind() -> None:
    from cosmos_fast.kernels.attention_wide import attention_wide

    side = torch.randn(40, 3, 2, 160).unbind(1)
    heads_first = tuple(torch.randn(2, 40, 160).transpose(0, 1) for _ in range(3))
    spaced = tuple(torch.randn(40, 2, 320)[..., ::2] for _ in range(3))
    repeated = tuple(torch.randn(1, 1, 160).expand(40, 2, 160) for _ in range(3))
    for views in (side, heads_first, spaced, repeated, (side[0], heads_first[1], spaced[2])):
        dense = tuple(x.contiguous() for x in views)
        assert torch.equal(attention_wide(*views), attention_wide(*dense))
        assert testing.faults("attention_wide", attention_wide(*views), views) == []


def check_some_rows(
    L: int, start: int, stop: int, device: str, dtype: torch.dtype, tiles: Any = None
) -> None:
    """Rows of a tensor that all queries share, as a rank of several gets them."""
    from cosmos_fast.kernels.attention_wide import attention_wide

    q, k, v = torch.randn(L, 3, 1, 384, device=device).to(dtype).unbind(1)
    everything = attention_wide(q, k, v, tiles=tiles)
    assert torch.equal(attention_wide(q[start:stop], k, v, tiles=tiles), everything[start:stop])
    assert torch.equal(attention_wide(q[start:stop].clone(), k, v, tiles=tiles), everything[start:stop])


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("start", "stop"), [(0, 45), (37, 150), (5, 6), (19, 147)])
def test_some_queries_give_the_rows_that_all_give_bit_for_bit(
    dtype: torch.dtype, start: int, stop: int
) -> None:
    from cosmos_fast.kernels.attention_wide import HALF

    check_some_rows(150, start, stop, "cpu", dtype, HALF)


@pytest.mark.gpu
@pytest.mark.parametrize(("start", "stop"), [(1234, 9876), (0, 7040), (14079, 14080)])
def test_gpu_some_queries_give_the_rows_that_all_give_bit_for_bit(start: int, stop: int) -> None:
    check_some_rows(14080, start, stop, "cuda", torch.bfloat16)


@pytest.mark.interpret
def test_large_scores_neither_overflow_nor_lose_the_others() -> None:
    from cosmos_fast.kernels.attention_wide import attention_wide

    q, k, v = draw(20, 50, 1, 384)
    args = q * 40, k * 40, v  # scores of thousands: the softmax picks one key
    y = attention_wide(*args)
    assert torch.isfinite(y).all() and testing.faults("attention_wide", y, args) == []
    far = q.abs() + 1, -k.abs() - 1, v  # all scores far below zero: what is masked must not win as zero would
    assert testing.faults("attention_wide", attention_wide(*far), far) == []


@pytest.mark.interpret
def test_a_nan_in_a_query_stays_in_its_row_and_one_in_a_key_is_not_hidden() -> None:
    from cosmos_fast.kernels.attention_wide import attention_wide

    q, k, v = draw(20, 37, 1, 384)
    q[3, 0, 300] = math.nan
    y = attention_wide(q, k, v)
    assert y[3].isnan().all() and torch.isfinite(y[:3]).all() and torch.isfinite(y[4:]).all()
    k[36, 0, 2] = math.nan
    assert attention_wide(q, k, v).isnan().all()


@pytest.mark.interpret
def test_a_head_too_wide_is_refused_with_what_to_do() -> None:
    from cosmos_fast.kernels.attention_wide import attention_wide

    with pytest.raises(
        ValueError, match=r"at most 384 wide, got 392\. Take COSMOS_FAST_OPS=attention_wide=sdpa"
    ):
        attention_wide(*draw(2, 2, 1, 392))


def test_the_library_takes_views_and_gives_a_dense_result() -> None:
    views = torch.randn(9, 3, 2, 24).unbind(1)
    with use(attention_wide="sdpa"):
        y = ops_vae.attention_wide(*views)
    assert y.is_contiguous() and testing.faults("attention_wide", y, views, "sdpa") == []
    names = [candidate.name for candidate in TABLE["attention_wide"].candidates]
    assert names == ["triton", "sdpa", "reference"]


@pytest.mark.parametrize(
    ("q", "k", "v", "rule"),
    [
        ((4, 1, 8), (0, 1, 8), (0, 1, 8), "there must be at least one key"),
        ((0, 1, 8), (0, 1, 8), (0, 1, 8), "there must be at least one key"),
        ((4, 1, 8), (5, 2, 8), (5, 2, 8), "q must be (L, N, K), k and v (S, N, K), of one dtype"),
        ((4, 1, 8), (5, 1, 8), (6, 1, 8), "q must be (L, N, K), k and v (S, N, K), of one dtype"),
        ((4, 8), (5, 8), (5, 8), "q must be (L, N, K), k and v (S, N, K), of one dtype"),
    ],
)
def test_wrong_operands_are_named(q: Any, k: Any, v: Any, rule: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(rule)):
        ops_vae.attention_wide(torch.zeros(q), torch.zeros(k), torch.zeros(v))
