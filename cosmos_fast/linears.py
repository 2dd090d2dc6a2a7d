"""Linear layers of a block behind one signature: the part of a block that recipes replace, beside its self-attention.

A layer says what it takes: `normed` settles the residual stream and gives its normalised rows in that form, `attended`
has self-attention write its result in it, and what one layer gives another takes. It says as well how its product reaches
what comes after it: `heads` norms it per head, `onto` adds it to the residual stream, at once or as a debt. `Block` knows
no more than that, so 8-bit layers (`quant`) are other classes with the same names of parameters, not branches in a
forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from . import ops, self_attention
from .ops import Pending


class Linear(nn.Linear):
    """y = x W^T + b in the dtype of x, nothing quantised."""

    normed = staticmethod(ops.residual_adaln)
    attended = staticmethod(self_attention.attended)

    def heads(self, x: Tensor, gain: Tensor) -> Tensor:
        """x (L, in) -> (L, N, K), every head of K features RMS-normed and times gain (K,); without bias."""
        return ops.linear_head_norm(x, self.weight, gain)

    def onto(
        self, x: Tensor, h: Tensor, gate: Tensor, *, keep: bool = False
    ) -> tuple[Tensor, Pending | None]:
        """x (L, out) and what it is still owed of gate * (h W^T): h (L, in), gate (R, out); without bias.

        x is overwritten where one gate serves all tokens: as factors of the rows of W it makes the product the whole sum,
        which the GEMM adds in fp32 and rounds once. keep: leave it a debt, for control hints are to join it.
        """
        if keep or gate.shape[0] > 1:
            return x, Pending(self(h), gate)
        return x.addmm_(h, (self.weight * gate[0, :, None]).T), None


class Apart:
    """For layers whose product stays a tensor of its own: norm and sum are kernels after it, the sum with the next norm."""

    __call__: Callable[..., Tensor]
    attended = staticmethod(self_attention.attended)

    def heads(self, x: Any, gain: Tensor) -> Tensor:
        return ops.head_norm(self(x), gain)

    def onto(self, x: Tensor, h: Any, gate: Tensor, *, keep: bool = False) -> tuple[Tensor, Pending | None]:
        return x, Pending(self(h), gate)


class LinearGelu(nn.Linear):
    """gelu(x W^T), in the form that the layer after it takes."""

    normed = staticmethod(ops.residual_adaln)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear_gelu(x, self.weight)


def linear(inputs: int, outputs: int, bias: bool = False) -> Linear:
    return Linear(inputs, outputs, bias=bias)
