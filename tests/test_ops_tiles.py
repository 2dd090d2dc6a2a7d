"""8-bit attention over lists of key tiles: the op's contract, the policy that fills lists, merging, how a kernel is chosen."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cosmos_fast import attention8, ops_attention8, reference, self_attention, testing
from cosmos_fast.dispatch import TABLE
from cosmos_fast.ops_attention8 import Codes
from cosmos_fast.ops_tiles import KeyTiles, attention_fp8_tiles, estimated_tiles, merged
from cosmos_fast.packing import TILE_KEYS, TILE_QUERIES
from cosmos_fast.self_attention8 import SparseFp8

testing.kernels_from_checkout()
N, K = 2, 64


def codes(L: int, S: int, K: int = K, device: str = "cpu", pack: bool = True) -> Codes:
    draw = torch.Generator().manual_seed(L + 3 * S)
    q, k, v = ((torch.randn(n, N, K, generator=draw) * 30).to(torch.float8_e4m3fn) for n in (L, S, S))
    v_step, v_mean = torch.rand(N, K, generator=draw) + 0.5, torch.randn(N, K, generator=draw)
    step = torch.full((1,), 1.5 * K**-0.5 / 900)
    given = q, k, reference.packed(v) if pack else v, step, v_step, v_mean
    return Codes(*(x.to(device) for x in given))


def flags_of(tiles: KeyTiles, L: int, S: int) -> Tensor:
    """(N, L, S): which keys count for which queries."""
    kept = torch.zeros(*tiles.key_counts.shape, -(-S // TILE_KEYS), dtype=torch.bool)
    for at in torch.cartesian_prod(*map(torch.arange, tiles.key_counts.shape)).tolist():
        kept[at[0], at[1], tiles.key_tiles[at[0], at[1], : int(tiles.key_counts[at[0], at[1]])].long()] = True
    return kept.repeat_interleave(TILE_QUERIES, 1)[:, :L].repeat_interleave(TILE_KEYS, 2)[..., :S]


def masked(c: Codes, keep: Tensor) -> tuple[Tensor, Tensor]:
    """fp64 output and lse over the keys where keep (N, L, S)."""
    v = c.v if c.v.shape == c.k.shape else reference.unpacked(c.v, c.k.shape[0])
    score = c.q.double().transpose(0, 1) @ c.k.double().permute(1, 2, 0) * c.score_step.double()
    weights = torch.softmax(score.masked_fill(~keep, -math.inf), -1)
    values = weights @ (v.double() * c.v_step.double() + c.v_mean.double()).transpose(0, 1)
    return values.transpose(0, 1), score.masked_fill(~keep, -math.inf).logsumexp(-1)


@pytest.mark.parametrize("pack", [True, False])
def test_lists_are_masks(pack: bool) -> None:
    L, S = 200, 500
    c = codes(L, S, pack=pack)
    tiles = estimated_tiles(c, share=0.5)
    out, lse = attention_fp8_tiles(c, tiles, torch.float32)
    exact, sums = masked(c, flags_of(tiles, L, S))
    assert testing.rel_error(out, exact) < 1e-5 and float((lse.double() - sums).abs().max()) < 1e-4


def test_all_tiles_in_any_order_are_dense_attention() -> None:
    c = codes(200, 500)
    every = estimated_tiles(c)
    assert torch.equal(every.key_tiles, torch.arange(6, dtype=torch.int32).expand(N, 2, 6))
    assert bool((every.key_counts == 6).all())
    backwards = KeyTiles(every.key_tiles.flip(-1).contiguous(), every.key_counts)
    dense = reference.attention_fp8(c.q, c.k, c.v, c.score_step, c.v_step, c.v_mean, torch.float32)
    for tiles in (every, backwards):
        assert testing.rel_error(attention_fp8_tiles(c, tiles, torch.float32)[0], dense.double()) < 1e-5


def test_a_query_tile_without_keys_gets_the_mean_and_merges_as_nothing() -> None:
    c = codes(200, 300)
    tiles = estimated_tiles(c)
    counts = tiles.key_counts.clone()
    counts[0, 0] = 0
    out, lse = attention_fp8_tiles(c, KeyTiles(tiles.key_tiles, counts), torch.float32)
    assert torch.equal(out[:TILE_QUERIES, 0], c.v_mean[0].expand(TILE_QUERIES, -1))
    assert bool((lse[0, :TILE_QUERIES] == -math.inf).all()) and bool(lse[0, TILE_QUERIES:].isfinite().all())
    none = attention_fp8_tiles(c, KeyTiles(tiles.key_tiles, counts * 0), torch.float32)
    for parts in ([(out, lse), none], [none, (out, lse)]):
        both, sums = merged(parts)
        assert torch.allclose(both, out) and torch.equal(sums, lse)
    nothing, sums = merged([none, none])
    assert torch.allclose(nothing, c.v_mean.expand_as(nothing)) and bool((sums == -math.inf).all())


def test_disjoint_lists_merge_into_all_keys() -> None:
    c = codes(200, 500)
    chosen = estimated_tiles(c, share=0.4).key_tiles[..., :3]
    rest = torch.stack([torch.stack([torch.tensor([t for t in range(6) if t not in row.tolist()]) for row in head]) for head in chosen])  # fmt: skip
    parts = [
        attention_fp8_tiles(
            c, KeyTiles(x.int().contiguous(), torch.full((N, 2), 3, dtype=torch.int32)), torch.float32
        )
        for x in (chosen, rest)
    ]
    out, lse = merged(parts)
    exact, sums = masked(c, torch.ones(N, 200, 500, dtype=torch.bool))
    assert testing.rel_error(out, exact) < 1e-5 and float((lse.double() - sums).abs().max()) < 1e-4


# --- the policy ---


def pointed(S: int = 960, tiles: int = 3) -> Codes:
    """Head n of query tile i looks at key tile (2 i + 5 n) % 10, and a little at the one behind it."""
    c = codes(tiles * TILE_QUERIES, S)
    q, k = c.q.float() * 0.02, c.k.float() * 0.02
    for n in range(N):
        for i in range(tiles):
            q[i * TILE_QUERIES : (i + 1) * TILE_QUERIES, n, i] = 64.0
            for share, at in ((1.0, (2 * i + 5 * n) % 10), (0.8, (2 * i + 5 * n + 1) % 10)):
                k[at * TILE_KEYS : (at + 1) * TILE_KEYS, n, i] = 64.0 * share
    q, k = (x.to(torch.float8_e4m3fn) for x in (q, k))
    return Codes(q, k, c.v, torch.full((1,), 8.0 / 64**2), c.v_step, c.v_mean)


def test_top_k_keeps_the_tiles_that_matter_most() -> None:
    tiles = estimated_tiles(pointed(), share=0.2)
    assert bool((tiles.key_counts == 2).all())
    for n in range(N):
        for i in range(3):
            first = (2 * i + 5 * n) % 10
            assert sorted({first, (first + 1) % 10}) == tiles.key_tiles[n, i, :2].tolist()


def test_top_p_keeps_as_many_as_hold_the_mass() -> None:
    c = pointed()
    # Weights: e^8 and e^6.4 of e^8 + e^6.4 + 8.
    assert bool((estimated_tiles(c, mass=0.8).key_counts == 1).all())
    assert bool((estimated_tiles(c, mass=0.9).key_counts == 2).all())
    assert bool((estimated_tiles(c, mass=0.9, share=0.1).key_counts == 1).all())
    assert bool((estimated_tiles(c, share=1e-9).key_counts == 1).all())
    exact = masked(c, torch.ones(N, len(c.q), len(c.k), dtype=torch.bool))[0] - c.v_mean
    kept = attention_fp8_tiles(c, estimated_tiles(c, mass=0.95), torch.float32)[0] - c.v_mean
    few = attention_fp8_tiles(c, estimated_tiles(c, share=0.1), torch.float32)[0] - c.v_mean
    assert testing.rel_error(kept, exact) < 0.15 < testing.rel_error(few, exact)


def test_a_short_last_tile_weighs_by_its_keys() -> None:
    c = codes(TILE_QUERIES, 2 * TILE_KEYS + 1)
    flat = Codes(c.q, torch.zeros_like(c.k), c.v, c.score_step, c.v_step, c.v_mean)
    assert estimated_tiles(flat, share=0.5).key_tiles[..., :2].tolist() == [[[0, 1]]] * N
    assert estimated_tiles(flat, mass=0.99).key_counts.tolist() == [[2]] * N  # 192 of 193 keys
    assert estimated_tiles(flat, mass=0.999).key_counts.tolist() == [[3]] * N


@pytest.mark.parametrize("wrong", [{"share": 0.0}, {"share": 1.1}, {"mass": 0.0}, {"mass": float("nan")}])
def test_the_policy_refuses_what_is_no_share(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="estimated_tiles: .* must be above 0 and at most 1, got"):
        estimated_tiles(codes(5, 20), **wrong)


@pytest.mark.parametrize("change", ["rows", "kind", "stride", "counts"])
def test_lists_of_another_shape_are_refused(change: str) -> None:
    c = codes(200, 500)
    tiles = estimated_tiles(c)
    lists = {
        "rows": (tiles.key_tiles[:, :1].contiguous(), tiles.key_counts),
        "kind": (tiles.key_tiles.long(), tiles.key_counts),
        "stride": (tiles.key_tiles[..., ::2], tiles.key_counts),
        "counts": (tiles.key_tiles, tiles.key_counts[:, :1].contiguous()),
    }[change]
    with pytest.raises(
        (ValueError, RuntimeError), match="attention_fp8_tiles: key_tiles must be contiguous int32"
    ):
        attention_fp8_tiles(c, KeyTiles(*lists))


def test_a_layer_attends_to_the_tiles_it_keeps() -> None:
    L = 400
    draw = torch.Generator().manual_seed(0)
    qkv = torch.randn(L, 3 * N * K, generator=draw)
    qkv[:, : 2 * N * K] += 2 * torch.randn(5, 2 * N * K, generator=draw).repeat_interleave(
        80, 0
    )  # tokens come in kinds
    angle = torch.zeros(L, K // 2)
    given = qkv, torch.ones(K), torch.ones(K), angle.cos(), angle.sin()
    exact = self_attention.exact(*given, 0).double()
    errors = [testing.rel_error(SparseFp8(share=share)(*given, 0), exact) for share in (1.0, 0.6, 0.2)]
    assert errors[0] < 0.06 and errors[0] < errors[1] < errors[2]
    assert testing.rel_error(SparseFp8(mass=0.99)(*given, 0), exact) < errors[2]


# --- how a kernel is chosen ---


def kernel_on_cpu(fault: str) -> Any:
    """attention8_cuda over lists as documented, but for one fault."""

    def attention8_cuda(q: Tensor, k: Tensor, v: Tensor, step: Tensor, v_step: Tensor, v_mean: Tensor, tiles: Tensor, counts: Tensor, out_step: Any) -> Any:  # fmt: skip
        if fault == "first":
            tiles = tiles.sort(-1).values
            tiles = torch.cat((tiles[..., :1] * 0, tiles[..., 1:]), -1).contiguous()
        if fault == "count":
            counts = (counts - 1).clamp_min(1)
        out, lse = reference.attention_fp8_tiles(q, k, v, step, v_step, v_mean, torch.bfloat16, tiles, counts)
        return out, lse * (0.5 if fault == "lse" else 1.0)

    return attention8_cuda


@pytest.mark.parametrize("fault", ["", "first", "count", "lse"])
def test_a_kernel_that_sees_other_tiles_is_not_chosen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    proven = attention8.proven
    monkeypatch.setattr(attention8, "proven", lambda name, attend: proven(name, attend, "cpu"))
    monkeypatch.setattr(torch.ops.cosmos_fast, "attention8_cuda", kernel_on_cpu(fault), raising=False)
    attention8.load_own_tiles.cache_clear()
    try:
        if fault:
            with pytest.raises(RuntimeError, match="own over lists: relative error of a small example"):
                attention8.load_own_tiles()
        else:
            c = codes(200, 500, K=128)
            tiles = estimated_tiles(c, share=0.5)
            lists = tiles.key_tiles, tiles.key_counts
            operands = c.q, c.k, reference.unpacked(c.v, 500), c.score_step, c.v_step, c.v_mean, torch.float32
            out, lse = attention8.load_own_tiles()(*operands, *lists)
            exact, sums = masked(c, flags_of(tiles, 200, 500))
            assert testing.rel_error(out, exact) < 1e-2 and torch.allclose(lse.double(), sums, atol=1e-3)
    finally:
        attention8.load_own_tiles.cache_clear()


def test_candidates_in_order() -> None:
    order = [candidate.name for candidate in TABLE["attention_fp8_tiles"].candidates]
    assert order == ["own", "triton", "reference"]


@pytest.mark.gpu
@pytest.mark.parametrize("K", [64, 128])
def test_on_a_gpu_lists_are_masks_and_all_tiles_are_dense(K: int) -> None:
    L, S = 1000, 4113
    c = codes(L, S, K, "cuda")
    tiles = estimated_tiles(c, share=0.3, mass=0.9)
    on_cpu = Codes(*(getattr(c, name).cpu() for name in ("q", "k", "v", "score_step", "v_step", "v_mean")))
    lists = KeyTiles(tiles.key_tiles.cpu(), tiles.key_counts.cpu())
    out, lse = (x.cpu() for x in attention_fp8_tiles(c, tiles))
    exact, sums = masked(on_cpu, flags_of(lists, L, S))
    assert testing.rel_error(out.double() - on_cpu.v_mean, exact - on_cpu.v_mean) < 0.04
    assert float((lse.double() - sums).abs().max()) < 1e-2
    means = torch.ops.cosmos_fast.tile_means(c.k, TILE_KEYS).cpu()
    assert testing.rel_error(means, reference.tile_means(on_cpu.k, TILE_KEYS).double()) < 1e-5
    dense = ops_attention8.attention_fp8(c).float()
    every = attention_fp8_tiles(c, estimated_tiles(c))[0].float()
    assert testing.rel_error(every - c.v_mean, (dense - c.v_mean).double()) < 1e-2


def test_tiles_are_those_of_the_kernels() -> None:
    from cosmos_fast.kernels import attention8 as twin

    source = (Path(__file__).resolve().parents[1] / "csrc" / "attention8.cu").read_text()
    built = re.search(r"warpgroups = (\d+), keys = (\d+)", source)
    assert built is not None
    assert twin.TILE == (TILE_QUERIES, TILE_KEYS) == (64 * int(built[1]), int(built[2]))
