"""Attention of heads wider than the kernels of the libraries take: the video VAE has one of 384 over every latent frame.

    y = softmax(q k^T / sqrt(K)) v

Shapes: q (L, N, K), k and v (S, N, K), S at least 1; rows and heads may lie at any distance, values of a head together; y
(L, N, K). fp32 inside, weights of the softmax rounded to the dtype of v. A head is handled as three pieces of 128 values, those
behind its end zeros, so that products have sizes that tensor cores take; so heads are at most 384 wide.

At L = S = 14,080, K 384 in bf16 0.305 TFLOP: 0.99 ms on an H200, torch's memory-efficient kernel 2.22
(bench/results/nvidia-h200/2026-11-23-26fc944-frame-attention.json, which has other tiles too).
One program owns a tile of queries and goes through all keys in order. No row of a tile knows of another, and one binary serves
any number of queries, so some of the queries give bit for bit the rows that all of them give.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from cosmos_fast.kernels.launch import on_device_of
from torch import Tensor

PIECE = tl.constexpr(128)
WIDEST = 384
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Tiles:
    """Queries of a program, keys of a step; warps of 32 threads; steps whose keys are fetched at once."""

    queries: int
    keys: int
    warps: int
    stages: int


HALF = Tiles(128, 32, 8, 2)
# Operands twice as wide, no tensor cores: for checks, not for speed.
FULL = Tiles(16, 16, 4, 1)


@triton.jit
def _pieces(x, rows, ok, K):
    """Rows of a tensor, in three pieces of their values."""
    cols = tl.arange(0, PIECE)[None, :]
    a = tl.load(x + rows + cols, ok & (cols < K), 0.0)
    b = tl.load(x + rows + PIECE + cols, ok & (PIECE + cols < K), 0.0)
    c = tl.load(x + rows + 2 * PIECE + cols, ok & (2 * PIECE + cols < K), 0.0)
    return a, b, c


@triton.jit(do_not_specialize=["L", "S"])
def _attention_wide_kernel(
    q, k, v, out, L, S, scale, q_row, q_head, k_row, k_head, v_row, v_head, N, K: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scale: of scores as powers of two."""
    head, cols = tl.program_id(1).to(tl.int64), tl.arange(0, PIECE)[None, :]
    queries = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    asked = queries[:, None] < L
    q0, q1, q2 = _pieces(q + head * q_head, queries[:, None] * q_row, asked, K)
    y0 = tl.zeros([QUERIES, PIECE], tl.float32)
    y1, y2 = y0, y0
    top, total = tl.full([QUERIES], float("-inf"), tl.float32), tl.zeros([QUERIES], tl.float32)
    for first in range(0, S, KEYS):
        keys = first + tl.arange(0, KEYS).to(tl.int64)
        there = keys[:, None] < S
        k0, k1, k2 = _pieces(k + head * k_head, keys[:, None] * k_row, there, K)
        scores = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
        scores = tl.dot(q1, tl.trans(k1), scores, input_precision=PRECISION)
        scores = tl.dot(q2, tl.trans(k2), scores, input_precision=PRECISION)
        scores = tl.where(keys[None, :] < S, scores * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights, kept = tl.exp2(scores - higher[:, None]), tl.exp2(top - higher)
        top, total = higher, total * kept + tl.sum(weights, 1)
        v0, v1, v2 = _pieces(v + head * v_head, keys[:, None] * v_row, there, K)
        weights = weights.to(v0.dtype)
        y0 = tl.dot(weights, v0, y0 * kept[:, None], input_precision=PRECISION)
        y1 = tl.dot(weights, v1, y1 * kept[:, None], input_precision=PRECISION)
        y2 = tl.dot(weights, v2, y2 * kept[:, None], input_precision=PRECISION)
    to = out + (queries[:, None] * N + head) * K + cols
    share = 1 / total[:, None]
    tl.store(to, (y0 * share).to(out.dtype.element_ty), asked & (cols < K))
    tl.store(to + PIECE, (y1 * share).to(out.dtype.element_ty), asked & (PIECE + cols < K))
    tl.store(to + 2 * PIECE, (y2 * share).to(out.dtype.element_ty), asked & (2 * PIECE + cols < K))


def attention_wide(q: Tensor, k: Tensor, v: Tensor, *, tiles: Tiles | None = None) -> Tensor:
    """softmax(q k^T / sqrt(K)) v for each head: (L, N, K), (S, N, K), (S, N, K) -> (L, N, K)."""
    L, N, K = q.shape
    if K > WIDEST:
        raise ValueError(
            f"attention_wide: heads must be at most {WIDEST} wide, got {K}. Take COSMOS_FAST_OPS=attention_wide=sdpa."
        )
    out = q.new_empty(L, N, K)
    if out.numel() == 0:
        return out
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    full = q.dtype == torch.float32
    t = tiles or (FULL if full else HALF)
    with on_device_of(q):
        _attention_wide_kernel[(triton.cdiv(L, t.queries), N)](
            q, k, v, out, L, k.shape[0], K**-0.5 * LOG2_E, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
            v.stride(0), v.stride(1), N, K=K, QUERIES=t.queries, KEYS=t.keys, PRECISION="ieee" if full else "tf32",
            num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    return out
