"""Attention over e4m3 codes, dense or over lists of key tiles: `attention_fp8`, `attention_fp8_tiles`, `values_packed`, `tile_means`.

    score = score_step * (q . k)
    out   = softmax over the keys (score) @ (v_step * v) + v_mean, or with out_step (1,) codes of it: out / out_step
    lse   = log of the sum of exp(score) over the same keys, natural

Shapes: q (L, N, K), k (S, N, K), their rows may lie apart, v (S, N, K) or packed (N, K, S up to 16, see `reference.packed`,
by `values_packed` where it comes from other ranks: 0.35 GB at L 84480, 0.116 ms at 2.98 TB/s), all e4m3; score_step
(1,), v_step and v_mean (N, K) fp32. Weights are rounded to e4m3 before they meet v, multiplied by 2^LIFT so that small
ones keep their digits; their sum is of what they were before. The readable twin of csrc/attention8.cuh, and what runs
where that does not.

The sparse form takes for each head and each query tile the key tiles it sees: key_tiles (N, query tiles, capacity) int32 in
any order, of which the first key_counts (N, query tiles) int32 count. Time goes with the tiles kept. With lse, outputs over
disjoint lists merge into that over all their keys: weights exp(lse - lse of all).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from cosmos_fast.kernels.launch import on_device_of
from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """Queries and keys of one step of a program, both powers of two; warps of 32 threads; steps loaded ahead."""

    queries: int
    keys: int
    warps: int
    stages: int


# Not measured yet.
DENSE, SPARSE = Tiling(128, 128, 8, 3), Tiling(64, 32, 4, 3)
TILE = (192, 96)
"""Queries and keys of the tiles that lists name: those of csrc/attention8.cu, multiples of SPARSE's."""

LIFT = tl.constexpr(8.0)


@triton.jit
def token_at(place):
    """Of each 16 packed tokens, place 2 holds token 8, place 4 token 2, place 8 token 4."""
    return place - place % 16 + place % 2 + place // 2 % 2 * 8 + place // 4 % 2 * 2 + place // 8 % 2 * 4


@triton.jit
def _attention8_kernel(
    q, k, v, score_step, v_step, v_mean, key_tiles, key_counts, out_step, out, lse, L, S, q_row, k_row, padded, query_tiles, capacity,
    N: tl.constexpr, K: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, PACKED: tl.constexpr, LISTED: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    STEPS: tl.constexpr = TILE_K // KEYS
    head, first = tl.program_id(1), tl.program_id(0) * QUERIES
    rows, cols = first + tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    inside = (rows[:, None] < L) & (cols[None, :] < K)
    at = rows[:, None].to(tl.int64) * (N * K) + head * K + cols[None, :]
    queries = tl.load(q + rows[:, None].to(tl.int64) * q_row + head * K + cols[None, :], inside, 0.0)
    scale = tl.load(score_step) * 1.4426950408889634
    peak = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    values = tl.zeros((QUERIES, WIDTH), tl.float32)
    count = tl.cdiv(S, TILE_K)
    row = head * query_tiles + first // TILE_Q
    if LISTED:
        count = tl.load(key_counts + row)
    for step in range(count * STEPS):
        tile = step // STEPS
        if LISTED:
            tile = tl.load(key_tiles + row.to(tl.int64) * capacity + tile)
        place = tile * TILE_K + step % STEPS * KEYS + tl.arange(0, KEYS)
        key = place
        if PACKED:  # keys in the order of v's columns: a softmax takes them in any
            key = token_at(place)
        there = key.to(tl.int64) * k_row + head * K
        keys = tl.load(k + there[None, :] + cols[:, None], (key[None, :] < S) & (cols[:, None] < K), 0.0)
        score = tl.where(key[None, :] < S, tl.dot(queries, keys) * scale, -float("inf"))
        top = tl.maximum(peak, tl.max(score, 1))
        base = tl.where(top == -float("inf"), 0.0, top)  # a list may name a tile that ends before this step
        shrink = tl.exp2(peak - base)
        weight = tl.exp2(score - base[:, None] + LIFT)
        total = total * shrink + tl.sum(weight, 1)
        peak = top
        if PACKED:
            down = (head * K + cols[:, None]).to(tl.int64) * padded
            part = tl.trans(
                tl.load(v + down + place[None, :], (place[None, :] < padded) & (cols[:, None] < K), 0.0)
            )
        else:
            there = key.to(tl.int64) * (N * K) + head * K
            part = tl.load(v + there[:, None] + cols[None, :], (key[:, None] < S) & (cols[None, :] < K), 0.0)
        values = values * shrink[:, None] + tl.dot(weight.to(tl.float8e4nv), part)
    seen = total > 0
    share = tl.where(seen, 1.0 / tl.where(seen, total, 1.0), 0.0)
    table = head * K + cols
    step_of, mean_of = tl.load(v_step + table, cols < K, 0.0), tl.load(v_mean + table, cols < K, 0.0)
    y = values * share[:, None] * step_of[None, :] + mean_of[None, :]
    if CODES:
        y = tl.clamp(y * (1.0 / tl.load(out_step)), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + at, y.to(out.dtype.element_ty), inside)
    log = 0.6931471805599453 * (peak - LIFT + tl.log2(tl.where(seen, total, 1.0)))
    tl.store(lse + head.to(tl.int64) * L + rows, tl.where(seen, log, -float("inf")), rows < L)


def attention_fp8_tiles(
    q: Tensor, k: Tensor, v: Tensor, score_step: Tensor, v_step: Tensor, v_mean: Tensor, out: torch.dtype,
    key_tiles: Tensor | None = None, key_counts: Tensor | None = None, out_step: Tensor | None = None, *,
    tiling: Tiling | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(L, N, K) in `out` and lse (N, L) fp32. Lists name tiles of TILE; a query tile without keys gets v_mean and -inf."""
    L, N, K = q.shape
    S, listed = k.shape[0], key_tiles is not None
    tiling = tiling or (SPARSE if listed else DENSE)
    y, lse = q.new_empty(q.shape, dtype=out), q.new_empty(N, L, dtype=torch.float32)
    if y.numel() == 0:
        return y, lse
    tile = TILE if listed else (tiling.queries, tiling.keys)
    with on_device_of(q):
        _attention8_kernel[(triton.cdiv(L, tiling.queries), N)](
            q, k, v, score_step, v_step, v_mean, key_tiles if listed else q, key_counts if listed else q,
            q if out_step is None else out_step, y, lse,
            L, S, q.stride(0), k.stride(0), triton.cdiv(S, 16) * 16, triton.cdiv(L, tile[0]), key_tiles.shape[2] if key_tiles is not None else 0,
            N=N, K=K, QUERIES=tiling.queries, KEYS=tiling.keys, WIDTH=max(triton.next_power_of_2(K), 32),
            TILE_Q=tile[0], TILE_K=tile[1], PACKED=v.shape != k.shape, LISTED=listed,
            CODES=out_step is not None, num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip
    return y, lse


@triton.jit
def _values_packed_kernel(
    v, out, S, padded, row_stride, K: tl.constexpr, TOKENS: tl.constexpr, BLOCK_K: tl.constexpr
):
    head, cols = tl.program_id(1), tl.arange(0, BLOCK_K)[None, :]
    place = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    token = token_at(place)
    x = tl.load(v + token * row_stride + head * K + cols, (token < S) & (cols < K), 0)
    across, down = tl.trans(place), tl.arange(0, BLOCK_K)[:, None]
    to = out + (head * K + down).to(tl.int64) * padded + across
    tl.store(to, tl.trans(x), (across < padded) & (down < K))


def values_packed(v: Tensor, *, tokens: int = 128, warps: int = 8) -> Tensor:
    """Codes (S, N, K), whose rows may lie apart, packed: (N, K, S up to 16). tokens: of one program."""
    S, N, K = v.shape
    out = v.new_empty(N, K, triton.cdiv(S, 16) * 16)
    if out.numel():
        with on_device_of(v):
            _values_packed_kernel[(triton.cdiv(S, tokens), N)](
                v.view(torch.uint8), out.view(torch.uint8), S, out.shape[2], v.stride(0), K=K, TOKENS=tokens,
                BLOCK_K=triton.next_power_of_2(K), num_warps=warps,
            )  # fmt: skip
    return out


@triton.jit
def _tile_means_kernel(
    x, out, L, ROWS, N: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr
):
    tile, head, cols = tl.program_id(0), tl.program_id(1), tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    first, end = tile * ROWS, tl.minimum(tile * ROWS + ROWS, L)
    for start in range(first, end, STEP):
        rows = start + tl.arange(0, STEP)
        at = rows[:, None].to(tl.int64) * (N * K) + head * K + cols[None, :]
        part = tl.load(x + at, (rows[:, None] < end) & (cols[None, :] < K), 0.0)
        total += tl.sum(part.to(tl.float32), 0)
    tl.store(out + (tile.to(tl.int64) * N + head) * K + cols, total / (end - first), cols < K)


def tile_means(x: Tensor, rows: int) -> Tensor:
    """(tiles, N, K) fp32 of e4m3 (L, N, K): the mean of each tile of `rows` tokens, of the last of those left."""
    L, N, K = x.shape
    out = x.new_empty(triton.cdiv(L, rows), N, K, dtype=torch.float32)
    if out.numel():
        with on_device_of(x):
            _tile_means_kernel[(out.shape[0], N)](
                x, out, L, rows, N=N, K=K, WIDTH=triton.next_power_of_2(K), STEP=32, num_warps=4
            )
    return out


def attention_fp8(
    q: Tensor, k: Tensor, v: Tensor, score_step: Tensor, v_step: Tensor, v_mean: Tensor, out: torch.dtype,
    out_step: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(L, N, K) in `out`: the softmax over all keys."""
    return attention_fp8_tiles(q, k, v, score_step, v_step, v_mean, out, out_step=out_step)[0]
