"""The kernel that sums normed, rotated k and v of each channel over tokens: what `qkv_moments` and `qkv_sums` begin with.

Sums are in fp64, where those of 16-bit values are exact: the same bits in any order, and so for any number of ranks. A
multiprocessor of Hopper converts 16 values a cycle to fp64, a quarter of what it adds, so `_wide` makes them of the bits. Keys and
values are summed by programs of their own: 116 registers instead of 166 of a thread, so that 16 warps fit instead of 12 (by the
SASS of Triton 3.6). Both read a token while they sum the one before.
"""

from __future__ import annotations

import triton
import triton.language as tl
from cosmos_fast.kernels.norm_rope import normed_rotated


@triton.jit
def _wide(x, FEW: tl.constexpr):
    """fp32 x * 2^-896 as fp64, exactly, by its bits; what is not finite becomes a number. FEW: the last three bits are 0."""
    bits = x.to(tl.int32, bitcast=True)
    if FEW:
        wide = ((bits >> 3) & -0x70000001).to(tl.int64) << 32
    else:
        wide = (bits.to(tl.int64) << 29) & -0x7000000000000001
    return wide.to(tl.float64, bitcast=True)


@triton.jit
def _sum_of_wide(x, odd):
    """The sum of values from that of their `_wide`; odd: infinity or NaN where the sum is."""
    return tl.where(tl.abs(odd) < float("inf"), x * 5.282945311356653e269, odd.to(tl.float64))  # 2^896


@triton.jit
def _sum_keys(
    k, k_gain, cos, sin, sums, first, last, cos_stride, sin_stride, eps,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_HALF: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = K // 2
    FEW: tl.constexpr = k.dtype.element_ty != tl.float32
    heads, cols = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_HALF)[None, :]
    keep, at, spread = (heads < N) & (cols < HALF), heads * K + cols, heads * 0 + cols
    low_odd = tl.zeros((BLOCK_N, BLOCK_HALF), tl.float32)
    low_sum = tl.zeros((BLOCK_N, BLOCK_HALF), tl.float64)
    high_odd, high_sum = low_odd, low_sum
    for row in tl.range(first, last, num_stages=STAGES):
        low = tl.load(k + row * (3 * N * K) + at, keep, 0.0, eviction_policy="evict_first")
        high = tl.load(k + row * (3 * N * K) + HALF + at, keep, 0.0, eviction_policy="evict_first")
        c = tl.load(cos + row * cos_stride + spread, keep, 0.0)
        s = tl.load(sin + row * sin_stride + spread, keep, 0.0)
        low, high = normed_rotated(low, high, k_gain, spread, keep, c, s, eps, k, K, HALF)
        low, high = low.to(tl.float32), high.to(tl.float32)
        low_sum += _wide(low, FEW)
        high_sum += _wide(high, FEW)
        # 2^-126: too little for finite values to add up to infinity.
        low_odd = tl.fma(low, 1.1754943508222875e-38, low_odd)
        high_odd = tl.fma(high, 1.1754943508222875e-38, high_odd)
    tl.store(sums + at, _sum_of_wide(low_sum, low_odd), keep)
    tl.store(sums + HALF + at, _sum_of_wide(high_sum, high_odd), keep)


@triton.jit
def _sum_values(
    v, sums, least, most, first, last, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    FEW: tl.constexpr = v.dtype.element_ty != tl.float32
    heads, cols = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_K)[None, :]
    keep, at = (heads < N) & (cols < K), heads * K + cols
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float64)
    low = tl.zeros((BLOCK_N, BLOCK_K), tl.float32) + float("inf")
    high = -low
    for row in tl.range(first, last, num_stages=STAGES):
        x = tl.load(v + row * (3 * N * K) + at, keep, 0.0, eviction_policy="evict_first").to(tl.float32)
        total += _wide(x, FEW)
        low = tl.minimum(low, x, propagate_nan=tl.PropagateNan.ALL)
        high = tl.maximum(high, x, propagate_nan=tl.PropagateNan.ALL)
    odd = tl.where(low > -float("inf"), 0.0, low) + tl.where(high < float("inf"), 0.0, high)
    tl.store(sums + at, _sum_of_wide(total, odd), keep)
    tl.store(least + at, low, keep)
    tl.store(most + at, high, keep)


@triton.jit
def channel_sums(
    qkv, k_gain, cos, sin, sums, ends, L, tokens, cos_stride, sin_stride, eps, N: tl.constexpr, K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_HALF: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of keys (program (i, 0)) or of values ((i, 1)), and least and largest value, of `tokens` tokens."""
    chunk, NK = tl.program_id(0).to(tl.int64), N * K
    first, last = chunk * tokens, min(chunk * tokens + tokens, L)
    sums, ends = sums + chunk * (2 * NK), ends + chunk * (2 * NK)
    if tl.program_id(1) == 0:
        _sum_keys(
            qkv + NK, k_gain, cos, sin, sums, first, last, cos_stride, sin_stride, eps, N, K, BLOCK_N, BLOCK_HALF, STAGES
        )  # fmt: skip
    else:
        _sum_values(
            qkv + 2 * NK, sums + NK, ends, ends + NK, first, last, N, K, BLOCK_N, 2 * BLOCK_HALF, STAGES
        )
