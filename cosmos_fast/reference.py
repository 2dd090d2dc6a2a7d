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

ATTENTION_ROWS = 1024
"""Query rows per step of the reference attention, so that scores stay small on any machine."""


def _per_token(rows_TD: Tensor, num_tokens: int, tokens_per_frame: int, token_offset: int) -> Tensor:
    frame = (torch.arange(num_tokens, device=rows_TD.device) + token_offset) // tokens_per_frame
    return rows_TD.float()[frame]


def adaln(
    x: Tensor, shift: Tensor, scale: Tensor, tokens_per_frame: int, token_offset: int, eps: float, out: torch.dtype
) -> Tensor:
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


def gelu(x: Tensor) -> Tensor:
    """x * Phi(x) with the exact erf."""
    return F.gelu(x.float()).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v for each head, no mask: (L, N, K), (S, N, K), (S, N, K) -> (L, N, K)."""
    keys, values = k.float().permute(1, 2, 0), v.float().transpose(0, 1)
    parts = [
        torch.softmax(rows.float().transpose(0, 1) @ keys * q.shape[-1] ** -0.5, dim=-1) @ values
        for rows in q.split(ATTENTION_ROWS)
    ]
    return torch.cat([part.transpose(0, 1).to(q.dtype) for part in parts])


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
    return (
        y.reshape(T, H // 2, W // 2, 2, 2, channels).permute(5, 0, 1, 3, 2, 4).reshape(channels, T, H, W)
    )
