"""What every op accepts: one validator per op, run before any implementation and while tracing.

A rule holds for all implementations of an op; what one of them needs beyond it is that one's to say.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .packing import TILE_QUERIES


def _check(condition: bool, op: str, rule: str, got: object) -> None:
    torch._check(condition, lambda: f"{op}: {rule}, got {got}.")


def _check_rows(op: str, x: Tensor, rows: Sequence[Tensor], tokens_per_frame: int, token_offset: int) -> None:
    _check(x.dim() == 2, op, "x must be (L, D)", tuple(x.shape))
    _check(x.is_contiguous(), op, "x must be contiguous", x.stride())
    got = tokens_per_frame, token_offset
    _check(tokens_per_frame > 0 <= token_offset, op, "rows must be positive", got)
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


def check_adaln(x, shift, scale, tokens_per_frame, token_offset, eps, out) -> None:  # type: ignore[no-untyped-def]
    _check_rows("adaln", x, (shift, scale), tokens_per_frame, token_offset)


def check_residual_only(x, branch, gate, hints, weights, tokens_per_frame, token_offset) -> None:  # type: ignore[no-untyped-def]
    _check_rows("residual", x, (gate,), tokens_per_frame, token_offset)
    _check_residual("residual", x, branch, hints, weights)


def check_residual_adaln(  # type: ignore[no-untyped-def]
    x, branch, gate, hints, weights, shift, scale, tokens_per_frame, token_offset, eps, out
) -> None:
    _check_rows("residual_adaln", x, (gate, shift, scale), tokens_per_frame, token_offset)
    _check_residual("residual_adaln", x, branch, hints, weights)


def check_head_norm(x: Tensor, gain: Tensor, eps: float) -> None:
    _check(x.dim() == 2 and gain.dim() == 1 and x.shape[1] % gain.shape[0] == 0 and x.stride(1) == 1, "head_norm",
           f"x must be (L, N*K) with K = {gain.numel()}", tuple(x.shape))  # fmt: skip


def check_qk(qkv, q_gain, k_gain, cos, sin, eps, op="qk_norm_rope") -> None:  # type: ignore[no-untyped-def]
    K = q_gain.shape[0]
    _check(qkv.dim() == 2 and qkv.is_contiguous() and qkv.shape[1] % (3 * K) == 0 and K % 2 == 0, op,
           f"qkv must be contiguous (L, 3*N*K) with even K = {K}", tuple(qkv.shape))  # fmt: skip
    for table in (cos, sin):
        _check(table.shape == (qkv.shape[0], K // 2) and table.dtype == torch.float32, op,
               f"cos and sin must be ({qkv.shape[0]}, {K // 2}) float32", (tuple(table.shape), table.dtype))  # fmt: skip


def check_qkv_packed(qkv, q_gain, k_gain, cos, sin, columns, first, last, eps, op="qkv_packed") -> None:  # type: ignore[no-untyped-def]
    check_qk(qkv, q_gain, k_gain, cos, sin, eps, op)
    heads = qkv.shape[1] // (3 * q_gain.shape[0])
    _check(columns > 0 == heads % columns, op, f"columns must divide {heads} heads", columns)
    _check(0 <= first < last <= heads // columns, op, f"heads must be some of {heads // columns}", (first, last))  # fmt: skip


def check_gelu(x: Tensor) -> None:
    _check(x.is_contiguous(), "gelu", "x must be contiguous", x.stride())


def check_linear_gelu(x: Tensor, w: Tensor) -> None:
    fits = x.dim() == w.dim() == 2 and x.shape[1] == w.shape[1] and x.dtype == w.dtype
    _check(fits, "linear_gelu", "x must be (L, D) and w (M, D) of one dtype", [(tuple(t.shape), t.dtype) for t in (x, w)])  # fmt: skip
    _check(x.is_contiguous() and w.is_contiguous(), "linear_gelu", "x and w must be contiguous", (x.stride(), w.stride()))  # fmt: skip
    fits = w.shape[0] % 8 == 0 == w.shape[1] % 8
    _check(fits, "linear_gelu", "D and M must be multiples of 8", tuple(w.shape))


def check_linear_head_norm(x: Tensor, w: Tensor, gain: Tensor, eps: float) -> None:
    K = gain.numel()
    fits = x.dim() == w.dim() == 2 and x.shape[1] == w.shape[1] and x.dtype == w.dtype
    _check(fits, "linear_head_norm", "x must be (L, D) and w (N*K, D) of one dtype", [(tuple(t.shape), t.dtype) for t in (x, w)])  # fmt: skip
    _check(x.is_contiguous() and w.is_contiguous(), "linear_head_norm", "x and w must be contiguous", (x.stride(), w.stride()))  # fmt: skip
    _check(gain.dim() == 1 and K > 0 == w.shape[0] % K, "linear_head_norm",
           "gain must be (K,) and w (N*K, D)", (tuple(gain.shape), tuple(w.shape)))  # fmt: skip
    _check(w.shape[1] % 8 == 0, "linear_head_norm", "D must be a multiple of 8", w.shape[1])


def check_adaln_fp8(x, shift, scale, tokens_per_frame, token_offset, eps) -> None:  # type: ignore[no-untyped-def]
    _check_rows("adaln_fp8", x, (shift, scale), tokens_per_frame, token_offset)


def check_residual_adaln_fp8(  # type: ignore[no-untyped-def]
    x, branch, gate, hints, weights, shift, scale, tokens_per_frame, token_offset, eps
) -> None:
    _check_rows("residual_adaln_fp8", x, (gate, shift, scale), tokens_per_frame, token_offset)
    _check_residual("residual_adaln_fp8", x, branch, hints, weights)


def check_quantise(x: Tensor) -> None:
    fits = x.dim() == 2 and x.is_contiguous() and x.is_floating_point()
    _check(fits, "quantise", "x must be contiguous (L, D) of a floating-point dtype", (tuple(x.shape), x.stride(), x.dtype))  # fmt: skip


def _check_steps(op: str, steps: Tensor, rows: int) -> None:
    fits = steps.shape == (rows,) and steps.dtype == torch.float32 and steps.is_contiguous()
    _check(fits, op, f"steps must be contiguous ({rows},) float32", (tuple(steps.shape), steps.dtype))


def check_gelu_fp8(x: Tensor, steps: Tensor) -> None:
    _check(x.dim() == 2 and x.is_contiguous(), "gelu_fp8", "x must be contiguous (L, M)", (tuple(x.shape), x.stride()))  # fmt: skip
    _check_steps("gelu_fp8", steps, x.shape[0])


def _check_codes(op: str, a: Tensor, a_steps: Tensor, w: Tensor, w_steps: Tensor) -> None:
    fits = a.dim() == w.dim() == 2 and a.shape[1] == w.shape[1]
    kinds = a.dtype == w.dtype == torch.float8_e4m3fn and a.is_contiguous() and w.is_contiguous()
    got = [(tuple(t.shape), t.stride(), t.dtype) for t in (a, w)]
    _check(fits and kinds, op, "a must be (L, D) and w (M, D), contiguous float8_e4m3fn", got)
    _check(w.shape[0] % 16 == 0 == w.shape[1] % 16, op, "D and M must be multiples of 16", tuple(w.shape))
    _check_steps(op, a_steps, a.shape[0])
    _check_steps(op, w_steps, w.shape[0])


def check_linear_fp8(a, a_steps, w, w_steps, bias, out) -> None:  # type: ignore[no-untyped-def]
    _check_codes("linear_fp8", a, a_steps, w, w_steps)
    _check(bias is None or bias.shape == w.shape[:1], "linear_fp8", f"bias must be ({w.shape[0]},)", bias)
    _check(out.is_floating_point, "linear_fp8", "the output dtype must be a floating-point one", out)


def check_linear_gelu_fp8(a, a_steps, steps, w, w_steps) -> None:  # type: ignore[no-untyped-def]
    _check_codes("linear_gelu_fp8", a, a_steps, w, w_steps)
    _check_steps("linear_gelu_fp8", steps, a.shape[0])


def check_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    fits = q.dim() == 3 and k.shape == v.shape and q.shape[1:] == k.shape[1:]
    fits = fits and q.dtype == k.dtype == v.dtype
    rule = "q must be (L, N, K), k and v (S, N, K), of one dtype"
    _check(fits, "attention", rule, [tuple(t.shape) for t in (q, k, v)])
    _check(k.shape[0] > 0, "attention", "there must be at least one key", k.shape[0])


def check_qkv_moments(qkv, q_gain, k_gain, cos, sin, eps) -> None:  # type: ignore[no-untyped-def]
    check_qk(qkv, q_gain, k_gain, cos, sin, eps, "qkv_moments")


def check_qkv_sums(qkv, k_gain, cos, sin, eps) -> None:  # type: ignore[no-untyped-def]
    check_qk(qkv, k_gain, k_gain, cos, sin, eps, "qkv_sums")


def check_moments_of_sums(sums, ends, q_gain, k_gain, tokens) -> None:  # type: ignore[no-untyped-def]
    op, K, got = "moments_of_sums", q_gain.shape[0], [(tuple(x.shape), x.dtype, x.stride()) for x in (sums, ends)]  # fmt: skip
    fits = sums.dim() == 4 and sums.shape == ends.shape and (sums.shape[1], sums.shape[3]) == (2, K)
    kinds = sums.dtype == torch.float64 and ends.dtype == torch.float32
    dense = sums.is_contiguous() and ends.is_contiguous()
    rule = f"sums must be contiguous (parts, 2, N, {K}) float64 and ends the same float32"
    _check(fits and kinds and dense, op, rule, got)
    _check(tokens >= 0 < len(sums), op, "there must be a part, and 0 or more tokens", (len(sums), tokens))


def check_codes_packed(  # type: ignore[no-untyped-def]
    qkv, q_gain, k_gain, cos, sin, k_mean, v_mean, v_step, steps, rotate, columns, parts, eps
) -> None:
    op = "codes_packed"
    check_qkv_packed(qkv, q_gain, k_gain, cos, sin, columns, 0, 1, eps, op)
    _check(parts > 0, op, "parts must be 1 or more", parts)
    check_qkv_codes(qkv, q_gain, k_gain, cos, sin, k_mean, v_mean, v_step, steps, rotate, False, eps, op)


def check_qkv_codes(  # type: ignore[no-untyped-def]
    qkv, q_gain, k_gain, cos, sin, k_mean, v_mean, v_step, steps, rotate, pack, eps, op="qkv_codes"
) -> None:
    K = q_gain.shape[0]
    check_qk(qkv, q_gain, k_gain, cos, sin, eps, op)
    _check_channels(op, qkv.shape[1] // (3 * K), K, k_mean, v_mean, v_step)
    fits = steps.shape == (3,) and steps.dtype == torch.float32
    _check(fits, op, "steps must be (3,) float32", (tuple(steps.shape), steps.dtype))
    _check(not rotate or (K >= 32 and K & (K - 1) == 0), op, "a rotation needs K to be a power of two, 32 at least", K)  # fmt: skip


def _check_channels(op: str, N: int, K: int, *tables: Tensor) -> None:
    for x in tables:
        fits = x.shape == (N, K) and x.dtype == torch.float32 and x.is_contiguous()
        _check(fits, op, f"means and steps must be contiguous ({N}, {K}) float32", (tuple(x.shape), x.dtype))


_WIDE = "q", "k", "v", "v_step", "v_mean", "key_tiles", "key_counts"
STARTS = dict.fromkeys(_WIDE, 16) | dict.fromkeys(("score_step", "out_step"), 4)
"""Bytes on whose multiples the operands of 8-bit attention start in their storage: kernels read 16 at once, but one step."""


def _check_starts(op: str, **operands: Tensor) -> None:
    for name, x in operands.items():
        first = x.storage_offset() * x.element_size()
        rule = f"{name} must start on {STARTS[name]} bytes of its storage"
        _check(first % STARTS[name] == 0, op, rule, first)


def check_attention_fp8(q, k, v, score_step, v_step, v_mean, out, out_step=None, op="attention_fp8") -> None:  # type: ignore[no-untyped-def]
    packed = (*k.shape[1:], -(-k.shape[0] // 16) * 16)
    fits = q.dim() == k.dim() == 3 and q.shape[1:] == k.shape[1:] and v.shape in (k.shape, packed)
    kinds = {x.dtype for x in (q, k, v)} == {torch.float8_e4m3fn}
    got = [(tuple(x.shape), x.dtype) for x in (q, k, v)]
    rule = "q must be (L, N, K), k (S, N, K), v (S, N, K) or packed (N, K, S up to 16), all float8_e4m3fn"
    _check(fits and kinds, op, rule, got)
    _check(k.shape[0] > 0, op, "there must be at least one key", k.shape[0])
    _check(v.is_contiguous(), op, "v must be contiguous", v.stride())
    for x in (q, k):
        _check_rows_of_codes(op, "q and k", x)
    fits = score_step.shape == (1,) and score_step.dtype == torch.float32
    _check(fits, op, "score_step must be (1,) float32", (tuple(score_step.shape), score_step.dtype))
    _check_channels(op, q.shape[1], q.shape[2], v_step, v_mean)
    _check_starts(op, q=q, k=k, v=v, score_step=score_step, v_step=v_step, v_mean=v_mean)
    fits = out.is_floating_point and (out == torch.float8_e4m3fn) == (out_step is not None)
    rule = "the output dtype must be a floating-point one, e4m3 with an out_step and only then"
    _check(fits, op, rule, out)
    _check_out_step(op, out_step)


def _check_out_step(op: str, step: Tensor | None) -> None:
    if step is not None:
        fits = step.shape == (1,) and step.dtype == torch.float32
        _check(fits, op, "out_step must be (1,) float32", (tuple(step.shape), step.dtype))
        _check_starts(op, out_step=step)


def check_attended_steps(v_step: Tensor, v_mean: Tensor, rows: int) -> None:
    op, shape = "attended_steps", tuple(v_step.shape)
    _check(len(shape) == 2 and rows >= 0 < v_step.numel(), op, "v_step must be (N, K), rows 0 or more", (shape, rows))  # fmt: skip
    _check_channels(op, shape[0], shape[1], v_step, v_mean)


def check_attention_fp8_tiles(  # type: ignore[no-untyped-def]
    q, k, v, score_step, v_step, v_mean, out, key_tiles, key_counts, out_step=None
) -> None:
    op = "attention_fp8_tiles"
    check_attention_fp8(q, k, v, score_step, v_step, v_mean, out, out_step, op)
    table = (q.shape[1], -(-q.shape[0] // TILE_QUERIES))
    fits = key_tiles.dim() == 3 and key_tiles.shape[:2] == table and key_counts.shape == table
    kinds = {key_tiles.dtype, key_counts.dtype} == {torch.int32}
    dense = key_tiles.is_contiguous() and key_counts.is_contiguous()
    rule = f"key_tiles must be contiguous int32 {(*table, 'capacity')}, key_counts {table}"
    got = [(tuple(x.shape), x.dtype, x.stride()) for x in (key_tiles, key_counts)]
    _check(fits and kinds and dense, op, rule, got)
    _check_starts(op, key_tiles=key_tiles, key_counts=key_counts)


def check_tile_means(x: Tensor, rows: int) -> None:
    fits = x.dim() == 3 and x.is_contiguous() and x.dtype == torch.float8_e4m3fn
    _check(fits, "tile_means", "x must be contiguous (L, N, K) float8_e4m3fn", (tuple(x.shape), x.dtype))
    _check(rows > 0, "tile_means", "a tile must have a token", rows)


def _check_rows_of_codes(op: str, what: str, x: Tensor) -> None:
    """Heads of a token lie side by side; tokens may lie apart, as they do where q, k and v came in one message."""
    dense = x.numel() == 0 or (x.stride(2) == 1 and x.stride(1) == x.shape[2])
    _check(dense and (x.is_contiguous() or x.stride(0) % 16 == 0), op,
           f"{what} must have dense heads, and rows that are dense or on multiples of 16 bytes", x.stride())  # fmt: skip


def check_values_packed(v: Tensor) -> None:
    fits = v.dim() == 3 and v.dtype == torch.float8_e4m3fn
    _check(fits, "values_packed", "v must be (S, N, K) float8_e4m3fn", (tuple(v.shape), v.dtype))
    _check_rows_of_codes("values_packed", "v", v)


def check_values_restored(x: Tensor, v_step: Tensor, v_mean: Tensor, out_step: Tensor | None = None) -> None:
    fits = x.dim() == 3 and x.is_contiguous() and x.is_floating_point()
    _check(fits, "values_restored", "x must be contiguous (L, N, K)", (tuple(x.shape), x.stride()))
    _check_channels("values_restored", x.shape[1], x.shape[2], v_step, v_mean)
    _check_out_step("values_restored", out_step)


def check_patchify(z: Tensor, mask: Tensor) -> None:
    fits = z.dim() == 4 and z.shape[2] % 2 == 0 and z.shape[3] % 2 == 0 and mask.shape == z.shape[1:2]
    got = tuple(z.shape), tuple(mask.shape)
    _check(fits, "patchify", "z must be (C, T, even H, even W) and mask (T,)", got)


def check_unpatchify(y: Tensor, T: int, H: int, W: int) -> None:
    fits = (
        y.dim() == 2 and y.shape[0] == T * (H // 2) * (W // 2) and y.shape[1] % 4 == 0 and H % 2 == W % 2 == 0
    )
    _check(fits, "unpatchify", f"y must be ({T}*{H}/2*{W}/2, 4*C)", tuple(y.shape))


def check_guided_unipc(x, v_cond, v_uncond, m1, m2, last, guidance, coefficients) -> None:  # type: ignore[no-untyped-def]
    for state in (x, m1, m2, last):
        fits = state.shape == x.shape and state.dtype == torch.float32 and state.is_contiguous()
        _check(fits, "guided_unipc", f"x, m1, m2 and last must be contiguous {tuple(x.shape)} float32",
               (tuple(state.shape), state.dtype, state.stride()))  # fmt: skip
    for v in (v_cond, v_uncond):
        _check(v is None or (v.shape == x.shape and v.is_floating_point()), "guided_unipc",
               f"velocities must be {tuple(x.shape)} of a floating-point dtype", None if v is None else (tuple(v.shape), v.dtype))  # fmt: skip
    _check(len(coefficients) == 8, "guided_unipc", "there must be 8 coefficients", len(coefficients))


def check_pixels(x: Tensor) -> None:
    fits = x.dim() == 5 and x.shape[:2] == (1, 3) and x.is_floating_point()
    _check(fits, "pixels", "x must be (1, 3, F, H, W) of a floating-point dtype", (tuple(x.shape), x.dtype))


def check_normalized(frames: Tensor, out: torch.dtype) -> None:
    fits = frames.dtype == torch.uint8 and frames.is_contiguous()
    fits = fits and frames.dim() == 4 and frames.shape[3] == 3
    got = tuple(frames.shape), frames.dtype
    _check(fits, "normalized", "frames must be contiguous (F, H, W, 3) uint8", got)
    _check(out.is_floating_point, "normalized", "the output dtype must be a floating-point one", out)


def _check_conv(op: str, x: Tensor, weight: Tensor, bias: Tensor, taps: str) -> None:
    fits = x.dim() == 5 and weight.shape[1:2] == x.shape[1:2] and bias.shape == weight.shape[:1]
    alike = x.dtype == weight.dtype == bias.dtype
    _check(fits and alike, op, f"x must be (B, C, F, H, W), weight (O, C, {taps}), bias (O,), of one dtype",
           [(tuple(t.shape), t.dtype) for t in (x, weight, bias)])  # fmt: skip


def check_conv3d(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, time_stride: int
) -> None:  # fmt: skip
    _check_conv("conv3d", x, weight, bias, "t, r, s")
    _check(weight.dim() == 5 and all(a >= b for a, b in zip(x.shape[2:], weight.shape[2:])), "conv3d",
           "x must have as many frames, rows and columns as the weight has taps", (tuple(x.shape), tuple(weight.shape)))  # fmt: skip
    _check(time_stride >= 1, "conv3d", "time_stride must be at least 1", time_stride)
    F, H, W = (size - taps + 1 for size, taps in zip(x.shape[2:], weight.shape[2:]))
    shape = (x.shape[0], weight.shape[0], (F - 1) // time_stride + 1, H, W)
    _check(residual is None or (residual.shape == shape and residual.dtype == x.dtype), "conv3d",
           f"residual must be {shape} {x.dtype}", None if residual is None else (tuple(residual.shape), residual.dtype))  # fmt: skip


def check_conv_half(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    _check_conv("conv_half", x, weight, bias, "3, 3")
    _check(weight.shape[2:] == (3, 3), "conv_half", "weight must be (O, C, 3, 3)", tuple(weight.shape))
    # An odd row at the bottom takes the place of the row of zeros: a strip of a picture may have one.
    fits = x.shape[3] > 1 and x.shape[4] % 2 == 0
    _check(fits, "conv_half", "H must be at least 2 and W even", tuple(x.shape))


def check_conv_double(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    _check_conv("conv_double", x, weight, bias, "3, 3")
    _check(weight.shape[2:] == (3, 3), "conv_double", "weight must be (O, C, 3, 3)", tuple(weight.shape))


def check_norm_silu(x: Tensor, gamma: Tensor, past: Tensor | None, keep: Tensor | None) -> None:
    fits = x.dim() == 5 and x.is_floating_point() and gamma.numel() == x.shape[1]
    _check(fits, "norm_silu", "x must be (B, C, F, H, W) of a floating-point dtype and gamma have C values",
           (tuple(x.shape), x.dtype, tuple(gamma.shape)))  # fmt: skip
    shape = (*x.shape[:2], 2, *x.shape[3:])
    for frames in (past, keep):
        _check(frames is None or (frames.shape == shape and frames.dtype == x.dtype), "norm_silu",
               f"past and keep must be {shape} {x.dtype}", None if frames is None else (tuple(frames.shape), frames.dtype))  # fmt: skip


def check_norm_silu_fp8(
    x: Tensor, gamma: Tensor, step: float, past: Tensor | None, keep: Tensor | None
) -> None:
    check_norm_silu(x, gamma, None, None)
    _check(0 < step < float("inf"), "norm_silu_fp8", "step must be positive and finite", step)
    shape = (*x.shape[:2], 2, *x.shape[3:])
    for frames in (past, keep):
        _check(frames is None or (frames.shape == shape and frames.dtype == torch.float8_e4m3fn), "norm_silu_fp8",
               f"past and keep must be {shape} float8_e4m3fn", None if frames is None else (tuple(frames.shape), frames.dtype))  # fmt: skip


def check_conv3d_fp8(
    x: Tensor, weight: Tensor, steps: Tensor, bias: Tensor, residual: Tensor | None, out: torch.dtype
) -> None:
    fits = (
        x.dim() == weight.dim() == 5
        and weight.shape[1] == x.shape[1]
        and x.dtype == weight.dtype == torch.float8_e4m3fn
    )
    _check(fits, "conv3d_fp8", "x must be (B, C, F, H, W) and weight (O, C, t, r, s), of float8_e4m3fn",
           [(tuple(t.shape), t.dtype) for t in (x, weight)])  # fmt: skip
    sides = [size - taps + 1 for size, taps in zip(x.shape[2:], weight.shape[2:])]
    _check(min(sides) > 0, "conv3d_fp8", "x must have as many frames, rows and columns as the weight has taps",
           (tuple(x.shape), tuple(weight.shape)))  # fmt: skip
    O = weight.shape[:1]  # noqa: E741
    fits = steps.shape == bias.shape == O and steps.dtype == torch.float32 and bias.dtype == out
    _check(fits, "conv3d_fp8", f"steps must be {tuple(O)} float32 and bias {tuple(O)} {out}",
           [(tuple(t.shape), t.dtype) for t in (steps, bias)])  # fmt: skip
    shape = (x.shape[0], *O, *sides)
    _check(residual is None or (residual.shape == shape and residual.dtype == out), "conv3d_fp8",
           f"residual must be {shape} {out}", None if residual is None else (tuple(residual.shape), residual.dtype))  # fmt: skip
