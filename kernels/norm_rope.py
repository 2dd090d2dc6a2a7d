"""RMS norm per head, and with rotary positions on the packed projection: `head_norm`, `qk_norm_rope`, `qkv_packed`.

    head_norm      y = x * rsqrt(mean(x^2) + eps) * gain                       over each head's K features
    qk_norm_rope   n = head_norm(q or k), rounded; low' = low * cos - high * sin; high' = high * cos + low * sin

    qkv_packed     the same q and k, and v, of some heads, each where the exchange between ranks sends it from

Shapes: head_norm x (L, N*K), rows may be strided, -> (L, N, K). qk_norm_rope qkv (L, 3*N*K) contiguous; gains
(K,); cos, sin (L, K/2) fp32; -> q, k (L, N, K). low and high are the two halves of a head; v is not touched. qkv_packed: of the
same heads of each column (columns, L, 3, heads, K).

Bytes in bf16 at L 84480, N 16, K 128 and floor at 2.98 TB/s, the assumed copy of one H100:
    head_norm      x, y                     0.69 GB   0.232 ms
    qk_norm_rope   q, k, q', k', cos, sin   1.43 GB   0.479 ms
    qkv_packed     the same, and v, v'      2.12 GB   0.711 ms
One program takes whole tokens, all heads: cos and sin come from HBM once and from L1 for the other heads. So does `qkv_packed` of all
heads; of fewer it takes several tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl
from cosmos_fast.kernels.launch import Config, on_device_of
from torch import Tensor


def _config(width: int) -> Config:
    """block: tokens per program, 1; 16 values a thread at 2048 features.

    Within 3 % of the best of a sweep on compute capability 9.0,
    bench/results/nvidia-h100-80gb-hbm3/2026-11-22-077d881-kernels.json.
    """
    return Config(1, min(max(triton.next_power_of_2(width) // 512, 1), 8))


@triton.jit
def _head_norm_kernel(
    x,
    gain,
    out,
    row_stride,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    heads, cols = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_K)[None, :]
    keep = (heads < N) & (cols < K)
    at = heads * K + cols
    value = tl.load(x + row * row_stride + at, keep, 0.0, eviction_policy="evict_first").to(tl.float32)
    rstd = tl.rsqrt(tl.sum(value * value, axis=1, keep_dims=True) / K + eps)
    # heads * 0: loaded in the layout of the tile, so that no exchange through shared memory is needed.
    factor = tl.load(gain + heads * 0 + cols, keep, 0.0, eviction_policy="evict_last").to(tl.float32)
    tl.store(out + row * (N * K) + at, (value * rstd * factor).to(out.dtype.element_ty), keep)


@triton.jit
def normed_rotated(low, high, gain, spread, keep, cos, sin, eps, like, K: tl.constexpr, HALF: tl.constexpr):
    """Both halves of rows of K features, normed, rounded to what `like` points at, rotated, rounded again."""
    low, high = low.to(tl.float32), high.to(tl.float32)
    mean = (tl.sum(low * low, axis=1, keep_dims=True) + tl.sum(high * high, axis=1, keep_dims=True)) / K
    rstd = tl.rsqrt(mean + eps)
    low *= rstd * tl.load(gain + spread, keep, 0.0, eviction_policy="evict_last").to(tl.float32)
    high *= rstd * tl.load(gain + HALF + spread, keep, 0.0, eviction_policy="evict_last").to(tl.float32)
    low = low.to(like.dtype.element_ty).to(tl.float32)
    high = high.to(like.dtype.element_ty).to(tl.float32)
    return (low * cos - high * sin).to(like.dtype.element_ty), (high * cos + low * sin).to(
        like.dtype.element_ty
    )


@triton.jit
def _norm_rotate(low, high, gain, out, at, spread, keep, cos, sin, eps, K: tl.constexpr, HALF: tl.constexpr):
    low, high = normed_rotated(low, high, gain, spread, keep, cos, sin, eps, out, K, HALF)
    tl.store(out + at, low, keep)
    tl.store(out + at + HALF, high, keep)


@triton.jit
def _qk_norm_rope_kernel(
    qkv, q_gain, k_gain, cos, sin, q_out, k_out, cos_stride, sin_stride, eps,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = K // 2
    row = tl.program_id(0).to(tl.int64)
    heads, cols = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_HALF)[None, :]
    keep = (heads < N) & (cols < HALF)
    at, spread = heads * K + cols, heads * 0 + cols
    q, k = qkv + row * (3 * N * K) + at, qkv + row * (3 * N * K) + N * K + at
    # All loads first: they are in flight together.
    q_low = tl.load(q, keep, 0.0, eviction_policy="evict_first")
    q_high = tl.load(q + HALF, keep, 0.0, eviction_policy="evict_first")
    k_low = tl.load(k, keep, 0.0, eviction_policy="evict_first")
    k_high = tl.load(k + HALF, keep, 0.0, eviction_policy="evict_first")
    c = tl.load(cos + row * cos_stride + spread, keep, 0.0)
    s = tl.load(sin + row * sin_stride + spread, keep, 0.0)
    to = row * (N * K) + at
    _norm_rotate(q_low, q_high, q_gain, q_out, to, spread, keep, c, s, eps, K, HALF)
    _norm_rotate(k_low, k_high, k_gain, k_out, to, spread, keep, c, s, eps, K, HALF)


@triton.jit
def _qkv_packed_kernel(
    qkv, q_gain, k_gain, cos, sin, out, L, cos_stride, sin_stride, eps, first, N: tl.constexpr, K: tl.constexpr,
    OWN: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """OWN heads in a column, of which HEADS from `first` on are written. A program takes BLOCK heads, of one token or several."""
    HALF: tl.constexpr = K // 2
    rows, cols = (
        tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None],
        tl.arange(0, BLOCK_HALF)[None, :],
    )
    token, column, head = rows // (COLUMNS * HEADS), rows // HEADS % COLUMNS, rows % HEADS
    keep, spread = (token < L) & (cols < HALF), head * 0 + cols
    q = qkv + token * (3 * N * K) + (column * OWN + first + head) * K + cols
    k, v = q + N * K, q + 2 * N * K
    q_low = tl.load(q, keep, 0.0, eviction_policy="evict_first")
    q_high = tl.load(q + HALF, keep, 0.0, eviction_policy="evict_first")
    k_low = tl.load(k, keep, 0.0, eviction_policy="evict_first")
    k_high = tl.load(k + HALF, keep, 0.0, eviction_policy="evict_first")
    v_low = tl.load(v, keep, 0.0, eviction_policy="evict_first")
    v_high = tl.load(v + HALF, keep, 0.0, eviction_policy="evict_first")
    c = tl.load(cos + token * cos_stride + cols, keep, 0.0)
    s = tl.load(sin + token * sin_stride + cols, keep, 0.0)
    to = ((column * L + token) * 3 * HEADS + head) * K + cols
    _norm_rotate(q_low, q_high, q_gain, out, to, spread, keep, c, s, eps, K, HALF)
    _norm_rotate(k_low, k_high, k_gain, out, to + HEADS * K, spread, keep, c, s, eps, K, HALF)
    tl.store(out + to + 2 * HEADS * K, v_low, keep)
    tl.store(out + to + 2 * HEADS * K + HALF, v_high, keep)


def head_norm(x: Tensor, gain: Tensor, eps: float, *, config: Config | None = None) -> Tensor:
    """RMS norm over each head's K features: (L, N*K), rows may be strided, -> (L, N, K)."""
    L, K = x.shape[0], gain.shape[0]
    N = x.shape[1] // K
    out = x.new_empty(L, N, K)
    if out.numel() == 0:
        return out
    config = config or _config(N * K)
    with on_device_of(x):
        _head_norm_kernel[(L,)](
            x, gain.contiguous(), out, x.stride(0), eps, N=N, K=K, BLOCK_N=triton.next_power_of_2(N),
            BLOCK_K=triton.next_power_of_2(K), num_warps=config.warps,
        )  # fmt: skip
    return out


def qk_norm_rope(
    qkv: Tensor,
    q_gain: Tensor,
    k_gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    *,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Norm and rotate q and k of the packed projection (L, 3*N*K): q, k (L, N, K)."""
    L, K = qkv.shape[0], q_gain.shape[0]
    N = qkv.shape[1] // (3 * K)
    q, k = (qkv.new_empty(L, N, K) for _ in "qk")
    if q.numel() == 0:
        return q, k
    config = config or _config(N * K)
    cos, sin = (table if table.stride(1) == 1 else table.contiguous() for table in (cos, sin))
    with on_device_of(qkv):
        _qk_norm_rope_kernel[(L,)](
            qkv, q_gain.contiguous(), k_gain.contiguous(), cos, sin, q, k, cos.stride(0), sin.stride(0), eps,
            N=N, K=K, BLOCK_N=triton.next_power_of_2(N), BLOCK_HALF=triton.next_power_of_2(K // 2),
            num_warps=config.warps,
        )  # fmt: skip
    return q, k


def qkv_packed(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, columns: int, first: int, last: int,
    eps: float, *, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """q, k, as of `qk_norm_rope`, and v of some heads of each column, as ranks exchange them: (columns, L, 3, last - first, K)."""
    L, K = qkv.shape[0], q_gain.shape[0]
    N = qkv.shape[1] // (3 * K)
    out = qkv.new_empty(columns, L, 3, last - first, K)
    if out.numel() == 0:
        return out
    config, block = config or _config(N * K), triton.next_power_of_2(N)
    cos, sin = (table if table.stride(1) == 1 else table.contiguous() for table in (cos, sin))
    with on_device_of(qkv):
        _qkv_packed_kernel[(triton.cdiv(L * columns * (last - first), block),)](
            qkv, q_gain.contiguous(), k_gain.contiguous(), cos, sin, out, L, cos.stride(0), sin.stride(0), eps, first, N=N,
            K=K, OWN=N // columns, HEADS=last - first, COLUMNS=columns, BLOCK=block,
            BLOCK_HALF=triton.next_power_of_2(K // 2), num_warps=config.warps,
        )  # fmt: skip
    return out
