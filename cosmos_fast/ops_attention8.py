"""Ops of 8-bit self-attention: e4m3 codes of q, k and v made from the packed projection, and attention over them.

q and k come with one step each, known before their values are: normed heads have a length that their gains bound, and
e4m3, being floating point, loses no digit by a step that is too large. v has a step for each channel. Means over the
tokens leave k and v first, which no result sees (a softmax ignores what all keys share; its weights sum to 1) but the
error of rounding does; v's to the spacing of bf16 only, see `reference.centred`. Rows of `dispatch.TABLE` as in `ops`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import attention8, codes8, operands, reference
from .dispatch import TABLE, Candidate, define, triton
from .ops import EPS, FA3, HOPPER
from .ops_linear8 import Quantised

E4M3 = (torch.float8_e4m3fn,)
ADA_UP, HOPPER_UP = ((8, 9), (99, 0)), ((9, 0), (99, 0))


def _fp32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _fake_codes(qkv: Tensor, N: int, K: int, pack: bool) -> tuple[Tensor, ...]:
    rows, packed = (qkv.shape[0], N, K), (N, K, -(-qkv.shape[0] // 16) * 16)
    return tuple(qkv.new_empty(shape, dtype=E4M3[0]) for shape in (rows, rows, packed if pack else rows))


_qkv_moments = define(
    "qkv_moments(Tensor qkv, Tensor q_gain, Tensor k_gain, Tensor cos, Tensor sin, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    operands.check_qkv_moments,
    lambda qkv, q_gain, *rest: (
        *(_fp32(qkv, qkv.shape[1] // (3 * q_gain.shape[0]), q_gain.shape[0]) for _ in range(3)),
        _fp32(qkv, 3),
    ),
    triton("qkv_codes", "qkv_moments"),
)
_moments_of_sums = define(
    "moments_of_sums(Tensor sums, Tensor ends, Tensor q_gain, Tensor k_gain, int tokens) -> (Tensor, Tensor, Tensor, Tensor)",
    operands.check_moments_of_sums,
    lambda sums, *rest: (*(_fp32(sums, *sums.shape[2:]) for _ in range(3)), _fp32(sums, 3)),
    triton("qkv_codes", "moments_of_sums", (torch.float64,)),
)
_qkv_sums = define(
    "qkv_sums(Tensor qkv, Tensor k_gain, Tensor cos, Tensor sin, float eps) -> (Tensor, Tensor)",
    operands.check_qkv_sums,
    lambda qkv, k_gain, *rest: (
        qkv.new_empty((2, qkv.shape[1] // (3 * k_gain.shape[0]), k_gain.shape[0]), dtype=torch.float64),
        _fp32(qkv, 2, qkv.shape[1] // (3 * k_gain.shape[0]), k_gain.shape[0]),
    ),
    triton("qkv_codes", "qkv_sums"),
)
_CODES_TWIN = triton("qkv_codes", "qkv_codes", capability=ADA_UP)


def own_codes(native: str, load: Callable[..., Any], twin: Candidate, values: str) -> Candidate:
    """A CUDA kernel for operands that it takes, its Triton twin for others and, as `values` of its module, for v."""
    of_v = triton("qkv_codes", values)

    def loaded() -> Callable[..., Any]:
        return load(twin.load(), of_v.load())  # type: ignore[no-any-return]

    return Candidate("cuda", loaded, "cuda", HOPPER, (torch.bfloat16,), ("triton",), native)


_qkv_codes = define(
    "qkv_codes(Tensor qkv, Tensor q_gain, Tensor k_gain, Tensor cos, Tensor sin, Tensor k_mean, Tensor v_mean, Tensor v_step, "
    "Tensor steps, bool rotate, bool pack, float eps) -> (Tensor, Tensor, Tensor)",
    operands.check_qkv_codes,
    lambda qkv, q_gain, k_gain, cos, sin, k_mean, v_mean, v_step, steps, rotate, pack, eps: _fake_codes(
        qkv, k_mean.shape[0], k_mean.shape[1], pack
    ),
    own_codes("qk_codes_cuda", codes8.load_own, _CODES_TWIN, "value_codes"),
    _CODES_TWIN,
)
_values_packed = define(
    "values_packed(Tensor v) -> Tensor",
    operands.check_values_packed,
    lambda v: v.new_empty((*v.shape[1:], -(-v.shape[0] // 16) * 16)),
    triton("attention8", "values_packed", E4M3, ADA_UP),
)
_values_restored = define(
    "values_restored(Tensor x, Tensor v_step, Tensor v_mean, Tensor? out_step=None) -> Tensor",
    operands.check_values_restored,
    lambda x, v_step, v_mean, out_step=None: torch.empty_like(
        x, dtype=x.dtype if out_step is None else E4M3[0]
    ),
    triton("qkv_codes", "values_restored"),
)
_attended_steps = define(
    "attended_steps(Tensor v_step, Tensor v_mean, int rows) -> Tensor",
    operands.check_attended_steps,
    lambda v_step, v_mean, rows: _fp32(v_step, rows),
    triton("attended_steps", "attended_steps", (torch.float32,)),
)


def _over_codes(load: Callable[[], attention8.Attend8]) -> Callable[[], Callable[..., Tensor]]:
    """A library's attention over plain codes, then the op above."""

    def loaded() -> Callable[..., Tensor]:
        attend = load()

        def call(
            q: Tensor, k: Tensor, v: Tensor, score_step: Tensor, v_step: Tensor, v_mean: Tensor, out: torch.dtype,
            out_step: Tensor | None = None,
        ) -> Tensor:  # fmt: skip
            rows = v if v.shape == k.shape else reference.unpacked(v, k.shape[0])
            wide = out if out_step is None else torch.bfloat16
            # A library may keep a plan per shape, made for rows that do not lie apart.
            attended = attend(q.contiguous(), k.contiguous(), rows, score_step, wide)
            return _values_restored(attended, v_step, v_mean, out_step)

        return call

    return loaded


_TWIN = triton("attention8", "attention_fp8", E4M3, ADA_UP)


def own_or_twin(load: Callable[[], Callable[..., Any]], twin: Candidate) -> Candidate:
    """The CUDA kernel for heads of the width it is built for, its Triton twin for others."""

    def loaded() -> Callable[..., Any]:
        whole, any_width = load(), twin.load()

        def call(q: Tensor, *rest: Any) -> Any:
            return (whole if q.shape[2] == attention8.OWN_WIDTH else any_width)(q, *rest)

        return call

    return Candidate("own", loaded, "cuda", HOPPER, E4M3, ("triton",), "attention8_cuda")


_attention_fp8 = define(
    "attention_fp8(Tensor q, Tensor k, Tensor v, Tensor score_step, Tensor v_step, Tensor v_mean, ScalarType out, "
    "Tensor? out_step=None) -> Tensor",
    operands.check_attention_fp8,
    lambda q, k, v, score_step, v_step, v_mean, out, out_step=None: q.new_empty(q.shape, dtype=out),
    # Ours first: 1022 TFLOP/s at the published size beside FlashAttention-3's 963 (docs/kernels/attention8.md).
    own_or_twin(attention8.load_own, _TWIN),
    Candidate("fa3", _over_codes(attention8.load_fa3), "cuda", HOPPER, E4M3, FA3),
    Candidate("cudnn", _over_codes(attention8.load_cudnn), "cuda", HOPPER_UP, E4M3, ("cudnn",)),
    _TWIN,
    Candidate("emulated", _over_codes(lambda: attention8.emulated), dtypes=E4M3),
)


def wants_packed(device: torch.device) -> bool:
    """Whether attention on this device reads v packed, so that its codes had better be made so."""
    op = TABLE["attention_fp8"]
    op.resolve(device, E4M3[0])
    return op.chosen[device.type, E4M3[0]][0] in ("own", "triton")


# --- public functions ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Codes:
    """Operands of `attention_fp8`: e4m3 codes and their steps; a value is step * code, plus the mean for v.

    Shapes: q, k, v (L, N, K), k and v less their means, or v packed (N, K, L up to 16); rows of q and k may lie apart, on
    multiples of 16 bytes; score_step (1,), v_step and v_mean (N, K), fp32.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    score_step: Tensor
    v_step: Tensor
    v_mean: Tensor


Moments = tuple[Tensor, Tensor, Tensor, Tensor]


def qkv_moments(qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor) -> Moments:
    """What the codes of a packed projection share: k_mean, v_mean, v_step (N, K), steps (3,) of q, k and a score, fp32.

    Shapes as in `qk_norm_rope`. Means are over the tokens given; k's is that of normed, rotated keys, v's is `centred`.
    """
    return _qkv_moments(qkv, q_gain, k_gain, cos, sin, EPS)


def pooled_moments(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, tokens: int,
    gather: Callable[[Tensor], list[Tensor]],
) -> Moments:  # fmt: skip
    """`qkv_moments` of all `tokens` of several ranks, of which these are one's; gather: a tensor of every rank.

    The bits of one rank's: sums are in fp64, where those of 16-bit values are exact (53 digits hold 2^17 values of 8 that
    lie within 28 powers of two; what a smaller one loses is far behind the last digit of fp32). 48 bytes a channel travel.
    """
    sums, ends = _qkv_sums(qkv, k_gain, cos, sin, EPS)
    mine = [x.flatten().view(torch.uint8) for x in (sums, ends)]
    all_sums, all_ends = torch.stack(gather(torch.cat(mine))).split([len(x) for x in mine], 1)
    return _moments_of_sums(
        all_sums.contiguous().view(sums.dtype).view(-1, *sums.shape),
        all_ends.contiguous().view(ends.dtype).view(-1, *ends.shape), q_gain, k_gain, tokens,
    )  # fmt: skip


def qkv_codes(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, *, rotate: bool = True, pack: bool = False,
    moments: Moments | None = None,
) -> Codes:  # fmt: skip
    """Norm and rotate q and k of the packed projection and quantise all three, each less what attention does not see.

    Shapes as in `qk_norm_rope`. rotate: q and k also times a Hadamard matrix, which spreads an outlier over its head and
    changes no score; K must be a power of two. pack: the tokens of a channel of v lie in a row, ordered for tensor
    cores. moments: what `qkv_moments` says of all tokens, where these are not all.
    """
    k_mean, v_mean, v_step, steps = moments or qkv_moments(qkv, q_gain, k_gain, cos, sin)
    q, k, v = _qkv_codes(qkv, q_gain, k_gain, cos, sin, k_mean, v_mean, v_step, steps, rotate, pack, EPS)
    return Codes(q, k, v, steps[2:], v_step, v_mean)


def values_packed(v: Tensor) -> Tensor:
    """Codes of v (S, N, K), whose rows may lie apart, as `qkv_codes` packs them: (N, K, S up to 16)."""
    return _values_packed(v)


def attention_fp8(codes: Codes, out: torch.dtype = torch.bfloat16, out_step: Tensor | None = None) -> Tensor:
    """softmax(q k^T * score_step) (v * v_step + v_mean), the weights rounded to e4m3 too: (L, N, K) in `out`.

    out_step (1,): the result as codes of that step, `out` e4m3.
    """
    c = codes
    return _attention_fp8(c.q, c.k, c.v, c.score_step, c.v_step, c.v_mean, out, out_step)


def attended_steps(v_step: Tensor, v_mean: Tensor, rows: int) -> Tensor:
    """The step of what attention over such codes of v may come to, for every row: (rows,).

    As large as v gets in any channel, which no weighted mean of it exceeds, is 448 steps.
    """
    return _attended_steps(v_step, v_mean, rows)


def attention_rows(codes: Codes, dtype: torch.dtype) -> Quantised:
    """`attention_fp8` as rows of codes (L, N*K), written by the kernel that attends; dtype: of the layer."""
    L = codes.q.shape[0]
    steps = attended_steps(codes.v_step, codes.v_mean, max(L, 1))
    return Quantised(attention_fp8(codes, E4M3[0], steps[:1]).flatten(1), steps[:L], dtype)
