"""The contract: every op in plain torch, fp32 inside, one rounding at the output.

If a kernel and its reference disagree, the reference wins. Shape letters: L tokens, D width, N heads,
K head width, S context tokens, T latent frames (or 1 row shared by all frames), J control branches,
C H W latent channels, rows, columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import cuts
from .packing import PACK as PACK
from .packing import TILE_KEYS, TILE_QUERIES, packed, unpacked
from .packing import packed as values_packed  # noqa: F401
from .reference_vae import conv3d as conv3d
from .reference_vae import conv3d_fp8 as conv3d_fp8
from .reference_vae import conv_double as conv_double
from .reference_vae import conv_half as conv_half
from .reference_vae import norm_silu as norm_silu
from .reference_vae import norm_silu_fp8 as norm_silu_fp8
from .schedule import StepCoefficients

ATTENTION_ROWS = 1024
"""Query rows per step of the reference attention, so that scores stay small on any machine."""

E4M3, E4M3_MAX = torch.float8_e4m3fn, 448.0


def _per_token(rows_TD: Tensor, num_tokens: int, tokens_per_frame: int, token_offset: int) -> Tensor:
    frame = (torch.arange(num_tokens, device=rows_TD.device) + token_offset) // tokens_per_frame
    return rows_TD.float()[frame]


def adaln(
    x: Tensor, shift: Tensor, scale: Tensor, tokens_per_frame: int, token_offset: int, eps: float, out: torch.dtype
) -> Tensor:  # fmt: skip
    """y = ln(x) * (1 + scale[frame]) + shift[frame]; ln has no affine."""
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    place = (x.shape[0], tokens_per_frame, token_offset)
    return (normed * (1 + _per_token(scale, *place)) + _per_token(shift, *place)).to(out)


def residual(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    hints: Sequence[Tensor],
    hint_weights: Tensor | None,
    tokens_per_frame: int,
    token_offset: int,
) -> Tensor:
    """x + gate[frame] * branch + sum_j hint_weights[j] * hints[j]."""
    total = x.float() + _per_token(gate, x.shape[0], tokens_per_frame, token_offset) * branch.float()
    for j, hint in enumerate(hints):
        assert hint_weights is not None
        total = total + hint_weights[j].float()[:, None] * hint.float()
    return total.to(x.dtype)


def residual_adaln(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    hints: Sequence[Tensor],
    hint_weights: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    tokens_per_frame: int,
    token_offset: int,
    eps: float,
    out: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`residual`, then `adaln` of its rounded sum."""
    total = residual(x, branch, gate, hints, hint_weights, tokens_per_frame, token_offset)
    return total, adaln(total, shift, scale, tokens_per_frame, token_offset, eps, out)


def _rms(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain.float()


def head_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """RMS norm of each head: (L, N*K) -> (L, N, K)."""
    return _rms(x.unflatten(-1, (-1, gain.shape[0])), gain, eps).to(x.dtype)


def qk_norm_rope(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Per-head RMS norm of q and k, rounded, then rotate-half by the token's 3-D angles.

    Shapes: qkv (L, 3*N*K); cos, sin (L, K/2) fp32; returns q, k (L, N, K).
    """

    def rotate(part: Tensor, gain: Tensor) -> Tensor:
        low, high = head_norm(part, gain, eps).float().chunk(2, dim=-1)
        c, s = cos[:, None, :], sin[:, None, :]
        return torch.cat((low * c - high * s, high * c + low * s), dim=-1).to(qkv.dtype)

    q, k, _ = qkv.chunk(3, dim=-1)
    return rotate(q, q_gain), rotate(k, k_gain)


def qkv_packed(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, columns: int, first: int, last: int, eps: float
) -> Tensor:  # fmt: skip
    """q, k and v of heads `first` to `last` of each column, as they travel between ranks: (columns, L, 3, heads, K)."""
    q, k = qk_norm_rope(qkv, q_gain, k_gain, cos, sin, eps)
    return _travelling(q, k, qkv.chunk(3, -1)[2].view_as(q), columns, slice(first, last))


def _travelling(q: Tensor, k: Tensor, v: Tensor, columns: int, heads: slice) -> Tensor:
    x = torch.stack((q, k, v), 1).unflatten(2, (columns, -1))
    return x[:, :, :, heads].permute(2, 0, 1, 3, 4).contiguous()


def gelu(x: Tensor) -> Tensor:
    """x * Phi(x) with the exact erf."""
    return F.gelu(x.float()).to(x.dtype)


def linear_gelu(x: Tensor, w: Tensor) -> Tensor:
    """gelu(x @ w^T), the product rounded first, as the published network does it in two modules."""
    return gelu(F.linear(x.float(), w.float()).to(x.dtype))


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (L, D) e4m3 and steps (L,) of rows: the norm of a row is 448 steps."""
    steps = x.float().norm(dim=1).clamp_min(1e-20) / E4M3_MAX
    return _codes(x.float(), steps[:, None]), steps


def adaln_fp8(
    x: Tensor, shift: Tensor, scale: Tensor, tokens_per_frame: int, token_offset: int, eps: float
) -> tuple[Tensor, Tensor]:
    """`quantise` of `adaln` in fp32."""
    return quantise(adaln(x, shift, scale, tokens_per_frame, token_offset, eps, torch.float32))


def residual_adaln_fp8(
    x: Tensor, branch: Tensor, gate: Tensor, hints: Sequence[Tensor], hint_weights: Tensor | None, shift: Tensor,
    scale: Tensor, tokens_per_frame: int, token_offset: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`residual`, then `adaln_fp8` of its rounded sum."""
    total = residual(x, branch, gate, hints, hint_weights, tokens_per_frame, token_offset)
    return total, *adaln_fp8(total, shift, scale, tokens_per_frame, token_offset, eps)


def gelu_fp8(x: Tensor, steps: Tensor) -> Tensor:
    """Codes of `gelu` at given steps (L,)."""
    return _codes(F.gelu(x.float()), steps[:, None])


def linear_fp8(
    a: Tensor, a_steps: Tensor, w: Tensor, w_steps: Tensor, bias: Tensor | None, out: torch.dtype
) -> Tensor:
    """(a * a_steps) (w * w_steps)^T + bias: codes (L, D), (M, D), steps (L,), (M,)."""
    y = F.linear(a.float(), w.float()) * a_steps[:, None] * w_steps
    return (y if bias is None else y + bias.float()).to(out)


def linear_gelu_fp8(a: Tensor, a_steps: Tensor, steps: Tensor, w: Tensor, w_steps: Tensor) -> Tensor:
    """`linear_fp8` in fp32, then `gelu_fp8`."""
    return gelu_fp8(linear_fp8(a, a_steps, w, w_steps, None, torch.float32), steps)


def linear_head_norm(x: Tensor, w: Tensor, gain: Tensor, eps: float) -> Tensor:
    """RMS norm of each head of x @ w^T, the product rounded first, as the published network does it in two modules."""
    return head_norm(F.linear(x.float(), w.float()).to(x.dtype), gain, eps)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v for each head, no mask: (L, N, K), (S, N, K), (S, N, K) -> (L, N, K)."""
    keys, values = k.float().permute(1, 2, 0), v.float().transpose(0, 1)
    parts = [
        torch.softmax(rows.float().transpose(0, 1) @ keys * q.shape[-1] ** -0.5, dim=-1) @ values
        for rows in q.split(ATTENTION_ROWS)
    ]
    return torch.cat([part.transpose(0, 1).to(q.dtype) for part in parts])


attention_wide = attention


def qkv_moments(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Over all tokens: mean of rotated k, `centred` mean of v, step of each channel of v (N, K); steps of q, k, a score (3,)."""
    sums, ends = qkv_sums(qkv, k_gain, cos, sin, eps)
    return moments_of_sums(sums[None], ends[None], q_gain, k_gain, len(qkv))


def qkv_sums(qkv: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Sums of rotated k and of v (2, N, K) fp64, least and largest v (2, N, K) fp32: of tokens of whichever ranks, they add up."""
    _, k = qk_norm_rope(qkv, k_gain, k_gain, cos, sin, eps)
    v = qkv.chunk(3, dim=-1)[2].unflatten(-1, k.shape[1:]).float()
    none = v.new_full((1, *v.shape[1:]), torch.inf)
    ends = torch.cat((v, none)).amin(0), torch.cat((v, -none)).amax(0)
    return torch.stack((k.double().sum(0), v.double().sum(0))), torch.stack(ends)


def moments_of_sums(
    sums: Tensor, ends: Tensor, q_gain: Tensor, k_gain: Tensor, tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`qkv_moments` from `qkv_sums` of parts of the tokens (parts, 2, N, K)."""
    (k_mean, v_mean), K = (sums.sum(0) / max(tokens, 1)).float(), k_gain.shape[0]
    least, most = (ends[:, 0].amin(0), ends[:, 1].amax(0)) if tokens else 2 * (torch.zeros_like(v_mean),)
    v_mean = centred(v_mean, torch.maximum(least.abs(), most.abs()))
    peak = torch.maximum(most - v_mean, v_mean - least)
    # Normed to sqrt(K), scaled by the gain, rotated: no entry is larger than q_most; k less its mean, than twice k_most.
    q_most, k_most = (K**0.5 * gain.float().abs().amax() for gain in (q_gain, k_gain))
    q_step, k_step, v_step = (power_of_two(most / E4M3_MAX) for most in (q_most, 2 * k_most, peak))
    return k_mean, v_mean, v_step, torch.stack((q_step, k_step, q_step * k_step / K**0.5))


def centred(mean: Tensor, largest: Tensor) -> Tensor:
    """The mean of values no larger than `largest`, rounded to the spacing of bf16 there.

    One bf16 value in 16 lies in the middle between two codes of e4m3 and goes to the even one, as often up as down. Less a
    mean finer than their spacing all of these lie to one side of the middle, and the codes are off by 2e-3 together:
    little, but a fifth of what attention makes of 84,480 normal values.
    """
    unit = power_of_two(largest / 256)
    return torch.floor(mean / unit + 0.5) * unit


def power_of_two(x: Tensor) -> Tensor:
    """The next one above x >= 0, 1 for 0: dividing by it rounds nothing, so codes do not depend on how x was summed."""
    return torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent) + 0 * x  # NaN and infinity stay no number


def qkv_codes(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, k_mean: Tensor, v_mean: Tensor,
    v_step: Tensor, steps: Tensor, rotate: bool, pack: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """e4m3 (L, N, K) of q, of k less its mean, both times a Hadamard matrix if `rotate`, and of v less its mean, `packed` if so."""
    q, k = qk_norm_rope(qkv, q_gain, k_gain, cos, sin, eps)
    k = (k.float() - k_mean).to(qkv.dtype)
    if rotate:
        q, k = (x.float() @ hadamard(x.shape[-1], x.device).float() for x in (q, k))
    v = _codes(qkv.chunk(3, dim=-1)[2].unflatten(-1, k.shape[1:]).float() - v_mean, v_step)
    return _codes(q.float(), steps[0]), _codes(k.float(), steps[1]), packed(v) if pack else v


def codes_packed(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, k_mean: Tensor, v_mean: Tensor,
    v_step: Tensor, steps: Tensor, rotate: bool, columns: int, parts: int, eps: float,
) -> Tensor:  # fmt: skip
    """`qkv_codes`, v as it is, as `qkv_packed` gives them: for each part of a column's heads, one behind the other."""
    q, k, v = qkv_codes(qkv, q_gain, k_gain, cos, sin, k_mean, v_mean, v_step, steps, rotate, False, eps)
    pieces = [_travelling(q, k, v, columns, heads) for heads in cuts(q.shape[1] // columns, parts)]
    return torch.cat([piece.view(-1) for piece in pieces])


def _codes(x: Tensor, step: Tensor) -> Tensor:
    return (x / step).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def hadamard(K: int, device: torch.device | None = None) -> Tensor:
    """The orthonormal Sylvester matrix (K, K) fp64, K a power of two: H[i, j] = (-1)^(ones of i & j) / sqrt(K)."""
    H = torch.ones(1, 1, dtype=torch.float64, device=device)
    while H.shape[0] < K:
        H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)))
    return H / K**0.5


def attended_steps(v_step: Tensor, v_mean: Tensor, rows: int) -> Tensor:
    """A step for codes of attention, `rows` times: no weighted mean of v is larger than 448 of it."""
    return power_of_two((v_mean.abs() / E4M3_MAX + v_step).amax()).expand(rows).contiguous()


def _written(x: Tensor, out: torch.dtype, step: Tensor | None) -> Tensor:
    return x.to(out) if step is None else _codes(x, step)


def attention_fp8(
    q: Tensor, k: Tensor, v: Tensor, score_step: Tensor, v_step: Tensor, v_mean: Tensor, out: torch.dtype,
    out_step: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(q k^T * score_step) (v * v_step + v_mean) of codes, weights not rounded: (L, N, K).

    q (L, N, K), k (S, N, K); v (S, N, K), or `packed`. out_step (1,): the result as codes of that step, `out` e4m3.
    """
    rows = v if v.shape == k.shape else unpacked(v, k.shape[0])
    keys, values = k.float().permute(1, 2, 0), (rows.float() * v_step + v_mean).transpose(0, 1)
    parts = [
        torch.softmax(part.float().transpose(0, 1) @ keys * score_step, dim=-1) @ values
        for part in q.split(ATTENTION_ROWS)
    ]
    return torch.cat([_written(part.transpose(0, 1), out, out_step) for part in parts])


def attention_fp8_tiles(
    q: Tensor, k: Tensor, v: Tensor, score_step: Tensor, v_step: Tensor, v_mean: Tensor, out: torch.dtype, key_tiles: Tensor,
    key_counts: Tensor, out_step: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`attention_fp8` of each query tile over the key tiles of its list: (L, N, K), and the log-sum-exp (N, L) fp32.

    key_tiles (N, query tiles, capacity), the first key_counts (N, query tiles) of which count; none: v_mean and -inf.
    """
    S, sums = k.shape[0], [v_step.new_empty(q.shape[1], 0)]
    outs = [_written(v_step.new_empty(0, *q.shape[1:]), out, out_step)]
    rows = v if v.shape == k.shape else unpacked(v, S)
    keys, values = k.float().permute(1, 2, 0), (rows.float() * v_step).transpose(0, 1)
    place = torch.arange(key_tiles.shape[2], device=q.device)
    tile_of_key = torch.arange(S, device=q.device) // TILE_KEYS
    for i, part in enumerate(q.split(TILE_QUERIES) if len(q) else ()):
        listed = torch.where(place < key_counts[:, i, None], key_tiles[:, i], -1)
        kept = (listed[:, :, None] == tile_of_key).any(1)[:, None]
        scores = (part.float().transpose(0, 1) @ keys * score_step).masked_fill(~kept, -torch.inf)
        sums.append(scores.logsumexp(-1))
        weights = torch.where(kept, (scores - sums[-1][..., None]).exp(), 0.0)
        outs.append(_written((weights @ values + v_mean[:, None]).transpose(0, 1), out, out_step))
    return torch.cat(outs), torch.cat(sums, 1)


def tile_means(x: Tensor, rows: int) -> Tensor:
    """Mean of each tile of `rows` tokens of x (L, N, K), the last of those that are left: (tiles, N, K) fp32."""
    means = [part.float().mean(0) for part in x.split(rows)] if len(x) else []
    return torch.stack(means) if means else x.new_empty(x.shape, dtype=torch.float32)


def values_restored(x: Tensor, v_step: Tensor, v_mean: Tensor, out_step: Tensor | None = None) -> Tensor:
    """x * v_step + v_mean: (L, N, K), or its codes."""
    return _written(x.float() * v_step + v_mean, x.dtype, out_step)


def patchify(z: Tensor, mask: Tensor) -> Tensor:
    """Latent (C, T, H, W) and conditioning mask (T,) -> patch vectors (L, 4*(C+2)).

    Token order is frame, row, column; features are channel-slowest; the last two channels are the
    conditioning mask and the (always zero) padding mask.
    """
    C, T, H, W = z.shape
    flags = mask.to(z.dtype)[None, :, None, None].expand(1, T, H, W)
    full = torch.cat((z, flags, torch.zeros_like(flags)))
    patches = full.reshape(C + 2, T, H // 2, 2, W // 2, 2).permute(1, 2, 4, 0, 3, 5)
    return patches.reshape(T * (H // 2) * (W // 2), 4 * (C + 2))


def unpatchify(y: Tensor, T: int, H: int, W: int) -> Tensor:
    """Head output (L, 4*C), features (row, column, channel) -> latent (C, T, H, W)."""
    channels = y.shape[1] // 4
    z = y.reshape(T, H // 2, W // 2, 2, 2, channels).permute(5, 0, 1, 3, 2, 4)
    return z.clone(memory_format=torch.contiguous_format).view(channels, T, H, W)


def guided_unipc(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    m1: Tensor,
    m2: Tensor,
    last: Tensor,
    guidance: float,
    coefficients: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """v = v_cond + guidance * (v_cond - v_uncond), then the three lines of `StepCoefficients`, in fp32.

    All tensors have one shape. A tensor whose coefficient is 0 does not reach the result, not even as NaN.
    """
    c = StepCoefficients(*coefficients)
    v = v_cond.float()
    if v_uncond is not None:
        v = v + guidance * (v - v_uncond.float())
    m = x - c.sigma * v
    corrected = _combine(
        (c.corrector_last, last), (c.corrector_m, m), (c.corrector_m1, m1), (c.corrector_m2, m2)
    )
    x_next = _combine((c.predictor_x, corrected), (c.predictor_m, m), (c.predictor_m1, m1))
    return x_next, m, corrected


def _combine(*terms: tuple[float, Tensor]) -> Tensor:
    first, *rest = [factor * tensor for factor, tensor in terms if factor != 0]
    for term in rest:
        first = first + term
    return first


def pixels(x: Tensor) -> Tensor:
    """Model range (1, 3, F, H, W) -> codes (F, H, W, 3) uint8, truncated."""
    codes = (x[0].float() * 127.5 + 127.5).clamp(0, 255).to(torch.uint8)
    return codes.permute(1, 2, 3, 0).contiguous()


def normalized(frames: Tensor, out: torch.dtype) -> Tensor:
    """Codes uint8 -> code / 127.5 - 1, both steps rounded to `out`. Any shape."""
    # A tensor divisor: torch turns a Python number on CUDA into a product with its rounded reciprocal.
    half = torch.full((), 127.5, dtype=out, device=frames.device)
    return frames.to(out).div(half).sub(1)
