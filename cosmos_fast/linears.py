"""Linear layers of a block behind one signature: the part of a block that recipes replace, beside its self-attention.

A layer says what it takes: `normed` settles the residual stream and gives its normalised rows in that form, and what
one layer gives another takes. `Block` knows no more than that, so 8-bit layers (`quant`) are other classes with the same
names of parameters, not branches in a forward.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from . import ops


class Linear(nn.Linear):
    """y = x W^T + b in the dtype of x, nothing quantised."""

    normed = staticmethod(ops.residual_adaln)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (L, in) -> (L, out); a bias that is given takes the place of the layer's own."""
        return F.linear(x, self.weight, self.bias if bias is None else bias)


class LinearGelu(nn.Linear):
    """gelu(x W^T), in the form that the layer after it takes."""

    normed = staticmethod(ops.residual_adaln)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear_gelu(x, self.weight)


def linear(inputs: int, outputs: int, bias: bool = False) -> Linear:
    return Linear(inputs, outputs, bias=bias)
