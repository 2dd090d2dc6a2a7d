"""Adapters from attention libraries to one signature: (L, N, K), (S, N, K), (S, N, K) -> (L, N, K).

Scale 1/sqrt(K), no mask, same dtype out. Each function imports its library when first called; `ops`
decides which of them may run where.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

FEW_KEYS = 512
"""Up to so many, FlashAttention-3 is faster without packing heads, at many more slower (docs/log.md)."""


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1)[None]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's scaled_dot_product_attention, with the backend torch prefers."""
    out = F.scaled_dot_product_attention(_heads_first(q), _heads_first(k), _heads_first(v))
    return out[0].transpose(0, 1)


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's scaled_dot_product_attention through cuDNN."""
    if q.shape[0] == 0:  # a rank without tokens; cuDNN has no plan for it
        return torch.empty_like(q)
    if k.shape[0] == 1:  # nor for a single key, whose attention is its value
        return v.expand_as(q).clone()
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v)


def memory_efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """On a GPU by torch's memory-efficient kernel: no flash kernel has a head as wide as the VAE's, and left to itself torch
    may take the one that holds all scores."""
    if q.numel() == 0:  # it takes no empty operand
        return torch.empty_like(q)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION) if q.is_cuda else nullcontext():
        return sdpa(q, k, v).contiguous()


def load_fa3() -> Attend:
    """FlashAttention-3 forward, from either of its two distributions."""
    try:
        from flash_attn_interface import flash_attn_func  # type: ignore[import-not-found]
    except ImportError:
        from fa3_fwd_interface import flash_attn_func  # type: ignore[import-not-found]

    def fa3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(q[None], k[None], v[None], pack_gqa=False if k.shape[0] <= FEW_KEYS else None)
        return (out[0] if isinstance(out, tuple) else out)[0]

    return fa3


def load_fa2() -> Attend:
    """FlashAttention-2."""
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    def fa2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_func(q[None], k[None], v[None])[0]

    return fa2
