"""The kernel for codes of v, for `qkv_codes` with q and k and, beside csrc/qk_codes.cu, alone; where codes are written.

codes = (v - v_mean) / v_step, as they are, packed for tensor cores, or where ranks send them from.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from cosmos_fast.kernels.attention8 import token_at
from cosmos_fast.kernels.launch import Config
from torch import Tensor

E4M3 = torch.float8_e4m3fn


@triton.jit
def store_codes(out, x, keep):
    """What is too large saturates; NaN stays NaN."""
    x = tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out, x.to(out.dtype.element_ty), keep)


@triton.jit
def travels_from(
    which, head, token, L, K: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr
):
    """Where q, k or v (which) of a head begins in (columns, L, 3, heads, K), the parts of HEADS heads of a column in a row."""
    column, place = head // HEADS, head % HEADS
    first, count = place * 0, place * 0 + HEADS // PARTS
    for i in tl.static_range(1, PARTS):
        is_later = place >= HEADS * i // PARTS
        first = tl.where(is_later, HEADS * i // PARTS, first)
        count = tl.where(is_later, HEADS * (i + 1) // PARTS - HEADS * i // PARTS, count)
    before = (token * 0 + L) * (3 * COLUMNS) * first  # token is 64 bits wide
    return (before + ((column * L + token) * 3 + which) * count + place - first) * K


@triton.jit
def begins(
    which, head, token, L, N: tl.constexpr, K: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Where q, k or v (which) of a head begins: in its own (L, N, K), or with COLUMNS where ranks send it from."""
    if COLUMNS > 0:
        place = travels_from(which, head, token, L, K, HEADS, COLUMNS, PARTS)
    else:
        place = (token * N + head) * K
    return place


@triton.jit
def _v_codes_kernel(
    qkv, v_mean, v_step, out, L, padded, N: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, BLOCK_K: tl.constexpr,
    PACK: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    head, cols = tl.program_id(1), tl.arange(0, BLOCK_K)[None, :]
    place = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    token = place
    if PACK:
        token = token_at(place)
    keep, at = (token < L) & (cols < K), head * K + cols
    x = tl.load(qkv + token * (3 * N * K) + 2 * N * K + at, keep, 0.0, eviction_policy="evict_first")
    mean, step = tl.load(v_mean + at, cols < K, 0.0), tl.load(v_step + at, cols < K, 1.0)
    value = tl.where(keep, (x.to(tl.float32) - mean) / step, 0.0)
    if PACK:
        across, down = tl.trans(place), tl.arange(0, BLOCK_K)[:, None]
        to = out + (head * K + down).to(tl.int64) * padded + across
        store_codes(to, tl.trans(value), (across < padded) & (down < K))
    else:
        store_codes(out + begins(2, head, token, L, N, K, HEADS, COLUMNS, PARTS) + cols, value, keep)


def sent_from(heads: int, columns: int, parts: int) -> dict[str, int]:
    """What `begins` asks; columns and parts 0 where nothing travels."""
    own = heads // max(columns, 1)
    return {"HEADS": own, "COLUMNS": columns, "PARTS": min(parts, own)}


def write_v_codes(
    qkv: Tensor, v_mean: Tensor, v_step: Tensor, out: Tensor, pack: bool, config: Config, columns: int = 0, parts: int = 0
) -> None:  # fmt: skip
    """Codes of v into `out`; config.block: tokens of one program; pack: see `qkv_codes.value_codes`; columns, parts: as for `sent_from`."""
    L, (N, K) = qkv.shape[0], v_mean.shape
    _v_codes_kernel[(triton.cdiv(L, config.block), N)](
        qkv, v_mean, v_step, out, L, triton.cdiv(L, 16) * 16, N=N, K=K, TOKENS=config.block,
        BLOCK_K=triton.next_power_of_2(K), PACK=pack, **sent_from(N, columns, parts), num_warps=config.warps,
    )  # fmt: skip
