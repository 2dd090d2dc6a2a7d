"""8-bit operands of self-attention from the packed projection: `qkv_moments`, `qkv_codes`, and more.

    qkv_moments      means of rotated k and of v over all tokens, the step of each channel of v, the steps of q and k
    qkv_sums         what ranks add up to get them: sums of rotated k and of v, least and largest v of each channel
    moments_of_sums  qkv_moments from the qkv_sums of all ranks, by the same arithmetic
    qkv_codes        q, k: norm, rotary positions, rounded; k less its mean; a Hadamard rotation of both; codes = x / step
                     v: codes = (v - v_mean) / v_step, as they are or packed for tensor cores
    codes_packed     the same codes, each head where the exchange between ranks sends it from; v as it is
    values_restored  y = x * v_step + v_mean, what attention made of codes of v turned into what it makes of v

Shapes: qkv (L, 3*N*K) contiguous; gains (K,); cos, sin (L, K/2) fp32; means and v_step (N, K) fp32; steps (3,) fp32: of
q, of k, and of a score: the product of both over sqrt(K). Codes are e4m3.

A softmax does not see what all keys share, and its weights sum to 1, so both means leave without an error and lower
that of the codes. Steps of q and k need no pass over the tokens: a normed and rotated head is no longer than sqrt(K)
times the largest gain, and e4m3, being a floating-point format, loses nothing by a step that is too large. All steps are
powers of two: codes are then the values rounded to three bits behind the point, whatever the step. v_mean is rounded to
multiples of bf16's spacing at the channel's largest value, see `reference.centred`.

Bytes in bf16 at L 84480, N 16, K 128 and floor at 2.98 TB/s, the assumed copy of one H100:
    qkv_moments      k, v, cos, sin             0.74 GB   0.247 ms    (qkv_sums: the same)
    qkv_codes        q, k, v, cos, sin, codes   1.60 GB   0.537 ms
    values_restored  x, y                       0.69 GB   0.232 ms
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from cosmos_fast.kernels.channel_sums import channel_sums
from cosmos_fast.kernels.launch import Config, on_device_of
from cosmos_fast.kernels.norm_rope import normed_rotated
from cosmos_fast.kernels.value_codes import E4M3, begins, sent_from, store_codes, write_v_codes
from torch import Tensor

# Tokens of one program and warps. MOMENTS with STAGES tokens in flight or in use by one H200 at 84,480 tokens
# (2026-11-23-fb1d53a-moments.json): 0.276 ms, with
# 256/8 0.287, 160/8 0.292, 160/4 and one token 0.303, 128/4 and three 0.358. The others are not measured yet.
MOMENTS = Config(320, 8)
STAGES = 4
CODES = Config(1, 4)
ROTATED = Config(4, 4)
VALUES = Config(128, 8)
RESTORED = Config(16, 8)


@triton.jit
def power_of_two(x):
    """The next one above x >= 0, 1 for 0; NaN for what is not finite."""
    above = (((x.to(tl.int32, bitcast=True) >> 23) + 1) << 23).to(tl.float32, bitcast=True)
    return tl.where(x == 0, 1.0, tl.where(x < float("inf"), above, float("nan")))


@triton.jit
def _of_chunks(sums, ends, cols, chunks, NK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(1, BLOCK) sum of k, of v, least v, largest v over all chunks."""
    rows = tl.arange(0, ROWS)[:, None]
    keys = tl.zeros((ROWS, BLOCK), tl.float64)
    values, none = keys, tl.zeros((ROWS, BLOCK), tl.float32)
    least, most = none + float("inf"), none - float("inf")
    for first in range(0, chunks, ROWS):
        keep = (first + rows < chunks) & (cols < NK)
        at = (first + rows).to(tl.int64) * (2 * NK) + cols
        keys += tl.load(sums + at, keep, 0.0)
        values += tl.load(sums + at + NK, keep, 0.0)
        least = tl.minimum(least, tl.load(ends + at, keep, float("inf")))
        most = tl.maximum(most, tl.load(ends + at + NK, keep, -float("inf")))
    keys, values = tl.sum(keys, 0, keep_dims=True), tl.sum(values, 0, keep_dims=True)
    return keys, values, tl.min(least, 0, keep_dims=True), tl.max(most, 0, keep_dims=True)


@triton.jit
def _sums_finish_kernel(
    sums, ends, sums_out, ends_out, chunks, NK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    keys, values, low, high = _of_chunks(sums, ends, cols, chunks, NK, ROWS, BLOCK)
    tl.store(sums_out + cols, keys, cols < NK)
    tl.store(sums_out + NK + cols, values, cols < NK)
    tl.store(ends_out + cols, low, cols < NK)
    tl.store(ends_out + NK + cols, high, cols < NK)


@triton.jit
def _moments_finish_kernel(
    sums, ends, q_gain, k_gain, k_mean, v_mean, v_step, steps, L, chunks, root,
    NK: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    keys, values, low, high = _of_chunks(sums, ends, cols, chunks, NK, ROWS, BLOCK)
    keep, to = cols < NK, cols
    count = tl.maximum(L, 1).to(tl.float64)
    # Exact divisions: many a mean and peak is a round number, which a last bit would move past a power of two.
    unit = power_of_two(tl.where(L > 0, tl.maximum(tl.abs(high), tl.abs(low)), 0.0) * 0.00390625)
    mean = (values / count).to(tl.float32)
    mean = tl.floor(tl.div_rn(mean, unit) + 0.5) * unit
    peak = tl.maximum(high - mean, mean - low)
    tl.store(k_mean + to, (keys / count).to(tl.float32), keep)
    tl.store(v_mean + to, mean, keep)
    tl.store(v_step + to, power_of_two(tl.div_rn(tl.where(L > 0, peak, 0.0), 448.0)), keep)
    if tl.program_id(0) == 0:
        at = tl.arange(0, BLOCK_K)
        q_most = tl.max(tl.abs(tl.load(q_gain + at, at < K, 0.0).to(tl.float32)), 0)
        k_most = tl.max(tl.abs(tl.load(k_gain + at, at < K, 0.0).to(tl.float32)), 0)
        q_unit, k_unit = power_of_two(q_most * root / 448.0), power_of_two(2 * k_most * root / 448.0)
        tl.store(steps, q_unit)
        tl.store(steps + 1, k_unit)
        tl.store(steps + 2, q_unit * k_unit / root)


@triton.jit
def _hadamard(low, high, root, HALF: tl.constexpr, PRECISION: tl.constexpr):
    """Both halves of rows of 2 * HALF, times the orthonormal Sylvester matrix: twice one of half the width."""
    i, j = tl.arange(0, HALF)[:, None], tl.arange(0, HALF)[None, :]
    bits = i & j
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    signs = (1 - 2 * (bits & 1)).to(low.dtype)
    a = tl.dot(low, signs, input_precision=PRECISION)
    b = tl.dot(high, signs, input_precision=PRECISION)
    return (a + b) / root, (a - b) / root


@triton.jit
def _qk_codes_kernel(
    qkv, q_gain, k_gain, cos, sin, k_mean, steps, q_out, k_out, L, cos_stride, sin_stride, root, eps,
    N: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_HALF: tl.constexpr,
    ROTATE: tl.constexpr, PRECISION: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = K // 2
    rows, cols = tl.arange(0, TOKENS * BLOCK_N)[:, None], tl.arange(0, BLOCK_HALF)[None, :]
    token, heads = tl.program_id(0).to(tl.int64) * TOKENS + rows // BLOCK_N, rows % BLOCK_N
    keep, at, spread = (heads < N) & (cols < HALF) & (token < L), heads * K + cols, rows * 0 + cols
    q, k = qkv + token * (3 * N * K) + at, qkv + token * (3 * N * K) + N * K + at
    # All loads first: they are in flight together.
    q_low = tl.load(q, keep, 0.0, eviction_policy="evict_first")
    q_high = tl.load(q + HALF, keep, 0.0, eviction_policy="evict_first")
    k_low = tl.load(k, keep, 0.0, eviction_policy="evict_first")
    k_high = tl.load(k + HALF, keep, 0.0, eviction_policy="evict_first")
    c = tl.load(cos + token * cos_stride + cols, keep, 0.0)
    s = tl.load(sin + token * sin_stride + cols, keep, 0.0)
    q_low, q_high = normed_rotated(q_low, q_high, q_gain, spread, keep, c, s, eps, qkv, K, HALF)
    k_low, k_high = normed_rotated(k_low, k_high, k_gain, spread, keep, c, s, eps, qkv, K, HALF)
    mean = tl.load(k_mean + at, keep, 0.0, eviction_policy="evict_last")
    k_low = (k_low.to(tl.float32) - mean).to(qkv.dtype.element_ty)
    mean = tl.load(k_mean + at + HALF, keep, 0.0, eviction_policy="evict_last")
    k_high = (k_high.to(tl.float32) - mean).to(qkv.dtype.element_ty)
    if ROTATE:
        q_low, q_high = _hadamard(q_low, q_high, root, HALF, PRECISION)
        k_low, k_high = _hadamard(k_low, k_high, root, HALF, PRECISION)
    q_unit, k_unit = tl.load(steps), tl.load(steps + 1)
    to = begins(0, heads, token, L, N, K, HEADS, COLUMNS, PARTS) + cols
    store_codes(q_out + to, q_low.to(tl.float32) / q_unit, keep)
    store_codes(q_out + to + HALF, q_high.to(tl.float32) / q_unit, keep)
    to = begins(1, heads, token, L, N, K, HEADS, COLUMNS, PARTS) + cols
    store_codes(k_out + to, k_low.to(tl.float32) / k_unit, keep)
    store_codes(k_out + to + HALF, k_high.to(tl.float32) / k_unit, keep)


@triton.jit
def _restored_kernel(
    x, v_mean, v_step, out_step, out, L, NK: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, CODES: tl.constexpr
):  # fmt: skip
    cols = tl.arange(0, BLOCK)
    keep = cols < NK
    mean, step = tl.load(v_mean + cols, keep, 0.0), tl.load(v_step + cols, keep, 0.0)
    unit = 1.0 / tl.load(out_step) if CODES else 1.0
    first = tl.program_id(0).to(tl.int64) * TOKENS
    for row in range(first, min(first + TOKENS, L)):
        value = tl.load(x + row * NK + cols, keep, 0.0, eviction_policy="evict_first").to(tl.float32)
        if CODES:
            store_codes(out + row * NK + cols, (value * step + mean) * unit, keep)
        else:
            tl.store(out + row * NK + cols, (value * step + mean).to(out.dtype.element_ty), keep)


def _sizes(qkv: Tensor, gain: Tensor) -> tuple[int, int, int]:
    return qkv.shape[0], qkv.shape[1] // (3 * gain.shape[0]), gain.shape[0]


def _tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(table if table.stride(1) == 1 else table.contiguous() for table in (cos, sin))  # type: ignore[return-value]


def _chunks(
    qkv: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, eps: float, config: Config
) -> tuple[Tensor, Tensor]:
    """Of each chunk of tokens: sums of k and v (chunks, 2, N, K) fp64, least and largest v (chunks, 2, N, K) fp32."""
    L, N, K = _sizes(qkv, k_gain)
    cos, sin = _tables(cos, sin)
    chunks = triton.cdiv(L, config.block)
    sums = qkv.new_empty(chunks, 2, N, K, dtype=torch.float64)
    ends = qkv.new_empty(chunks, 2, N, K, dtype=torch.float32)
    if chunks:
        channel_sums[(chunks, 2)](
            qkv, k_gain.contiguous(), cos, sin, sums, ends, L, config.block, cos.stride(0), sin.stride(0), eps,
            N=N, K=K, BLOCK_N=triton.next_power_of_2(N), BLOCK_HALF=triton.next_power_of_2(K // 2), STAGES=STAGES,
            num_warps=config.warps,
        )  # fmt: skip
    return sums, ends


def qkv_moments(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, eps: float, *, config: Config = MOMENTS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """k_mean, v_mean, v_step (N, K) and steps (3,), fp32. config.block: tokens that one program sums."""
    with on_device_of(qkv):
        sums, ends = _chunks(qkv, k_gain, cos, sin, eps, config)
    return moments_of_sums(sums, ends, q_gain, k_gain, qkv.shape[0])


def moments_of_sums(
    sums: Tensor, ends: Tensor, q_gain: Tensor, k_gain: Tensor, tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k_mean, v_mean, v_step (N, K) and steps (3,), fp32, from (parts, 2, N, K) of the parts of so many tokens."""
    parts, _, N, K = sums.shape
    k_mean, v_mean, v_step = (ends.new_empty(N, K) for _ in range(3))
    steps = ends.new_empty(3)
    with on_device_of(sums):
        _moments_finish_kernel[(triton.cdiv(N * K, 32),)](
            sums, ends, q_gain.contiguous(), k_gain.contiguous(), k_mean, v_mean, v_step, steps, tokens, parts, K**0.5,
            NK=N * K, K=K, ROWS=64, BLOCK=32, BLOCK_K=triton.next_power_of_2(K), num_warps=4,
        )  # fmt: skip
    return k_mean, v_mean, v_step, steps


def qkv_sums(
    qkv: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, eps: float, *, config: Config = MOMENTS
) -> tuple[Tensor, Tensor]:
    """Sums of k and v (2, N, K) fp64, least and largest v (2, N, K) fp32. config.block: tokens that one program sums."""
    _, N, K = _sizes(qkv, k_gain)
    found = qkv.new_empty(2, N, K, dtype=torch.float64), qkv.new_empty(2, N, K, dtype=torch.float32)
    with on_device_of(qkv):
        sums, ends = _chunks(qkv, k_gain, cos, sin, eps, config)
        _sums_finish_kernel[(triton.cdiv(N * K, 32),)](
            sums, ends, *found, sums.shape[0], NK=N * K, ROWS=64, BLOCK=32, num_warps=4
        )
    return found


def qkv_codes(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, k_mean: Tensor, v_mean: Tensor,
    v_step: Tensor, steps: Tensor, rotate: bool, pack: bool, eps: float, *,
    config: Config | None = None, v_config: Config = VALUES,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """e4m3 codes of q, k and v, (L, N, K), or v (N, K, L up to 16). config.block: tokens of one program."""
    L, N, K = _sizes(qkv, q_gain)
    rows, packed = (L, N, K), (N, K, triton.cdiv(L, 16) * 16)
    outs = tuple(qkv.new_empty(shape, dtype=E4M3) for shape in (rows, rows, packed if pack else rows))
    given = qkv, q_gain, k_gain, cos, sin, k_mean, v_mean, v_step, steps, rotate, pack, eps
    _write_codes(*given, outs, 0, 0, config, v_config)
    return outs  # type: ignore[return-value]


def codes_packed(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, k_mean: Tensor, v_mean: Tensor,
    v_step: Tensor, steps: Tensor, rotate: bool, columns: int, parts: int, eps: float, *,
    config: Config | None = None, v_config: Config = VALUES,
) -> Tensor:  # fmt: skip
    """The same codes where ranks send them from, as `norm_rope.qkv_packed` gives them, part after part: (L*3*N*K,) e4m3."""
    out = qkv.new_empty(qkv.numel(), dtype=E4M3)
    given = qkv, q_gain, k_gain, cos, sin, k_mean, v_mean, v_step, steps, rotate, False, eps
    _write_codes(*given, (out, out, out), columns, parts, config, v_config)
    return out


def _write_codes(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, k_mean: Tensor, v_mean: Tensor,
    v_step: Tensor, steps: Tensor, rotate: bool, pack: bool, eps: float, outs: tuple[Tensor, ...], columns: int,
    parts: int, config: Config | None, v_config: Config,
) -> None:  # fmt: skip
    """Codes of q, k and v into `outs`; columns, parts: those of what travels, 0 where nothing does."""
    L, N, K = _sizes(qkv, q_gain)
    if qkv.numel() == 0:
        return
    q, k, v = outs
    cos, sin = _tables(cos, sin)
    sent = sent_from(N, columns, parts)
    config = config or (ROTATED if rotate else CODES)
    BLOCK_N = triton.next_power_of_2(N)
    tokens = max(config.block, 16 // BLOCK_N) if rotate else config.block  # a product has 16 rows at least
    with on_device_of(qkv):
        _qk_codes_kernel[(triton.cdiv(L, tokens),)](
            qkv, q_gain.contiguous(), k_gain.contiguous(), cos, sin, k_mean, steps, q, k, L, cos.stride(0),
            sin.stride(0), K**0.5, eps, N=N, K=K, TOKENS=tokens, BLOCK_N=BLOCK_N,
            BLOCK_HALF=triton.next_power_of_2(K // 2), ROTATE=rotate,
            PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32", **sent, num_warps=config.warps,
        )  # fmt: skip
        write_v_codes(qkv, v_mean, v_step, v, pack, v_config, columns, parts)


def value_codes(
    qkv: Tensor, v_mean: Tensor, v_step: Tensor, pack: bool, *, config: Config = VALUES
) -> Tensor:
    """e4m3 codes of v (L, N, K), or packed (N, K, L up to 16). config.block: tokens of one program."""
    L, (N, K) = qkv.shape[0], v_mean.shape
    out = qkv.new_empty((N, K, triton.cdiv(L, 16) * 16) if pack else (L, N, K), dtype=E4M3)
    if out.numel():
        with on_device_of(qkv):
            write_v_codes(qkv, v_mean, v_step, out, pack, config)
    return out


def write_packed_values(
    qkv: Tensor, v_mean: Tensor, v_step: Tensor, packed: Tensor, columns: int, parts: int, *, config: Config = VALUES
) -> None:  # fmt: skip
    """Codes of v to their places of `packed`, as `codes_packed` writes them. config.block: tokens of one program."""
    if packed.numel():
        with on_device_of(qkv):
            write_v_codes(qkv, v_mean, v_step, packed, False, config, columns, parts)


def values_restored(
    x: Tensor, v_step: Tensor, v_mean: Tensor, out_step: Tensor | None = None, *, config: Config = RESTORED
) -> Tensor:
    """x * v_step + v_mean: (L, N, K); with out_step (1,) its codes. config.block: tokens of one program."""
    L, NK, codes = x.shape[0], x.shape[1] * x.shape[2], out_step is not None
    out = torch.empty_like(x, dtype=E4M3 if codes else x.dtype)
    if out.numel():
        with on_device_of(x):
            _restored_kernel[(triton.cdiv(L, config.block),)](
                x, v_mean, v_step, out_step if codes else v_step, out, L, NK=NK, TOKENS=config.block,
                BLOCK=triton.next_power_of_2(NK), CODES=codes, num_warps=config.warps,
            )  # fmt: skip
    return out
