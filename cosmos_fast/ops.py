"""Every op: what it is called, what it accepts, which implementations it has.

For each op: one row of the table (schema, validator from `operands`, fake, candidates) and a public function,
the only thing the rest of the package calls. Candidates are tried from the first; `reference` is always
last. A different tolerance is a different op.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import attention as backends
from . import operands
from .dispatch import Candidate, define, native, triton
from .formats import Rows

EPS = 1e-6


# --- the table -------------------------------------------------------------------------------------

HALF = (torch.bfloat16, torch.float16)
HOPPER, AMPERE_UP = ((9, 0), (9, 0)), ((8, 0), (99, 0))
FA3 = ("flash_attn_interface", "fa3_fwd_interface")


def _cuda(name: str) -> Candidate:
    """The CUDA C++ implementation of an op."""
    return native("cuda", f"{name}_cuda", "cuda", capability=HOPPER, dtypes=(torch.float32, *HALF[:1]))


def _compiled(name: str) -> Iterator[Candidate]:
    """The CUDA and the C++ implementation of an op of the adaln stem."""
    yield _cuda(name)
    yield native("cpp", f"{name}_cpu", "cpu", dtypes=(torch.float32, *HALF[:1]))


_adaln = define(
    "adaln(Tensor x, Tensor shift, Tensor scale, int tokens_per_frame, int token_offset, float eps, ScalarType out) -> Tensor",
    operands.check_adaln,
    lambda x, shift, scale, tpf, offset, eps, out: torch.empty_like(x, dtype=out),
    triton("adaln", "adaln"),
    *_compiled("adaln"),
)
_residual = define(
    "residual(Tensor x, Tensor branch, Tensor gate, Tensor[] hints, Tensor? hint_weights, int tokens_per_frame, int token_offset) -> Tensor",
    operands.check_residual_only,
    lambda x, *rest: torch.empty_like(x),
    triton("adaln", "residual"),
)
_residual_adaln = define(
    "residual_adaln(Tensor x, Tensor branch, Tensor gate, Tensor[] hints, Tensor? hint_weights, Tensor shift, Tensor scale, "
    "int tokens_per_frame, int token_offset, float eps, ScalarType out) -> (Tensor, Tensor)",
    operands.check_residual_adaln,
    lambda x, *rest: (torch.empty_like(x), torch.empty_like(x, dtype=rest[-1])),
    # CUDA first here: as fast as Triton without hints, faster with them (docs/log.md).
    *_compiled("residual_adaln"),
    triton("adaln", "residual_adaln"),
)
_head_norm = define(
    "head_norm(Tensor x, Tensor gain, float eps) -> Tensor",
    operands.check_head_norm,
    lambda x, gain, eps: x.new_empty(x.shape[0], x.shape[1] // gain.shape[0], gain.shape[0]),
    triton("norm_rope", "head_norm"),
    _cuda("head_norm"),
)
_qk_norm_rope = define(
    "qk_norm_rope(Tensor qkv, Tensor q_gain, Tensor k_gain, Tensor cos, Tensor sin, float eps) -> (Tensor, Tensor)",
    operands.check_qk,
    lambda qkv, q_gain, *rest: tuple(
        qkv.new_empty(qkv.shape[0], qkv.shape[1] // (3 * q_gain.shape[0]), q_gain.shape[0]) for _ in "qk"
    ),
    triton("norm_rope", "qk_norm_rope"),
    _cuda("qk_norm_rope"),
)
_gelu = define("gelu(Tensor x) -> Tensor", operands.check_gelu, torch.empty_like, triton("gelu", "gelu"))


def _linear_then_gelu(x: Tensor, w: Tensor) -> Tensor:
    """The vendor's GEMM, rounded, then the op above: what the published network computes."""
    return _gelu(F.linear(x, w))


_linear_gelu = define(
    "linear_gelu(Tensor x, Tensor w) -> Tensor",
    operands.check_linear_gelu,
    lambda x, w: x.new_empty(x.shape[0], w.shape[0]),
    triton("linear_gelu", "linear_gelu", HALF, HOPPER),
    Candidate("composed", lambda: _linear_then_gelu),
)


def _linear_then_norm(x: Tensor, w: Tensor, gain: Tensor, eps: float) -> Tensor:
    """The vendor's GEMM, rounded, then the op above."""
    return _head_norm(F.linear(x, w), gain, eps)


_linear_head_norm = define(
    "linear_head_norm(Tensor x, Tensor w, Tensor gain, float eps) -> Tensor",
    operands.check_linear_head_norm,
    lambda x, w, gain, eps: x.new_empty(x.shape[0], w.shape[0] // gain.shape[0], gain.shape[0]),
    triton("linear_heads", "linear_head_norm", HALF, HOPPER),
    Candidate("composed", lambda: _linear_then_norm),
)
_attention = define(
    "attention(Tensor q, Tensor k, Tensor v) -> Tensor",
    operands.check_attention,
    lambda q, k, v: q.new_empty(q.shape),
    Candidate("fa3", backends.load_fa3, "cuda", HOPPER, HALF, FA3),
    Candidate("fa2", backends.load_fa2, "cuda", AMPERE_UP, HALF, ("flash_attn",)),
    Candidate("cudnn", lambda: backends.cudnn, "cuda", AMPERE_UP, HALF),
    Candidate("sdpa", lambda: backends.sdpa),
)
_patchify = define(
    "patchify(Tensor z, Tensor mask) -> Tensor",
    operands.check_patchify,
    lambda z, mask: z.new_empty(z.shape[1] * (z.shape[2] // 2) * (z.shape[3] // 2), 4 * (z.shape[0] + 2)),
    triton("patches", "patchify"),
)
_unpatchify = define(
    "unpatchify(Tensor y, int T, int H, int W) -> Tensor",
    operands.check_unpatchify,
    lambda y, T, H, W: y.new_empty(y.shape[1] // 4, T, H, W),
    triton("patches", "unpatchify"),
)
_guided_unipc = define(
    "guided_unipc(Tensor x, Tensor v_cond, Tensor? v_uncond, Tensor m1, Tensor m2, Tensor last, float guidance, "
    "float[] coefficients) -> (Tensor, Tensor, Tensor)",
    operands.check_guided_unipc,
    lambda x, *rest: tuple(torch.empty_like(x) for _ in range(3)),
    triton("solver", "guided_unipc"),
)
_pixels = define(
    "pixels(Tensor x) -> Tensor",
    operands.check_pixels,
    lambda x: x.new_empty(*x.shape[2:], 3, dtype=torch.uint8),
    triton("pixels", "pixels"),
)
_normalized = define(
    "normalized(Tensor frames, ScalarType out) -> Tensor",
    operands.check_normalized,
    lambda frames, out: torch.empty_like(frames, dtype=out),
    triton("pixels", "normalized", (torch.uint8,)),
)


# --- public functions ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pending:
    """What a block owes its residual stream: gate * branch, plus control hints times their weights.

    Shapes: branch, each hint (L, D); gate (T, D); hint_weights (J, 1 or L) fp32 for J hints.
    """

    branch: Tensor
    gate: Tensor
    hints: tuple[Tensor, ...] = ()
    hint_weights: Tensor | None = None


def adaln(x: Tensor, shift: Tensor, scale: Tensor, rows: Rows, *, out: torch.dtype | None = None) -> Tensor:
    """y = ln(x) * (1 + scale[frame]) + shift[frame]; ln has no affine and eps 1e-6.

    Shapes: x (L, D); shift, scale (T, D); returns (L, D) in `out` (default x's dtype). Statistics and
    modulation in fp32; frame = (rows.token_offset + token) // rows.tokens_per_frame.
    """
    return _adaln(x, shift, scale, rows.tokens_per_frame, rows.token_offset, EPS, out or x.dtype)


def residual(x: Tensor, pending: Pending | None, rows: Rows) -> Tensor:
    """x + gate[frame] * branch + sum_j weight_j * hint_j, summed in fp32, one rounding. Shapes: (L, D).

    With nothing pending the result is x itself.
    """
    if pending is None:
        return x
    p = pending
    return _residual(x, p.branch, p.gate, p.hints, p.hint_weights, rows.tokens_per_frame, rows.token_offset)


def residual_adaln(
    x: Tensor,
    pending: Pending | None,
    shift: Tensor,
    scale: Tensor,
    rows: Rows,
    *,
    out: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Settle what is pending, then normalise and modulate: returns (x', adaln(x')). Shapes: (L, D) each.

    With nothing pending x' is x itself.
    """
    if pending is None:
        return x, adaln(x, shift, scale, rows, out=out)
    p = pending
    return _residual_adaln(
        x, p.branch, p.gate, p.hints, p.hint_weights, shift, scale, rows.tokens_per_frame, rows.token_offset, EPS,
        out or x.dtype,
    )  # fmt: skip


def head_norm(x: Tensor, gain: Tensor) -> Tensor:
    """RMS norm over each head's K features, times gain (K,): (L, N*K) -> (L, N, K). eps 1e-6."""
    return _head_norm(x, gain, EPS)


def qk_norm_rope(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Split the packed projection; norm q and k per head and rotate them by the token's 3-D angles.

    Shapes: qkv (L, 3*N*K); gains (K,); cos, sin (L, K/2) fp32; returns q, k, v, each (L, N, K); v is a
    view of qkv.
    """
    q, k = _qk_norm_rope(qkv, q_gain, k_gain, cos, sin, EPS)
    return q, k, qkv.unflatten(1, (3, *q.shape[1:]))[:, 2]


def gelu(x: Tensor) -> Tensor:
    """x * Phi(x), exact erf form. Any shape."""
    return _gelu(x)


def linear_gelu(x: Tensor, w: Tensor) -> Tensor:
    """gelu(x @ w^T), exact erf form: x (L, D), w (M, D) -> (L, M). D and M multiples of 8; products in fp32."""
    return _linear_gelu(x, w)


def linear_head_norm(x: Tensor, w: Tensor, gain: Tensor) -> Tensor:
    """RMS norm over each head's K features of x @ w^T, times gain (K,): x (L, D), w (N*K, D) -> (L, N, K). eps 1e-6.

    D a multiple of 8; products in fp32.
    """
    return _linear_head_norm(x, w, gain, EPS)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v per head, no mask. Shapes: (L, N, K), (S, N, K), (S, N, K) -> (L, N, K)."""
    return _attention(q, k, v)


def patchify(z: Tensor, mask: Tensor) -> Tensor:
    """Latent z (C, T, H, W) and frame mask (T,) -> patch vectors (L, 4*(C+2)), L = T*H/2*W/2."""
    return _patchify(z, mask)


def unpatchify(y: Tensor, T: int, H: int, W: int) -> Tensor:
    """Head output (L, 4*C) -> latent (C, T, H, W). Not the inverse of `patchify`: feature orders differ."""
    return _unpatchify(y, T, H, W)


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
    """One solver step from both velocities: (x_next, m, corrected), all new tensors.

    v = v_cond + guidance * (v_cond - v_uncond), then the three lines of `StepCoefficients`.
    m1, m2 are the m of the previous step and of the one before, `last` the previous `corrected`.

    Shapes: all alike; x, m1, m2, last fp32 and contiguous, velocities fp32 or bf16; arithmetic in fp32.
    A tensor whose coefficient is 0 does not reach the result, not even as NaN.
    """
    return _guided_unipc(x, v_cond, v_uncond, m1, m2, last, guidance, coefficients)


def pixels(x: Tensor) -> Tensor:
    """Model range (1, 3, F, H, W) -> codes (F, H, W, 3) uint8: 127.5 * x + 127.5, clamped, truncated.

    A value that is not finite gives an arbitrary code; look for those in x.
    """
    return _pixels(x)


def normalized(frames: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Codes (F, H, W, 3) uint8 -> model range (1, 3, F, H, W): code / 127.5 - 1, both steps rounded in `dtype`.

    Channels last in memory, as the frames are; in bf16 not the same as rounding once.
    """
    return _normalized(frames, dtype).permute(3, 0, 1, 2)[None]
