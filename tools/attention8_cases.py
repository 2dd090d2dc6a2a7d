"""Operands and fp64 references for `bench_attention8.py`."""

from __future__ import annotations

import math
from typing import Any

import torch
from attention8_rungs import Args, Rung

WIDTH, HEADS = 128, 16
ORDER = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
"""kAttention8Order of csrc/attention8.h: the key that each column of a group of 16 in V holds."""

DEVICE = "cuda"


def quantise(x: Any, dims: tuple[int, ...], scale: float | None = None) -> tuple[Any, Any]:
    """e4m3 and the scale that its values are multiplied by: one over dims, or the one given."""
    factor = x.abs().amax(dim=dims, keepdim=True).float().clamp_min(1e-12) / 448
    if scale is not None:
        factor = torch.full_like(factor, scale)
    return (x.float() / factor).to(torch.float8_e4m3fn), factor


def transposed(v8: Any) -> Any:
    """(S, N, 128) e4m3 to the kernel's (N, 128, S rounded up to 16), columns in its order, zeros behind."""
    S, N, _ = v8.shape
    padded = torch.zeros(-(-S // 16) * 16, N, WIDTH, dtype=torch.uint8, device=v8.device)
    padded[:S] = v8.view(torch.uint8)
    groups = padded.view(-1, 16, N, WIDTH)[:, list(ORDER)]
    return groups.permute(2, 3, 0, 1).reshape(N, WIDTH, -1).contiguous()


class Case:
    """Operands of one call, with their values as the kernel must see them.

    kind "exact" makes every probability a power of two that e4m3 holds, so that only the output's rounding
    separates a right kernel from fp64; "random" is normal; "shifted" is normal with V one unit off centre.
    """

    def __init__(self, L: int, S: int, N: int, kind: str, *, blocks: bool, mean: bool, seed: int = 0) -> None:
        device = torch.device(DEVICE)
        torch.manual_seed(seed + 7 * L + S)
        self.L, self.S, self.N, self.blocks = L, S, N, blocks
        if kind == "exact":
            q, k = (
                torch.randint(-1, 2, (n, N, WIDTH), device=device)
                * (torch.rand(n, N, WIDTH, device=device) < 0.15)
                for n in (L, S)
            )
            v = torch.randint(-3, 4, (S, N, WIDTH), device=device)
            self.softmax_scale = math.log(2.0)
            (self.q8, q_one), (self.k8, k_one), (v8, v_one) = (
                quantise(x.half(), (0, 2), 1.0) for x in (q, k, v)
            )
        else:
            q, k, v = (torch.randn(n, N, WIDTH, device=device, dtype=torch.bfloat16) for n in (L, S, S))
            if kind == "shifted":
                v += 1
            self.softmax_scale = WIDTH**-0.5
            (self.q8, q_one), (self.k8, k_one) = (quantise(x, (0, 2)) for x in (q, k))
            v8, v_one = quantise(v, (0,))
        self.q_scale, self.k_scale = q_one.view(N, 1).contiguous(), k_one.view(N, 1).contiguous()
        self.v_scale = v_one.expand(1, N, WIDTH)[0].contiguous()
        if blocks:  # one scale per 64 queries and per 128 keys; powers of two keep "exact" exact
            steps = [
                2.0 ** (torch.arange(-(-n // rows), device=device) % 2).float()
                for n, rows in ((L, 64), (S, 128))
            ]
            self.q_scale = (self.q_scale * steps[0]).contiguous()
            self.k_scale = (self.k_scale * steps[1]).contiguous()
        self.v8 = v8
        self.vt = transposed(v8)
        self.mean = torch.randn(N, WIDTH, device=device) if mean else None

    def arguments(self, out: Any, lse: Any, tiles: Any = None, counts: Any = None) -> Args:
        pointer = lambda x: None if x is None else x.data_ptr()  # noqa: E731
        row = self.N * WIDTH
        return Args(
            q=pointer(self.q8), k=pointer(self.k8), v=pointer(self.vt), out=pointer(out), lse=pointer(lse),
            q_scale=pointer(self.q_scale), k_scale=pointer(self.k_scale), v_scale=pointer(self.v_scale),
            v_mean=pointer(self.mean), key_tiles=pointer(tiles), key_counts=pointer(counts),
            num_queries=self.L, num_keys=self.S, q_row=row, q_head=WIDTH, k_row=row, k_head=WIDTH,
            v_row=self.vt.shape[2], out_row=row, out_head=WIDTH, num_heads=self.N,
            q_scale_head=self.q_scale.shape[1], k_scale_head=self.k_scale.shape[1],
            q_scale_rows=64 if self.blocks else 0, k_scale_blocks=self.blocks,
            key_capacity=0 if tiles is None else tiles.shape[2],
            softmax_scale=self.softmax_scale,
        )  # fmt: skip

    def reference(self, rows: slice, keep: Any = None) -> tuple[Any, Any]:
        """fp64 output and log-sum-exp of some query rows; keep: which keys count, (N, rows, S)."""
        q, k, v = (x.double().transpose(0, 1) for x in (self.q8[rows], self.k8, self.v8))
        index = torch.arange(self.L, device=q.device)[rows]
        q = q * self.q_scale.double()[:, index // 64 if self.blocks else index * 0, None]
        index = torch.arange(self.S, device=q.device)
        k = k * self.k_scale.double()[:, index // 128 if self.blocks else index * 0, None]
        scores = self.softmax_scale * q @ k.transpose(1, 2)
        self.largest_score = float(scores.abs().max()) if scores.numel() else 0.0
        if keep is not None:
            scores = scores.masked_fill(~keep, -math.inf)
        lse = scores.logsumexp(-1)
        out = torch.nan_to_num(torch.exp(scores - lse[..., None])) @ (v * self.v_scale.double()[:, None])
        if self.mean is not None:
            out = out + self.mean.double()[:, None]
        return out.transpose(0, 1), lse


def tile_lists(case: Case, rung: Rung, share: float) -> tuple[Any, Any, Any]:
    """Random lists of kept key tiles in random order, their lengths, and the kept keys as (N, Lq, tiles) flags."""
    rows, columns = -(-case.L // rung.queries), -(-case.S // rung.keys)
    if share >= 1:
        kept = torch.ones(case.N, rows, columns, dtype=torch.bool, device=DEVICE)
    else:
        amount = max(round(share * columns), 1)
        ranks = torch.rand(case.N, rows, columns, device=DEVICE).argsort(-1).argsort(-1)
        kept = ranks < amount
    order = torch.where(kept, torch.rand(kept.shape, device=DEVICE), 2.0).argsort(-1).int().contiguous()
    return order, kept.sum(-1).int().contiguous(), kept


def long_cases(length: int) -> dict[str, Case]:
    cases = {}
    for kind in ("random", "shifted"):
        case = Case(length, length, HEADS, kind, blocks=False, mean=False)
        pieces = [case_head(case, h) for h in range(HEADS)]
        case.reference_cache = (torch.cat([p[0] for p in pieces], 1), torch.cat([p[1] for p in pieces], 0))
        cases[kind] = case
    return cases


def case_head(case: Case, head: int) -> tuple[Any, Any]:
    """The reference of every L // 64-th row, one head at a time to stay small."""
    one = object.__new__(Case)
    one.__dict__ = dict(case.__dict__)
    one.N = 1
    for name in ("q8", "k8", "v8"):
        setattr(one, name, getattr(case, name)[:, head : head + 1])
    for name in ("q_scale", "k_scale", "v_scale"):
        setattr(one, name, getattr(case, name)[head : head + 1])
    return one.reference(slice(0, case.L, max(case.L // 64, 1)))


def lse_allowed(largest_score: float) -> float:
    """How far a log-sum-exp may be off where scores reach this size.

    A product of 128 e4m3 pairs is four steps of the tensor cores, each of which drops what lies 13 bits below its
    largest term: with scores up to 18 that costs 6.5e-3 in an emulation (tests/test_attention8.py), 7.3e-3 on an H100.
    """
    return 1e-3 + 2.0**-11 * largest_score


def relative(out: Any, exact: Any) -> float:
    difference = float((out.double() - exact).norm() / exact.norm().clamp_min(1e-30))
    return difference if math.isfinite(difference) else math.inf
