"""From a block's packed projection to its attended values: the part of a block that recipes and plans replace.

`Block` knows this signature alone. What quantises the operands, and what exchanges them between ranks, are other
functions of the same signature.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from . import ops
from .ops_linear8 import Quantised


class SelfAttention(Protocol):
    def __call__(
        self, qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, step: int
    ) -> Tensor:
        """Norm q and k per head, rotate them, attend.

        Shapes: qkv (L, 3*N*K) packed q, k, v; gains (K,); cos, sin (L, K/2) fp32; step: index in the schedule,
        for what changes its precision over the steps. Returns (L, N*K) in qkv's dtype.
        """


@runtime_checkable
class SelfAttention8(SelfAttention, Protocol):
    """One that can write its result in 8 bits as well."""

    def quantised(
        self, qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, step: int
    ) -> Quantised:
        """The same as codes and steps, of rows (L, N*K)."""


def attended(attend: SelfAttention, *given: Any) -> Tensor:
    """What it gives for a layer that takes rows as they are. given: what `attend` takes."""
    return attend(*given)


def attended_in_8_bits(attend: SelfAttention, *given: Any) -> Tensor | Quantised:
    """What it gives for a layer that takes 8-bit rows, and makes them of others."""
    return attend.quantised(*given) if isinstance(attend, SelfAttention8) else attend(*given)


def exact(qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, step: int) -> Tensor:
    """In the dtype of qkv, nothing quantised, every token on this device."""
    q, k, v = ops.qk_norm_rope(qkv, q_gain, k_gain, cos, sin)
    return ops.attention(q, k, v).flatten(1)
