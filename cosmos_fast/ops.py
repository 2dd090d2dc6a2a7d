"""Every op: what it is called, what it accepts, which implementations it has.

For each op: validator, one row of the table (schema, validator, fake, candidates) and a public function,
the only thing the rest of the package calls. Candidates are tried from the first; `reference` is always
last. A different tolerance is a different op.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import attention as backends
from . import convolution
from .dispatch import Candidate, define, native, triton
from .formats import Rows

EPS = 1e-6


# --- validators ------------------------------------------------------------------------------------


def _check(condition: bool, op: str, rule: str, got: object) -> None:
    torch._check(condition, lambda: f"{op}: {rule}, got {got}.")


def _check_rows(op: str, x: Tensor, rows: Sequence[Tensor], tokens_per_frame: int, token_offset: int) -> None:
    _check(x.dim() == 2, op, "x must be (L, D)", tuple(x.shape))
    _check(x.is_contiguous(), op, "x must be contiguous", x.stride())
    _check(
        tokens_per_frame > 0 <= token_offset, op, "rows must be positive", (tokens_per_frame, token_offset)
    )
    needed = (token_offset + max(x.shape[0], 1) - 1) // tokens_per_frame + 1
    for table in rows:
        _check(
            table.dim() == 2 and table.shape[1] == x.shape[1] and table.shape[0] >= needed and table.stride(1) == 1,
            op, f"shift, scale and gate must be (T >= {needed}, {x.shape[1]}) with unit stride", tuple(table.shape),
        )  # fmt: skip


def _check_residual(
    op: str, x: Tensor, branch: Tensor, hints: Sequence[Tensor], weights: Tensor | None
) -> None:
    for other in (branch, *hints):
        _check(other.shape == x.shape and other.dtype == x.dtype and other.is_contiguous(), op,
               f"branch and hints must be contiguous {tuple(x.shape)} {x.dtype}", (tuple(other.shape), other.dtype))  # fmt: skip
    shape = tuple(weights.shape) if weights is not None else (0, 1)
    _check(shape[0] == len(hints) and shape[1] in (1, x.shape[0]), op,
           f"hint_weights must be ({len(hints)}, 1 or {x.shape[0]})", shape)  # fmt: skip
    _check(weights is None or weights.dtype == torch.float32, op, "hint_weights must be float32", weights)


def _check_adaln(x, shift, scale, tokens_per_frame, token_offset, eps, out) -> None:  # type: ignore[no-untyped-def]
    _check_rows("adaln", x, (shift, scale), tokens_per_frame, token_offset)


def _check_residual_only(x, branch, gate, hints, weights, tokens_per_frame, token_offset) -> None:  # type: ignore[no-untyped-def]
    _check_rows("residual", x, (gate,), tokens_per_frame, token_offset)
    _check_residual("residual", x, branch, hints, weights)


def _check_residual_adaln(  # type: ignore[no-untyped-def]
    x, branch, gate, hints, weights, shift, scale, tokens_per_frame, token_offset, eps, out
) -> None:
    _check_rows("residual_adaln", x, (gate, shift, scale), tokens_per_frame, token_offset)
    _check_residual("residual_adaln", x, branch, hints, weights)


def _check_head_norm(x: Tensor, gain: Tensor, eps: float) -> None:
    _check(x.dim() == 2 and gain.dim() == 1 and x.shape[1] % gain.shape[0] == 0 and x.stride(1) == 1, "head_norm",
           f"x must be (L, N*K) with K = {gain.numel()}", tuple(x.shape))  # fmt: skip


def _check_qk(qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, eps: float) -> None:
    K = q_gain.shape[0]
    _check(qkv.dim() == 2 and qkv.is_contiguous() and qkv.shape[1] % (3 * K) == 0 and K % 2 == 0, "qk_norm_rope",
           f"qkv must be contiguous (L, 3*N*K) with even K = {K}", tuple(qkv.shape))  # fmt: skip
    for table in (cos, sin):
        _check(table.shape == (qkv.shape[0], K // 2) and table.dtype == torch.float32, "qk_norm_rope",
               f"cos and sin must be ({qkv.shape[0]}, {K // 2}) float32", (tuple(table.shape), table.dtype))  # fmt: skip


def _check_gelu(x: Tensor) -> None:
    _check(x.is_contiguous(), "gelu", "x must be contiguous", x.stride())


def _check_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    fits = (
        q.dim() == 3 and k.shape == v.shape and q.shape[1:] == k.shape[1:] and q.dtype == k.dtype == v.dtype
    )
    _check(
        fits,
        "attention",
        "q must be (L, N, K), k and v (S, N, K), of one dtype",
        [tuple(t.shape) for t in (q, k, v)],
    )
    _check(k.shape[0] > 0, "attention", "there must be at least one key", k.shape[0])


def _check_patchify(z: Tensor, mask: Tensor) -> None:
    fits = z.dim() == 4 and z.shape[2] % 2 == 0 and z.shape[3] % 2 == 0 and mask.shape == z.shape[1:2]
    _check(
        fits,
        "patchify",
        "z must be (C, T, even H, even W) and mask (T,)",
        (tuple(z.shape), tuple(mask.shape)),
    )


def _check_unpatchify(y: Tensor, T: int, H: int, W: int) -> None:
    fits = (
        y.dim() == 2 and y.shape[0] == T * (H // 2) * (W // 2) and y.shape[1] % 4 == 0 and H % 2 == W % 2 == 0
    )
    _check(fits, "unpatchify", f"y must be ({T}*{H}/2*{W}/2, 4*C)", tuple(y.shape))


def _check_guided_unipc(x, v_cond, v_uncond, m1, m2, last, guidance, coefficients) -> None:  # type: ignore[no-untyped-def]
    for state in (x, m1, m2, last):
        fits = state.shape == x.shape and state.dtype == torch.float32 and state.is_contiguous()
        _check(fits, "guided_unipc", f"x, m1, m2 and last must be contiguous {tuple(x.shape)} float32",
               (tuple(state.shape), state.dtype, state.stride()))  # fmt: skip
    for v in (v_cond, v_uncond):
        _check(v is None or (v.shape == x.shape and v.is_floating_point()), "guided_unipc",
               f"velocities must be {tuple(x.shape)} of a floating-point dtype", None if v is None else (tuple(v.shape), v.dtype))  # fmt: skip
    _check(len(coefficients) == 8, "guided_unipc", "there must be 8 coefficients", len(coefficients))


def _check_pixels(x: Tensor) -> None:
    fits = x.dim() == 5 and x.shape[:2] == (1, 3) and x.is_floating_point()
    _check(fits, "pixels", "x must be (1, 3, F, H, W) of a floating-point dtype", (tuple(x.shape), x.dtype))


def _check_normalized(frames: Tensor, out: torch.dtype) -> None:
    fits = (
        frames.dtype == torch.uint8 and frames.is_contiguous() and frames.dim() == 4 and frames.shape[3] == 3
    )
    _check(
        fits,
        "normalized",
        "frames must be contiguous (F, H, W, 3) uint8",
        (tuple(frames.shape), frames.dtype),
    )
    _check(out.is_floating_point, "normalized", "the output dtype must be a floating-point one", out)


def _check_conv3d(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    fits = x.dim() == 5 and weight.shape[1:] == (x.shape[1], 3, 3, 3) and bias.shape == weight.shape[:1]
    got = [tuple(t.shape) for t in (x, weight, bias)]
    _check(
        fits and x.shape[2] >= 3,
        "conv3d",
        "x must be (B, C, F+2, H, W), weight (O, C, 3, 3, 3), bias (O,)",
        got,
    )


# --- the table -------------------------------------------------------------------------------------

HALF = (torch.bfloat16, torch.float16)
HOPPER, AMPERE_UP = ((9, 0), (9, 0)), ((8, 0), (99, 0))


def _cuda(name: str) -> Candidate:
    """The CUDA C++ implementation of an op."""
    return native("cuda", f"{name}_cuda", "cuda", capability=HOPPER, dtypes=(torch.float32, *HALF[:1]))


def _compiled(name: str) -> Iterator[Candidate]:
    """The CUDA and the C++ implementation of an op of the adaln stem."""
    yield _cuda(name)
    yield native("cpp", f"{name}_cpu", "cpu", dtypes=(torch.float32, *HALF[:1]))


_adaln = define(
    "adaln(Tensor x, Tensor shift, Tensor scale, int tokens_per_frame, int token_offset, float eps, ScalarType out) -> Tensor",
    _check_adaln,
    lambda x, shift, scale, tpf, offset, eps, out: torch.empty_like(x, dtype=out),
    triton("adaln", "adaln"),
    *_compiled("adaln"),
)
_residual = define(
    "residual(Tensor x, Tensor branch, Tensor gate, Tensor[] hints, Tensor? hint_weights, int tokens_per_frame, int token_offset) -> Tensor",
    _check_residual_only,
    lambda x, *rest: torch.empty_like(x),
    triton("adaln", "residual"),
)
_residual_adaln = define(
    "residual_adaln(Tensor x, Tensor branch, Tensor gate, Tensor[] hints, Tensor? hint_weights, Tensor shift, Tensor scale, "
    "int tokens_per_frame, int token_offset, float eps, ScalarType out) -> (Tensor, Tensor)",
    _check_residual_adaln,
    lambda x, *rest: (torch.empty_like(x), torch.empty_like(x, dtype=rest[-1])),
    # CUDA first here: as fast as Triton without hints, faster with them (docs/log.md).
    *_compiled("residual_adaln"),
    triton("adaln", "residual_adaln"),
)
_head_norm = define(
    "head_norm(Tensor x, Tensor gain, float eps) -> Tensor",
    _check_head_norm,
    lambda x, gain, eps: x.new_empty(x.shape[0], x.shape[1] // gain.shape[0], gain.shape[0]),
    triton("norm_rope", "head_norm"),
    _cuda("head_norm"),
)
_qk_norm_rope = define(
    "qk_norm_rope(Tensor qkv, Tensor q_gain, Tensor k_gain, Tensor cos, Tensor sin, float eps) -> (Tensor, Tensor)",
    _check_qk,
    lambda qkv, q_gain, *rest: tuple(
        qkv.new_empty(qkv.shape[0], qkv.shape[1] // (3 * q_gain.shape[0]), q_gain.shape[0]) for _ in "qk"
    ),
    triton("norm_rope", "qk_norm_rope"),
    _cuda("qk_norm_rope"),
)
_gelu = define("gelu(Tensor x) -> Tensor", _check_gelu, torch.empty_like, triton("gelu", "gelu"))
_attention = define(
    "attention(Tensor q, Tensor k, Tensor v) -> Tensor",
    _check_attention,
    lambda q, k, v: q.new_empty(q.shape),
    Candidate("fa3", backends.load_fa3, "cuda", HOPPER, HALF, ("flash_attn_interface", "fa3_fwd_interface")),
    Candidate("fa2", backends.load_fa2, "cuda", AMPERE_UP, HALF, ("flash_attn",)),
    Candidate("cudnn", lambda: backends.cudnn, "cuda", AMPERE_UP, HALF),
    Candidate("sdpa", lambda: backends.sdpa),
)
_patchify = define(
    "patchify(Tensor z, Tensor mask) -> Tensor",
    _check_patchify,
    lambda z, mask: z.new_empty(z.shape[1] * (z.shape[2] // 2) * (z.shape[3] // 2), 4 * (z.shape[0] + 2)),
    triton("patches", "patchify"),
)
_unpatchify = define(
    "unpatchify(Tensor y, int T, int H, int W) -> Tensor",
    _check_unpatchify,
    lambda y, T, H, W: y.new_empty(y.shape[1] // 4, T, H, W),
    triton("patches", "unpatchify"),
)
_conv3d = define(
    "conv3d(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    _check_conv3d,
    lambda x, weight, bias: torch.empty_like(x[:, :1, 2:].expand(-1, weight.shape[0], -1, -1, -1)),
    # torch leaves short windows to a direct loop on the CPU, however slow; oneDNN takes any size.
    Candidate("onednn", lambda: convolution.onednn, "cpu", dtypes=(torch.float32, torch.bfloat16)),
)
_guided_unipc = define(
    "guided_unipc(Tensor x, Tensor v_cond, Tensor? v_uncond, Tensor m1, Tensor m2, Tensor last, float guidance, "
    "float[] coefficients) -> (Tensor, Tensor, Tensor)",
    _check_guided_unipc,
    lambda x, *rest: tuple(torch.empty_like(x) for _ in range(3)),
    triton("solver", "guided_unipc"),
)
_pixels = define(
    "pixels(Tensor x) -> Tensor",
    _check_pixels,
    lambda x: x.new_empty(*x.shape[2:], 3, dtype=torch.uint8),
    triton("pixels", "pixels"),
)
_normalized = define(
    "normalized(Tensor frames, ScalarType out) -> Tensor",
    _check_normalized,
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


def residual(x: Tensor, pending: Pending, rows: Rows) -> Tensor:
    """x + gate[frame] * branch + sum_j weight_j * hint_j, summed in fp32, one rounding. Shapes: (L, D)."""
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


def conv3d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """3x3x3 convolution, zero padding in space and none in time: (B, C, F+2, H, W) -> (B, O, F, H, W)."""
    return _conv3d(x, weight, bias)
