"""Ops of 8-bit linear layers: rows of e4m3 codes with one fp32 step each, what makes them and what multiplies them.

    x ~ code * step,    step = |x|_2 / 448 of a row

The norm, not the largest value, makes the step: e4m3 is floating point, so the unused top of its range costs no digits
(the smallest normal code is 1/637 of the rms at width 2048), and a row's norm bounds every product with it. By Cauchy
and Schwarz |x w| <= |x| |w|, and |gelu(y)| <= |y|, so the step of the MLP's hidden row is known before its product.

Products: one step per row of activations, one per row of weights; fp32 sums. Rows of `dispatch.TABLE` as in `ops`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import operands
from .dispatch import Candidate, define, triton
from .formats import Rows
from .ops import EPS, HOPPER, Pending

E4M3 = (torch.float8_e4m3fn,)
ADA_UP = ((8, 9), (99, 0))


@dataclass(frozen=True)
class Quantised:
    """Rows x ~ codes * steps: codes (L, D) e4m3, steps (L,) fp32; dtype: what the rows would be in, unquantised."""

    codes: Tensor
    steps: Tensor
    dtype: torch.dtype


def _codes(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.float8_e4m3fn)


def _steps(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.float32)


_quantise = define(
    "quantise(Tensor x) -> (Tensor, Tensor)",
    operands.check_quantise,
    lambda x: (_codes(x), _steps(x)),
    triton("quantise", "quantise", capability=ADA_UP),
)
_adaln = define(
    "adaln_fp8(Tensor x, Tensor shift, Tensor scale, int tokens_per_frame, int token_offset, float eps) -> (Tensor, Tensor)",
    operands.check_adaln_fp8,
    lambda x, *rest: (_codes(x), _steps(x)),
    triton("adaln", "adaln_fp8", capability=ADA_UP),
)
_residual_adaln = define(
    "residual_adaln_fp8(Tensor x, Tensor branch, Tensor gate, Tensor[] hints, Tensor? hint_weights, Tensor shift, Tensor scale, "
    "int tokens_per_frame, int token_offset, float eps) -> (Tensor, Tensor, Tensor)",
    operands.check_residual_adaln_fp8,
    lambda x, *rest: (torch.empty_like(x), _codes(x), _steps(x)),
    triton("adaln", "residual_adaln_fp8", capability=ADA_UP),
)
_gelu = define(
    "gelu_fp8(Tensor x, Tensor steps) -> Tensor",
    operands.check_gelu_fp8,
    lambda x, steps: _codes(x),
    triton("quantise", "gelu_fp8", capability=ADA_UP),
)


def scaled_mm(
    a: Tensor, a_steps: Tensor, w: Tensor, w_steps: Tensor, bias: Tensor | None, out: torch.dtype, fast: bool = True
) -> Tensor:  # fmt: skip
    """torch's product of scaled rows. fast: sums stay in the tensor cores' own precision, about 14 bits."""
    if a.shape[0] == 0:
        return a.new_empty(0, w.shape[0], dtype=out)
    bias = None if bias is None else bias.bfloat16()
    y = torch._scaled_mm(
        a, w.t(), a_steps[:, None], w_steps[None], bias=bias, out_dtype=torch.bfloat16, use_fast_accum=fast
    )
    return y.to(out)


_linear = define(
    "linear_fp8(Tensor a, Tensor a_steps, Tensor w, Tensor w_steps, Tensor? bias, ScalarType out) -> Tensor",
    operands.check_linear_fp8,
    lambda a, a_steps, w, w_steps, bias, out: a.new_empty(a.shape[0], w.shape[0], dtype=out),
    Candidate("scaled_mm", lambda: scaled_mm, "cuda", ADA_UP, E4M3),
)


def _linear_then_gelu(a: Tensor, a_steps: Tensor, steps: Tensor, w: Tensor, w_steps: Tensor) -> Tensor:
    """The vendor's product, rounded to bf16, then the op above."""
    return _gelu(_linear(a, a_steps, w, w_steps, None, torch.bfloat16), steps)


_linear_gelu = define(
    "linear_gelu_fp8(Tensor a, Tensor a_steps, Tensor steps, Tensor w, Tensor w_steps) -> Tensor",
    operands.check_linear_gelu_fp8,
    lambda a, a_steps, steps, w, w_steps: a.new_empty(a.shape[0], w.shape[0]),
    # One kernel first: 2.724 ms at the published size beside 3.052 of the pair (2026-11-23-253f9e9-fp8-linears.json).
    triton("linear_gelu_fp8", "linear_gelu_fp8", E4M3, HOPPER),
    Candidate("composed", lambda: _linear_then_gelu, "cuda", ADA_UP, E4M3),
)


# --- public functions ------------------------------------------------------------------------------


def quantised(x: Tensor | Quantised) -> Quantised:
    """Rows (L, D) as codes and steps; what is quantised already stays as it is."""
    if isinstance(x, Quantised):
        return x
    codes, steps = _quantise(x)
    return Quantised(codes, steps, x.dtype)


def residual_adaln(
    x: Tensor, pending: Pending | None, shift: Tensor, scale: Tensor, rows: Rows
) -> tuple[Tensor, Quantised]:
    """`ops.residual_adaln` whose second result is quantised before it is ever rounded to x's dtype."""
    place = rows.tokens_per_frame, rows.token_offset, EPS
    if pending is None:
        codes, steps = _adaln(x, shift, scale, *place)
        return x, Quantised(codes, steps, x.dtype)
    p = pending
    x, codes, steps = _residual_adaln(x, p.branch, p.gate, p.hints, p.hint_weights, shift, scale, *place)
    return x, Quantised(codes, steps, x.dtype)


def linear(x: Quantised, w: Tensor, w_steps: Tensor, bias: Tensor | None = None) -> Tensor:
    """x w^T + bias: rows (L, D) by weights (M, D) e4m3 with steps (M,) fp32 -> (L, M). D and M multiples of 16."""
    return _linear(x.codes, x.steps, w, w_steps, bias, x.dtype)


def linear_gelu(x: Quantised, w: Tensor, w_steps: Tensor, reach: Tensor) -> Quantised:
    """gelu(x w^T), exact erf form, quantised: (L, D), (M, D) -> (L, M). reach: no row of w has a larger norm.

    The result's steps are those of x times reach: then no code can exceed 448.
    """
    steps = x.steps * reach
    return Quantised(_linear_gelu(x.codes, x.steps, steps, w, w_steps), steps, x.dtype)
