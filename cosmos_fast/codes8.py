"""csrc/qk_codes.cu behind `qkv_codes` and `codes_packed`: which operands it takes, what it must prove before it is chosen.

It makes the codes of rotated q and k; those of v are the Triton kernel's, and so is whatever it does not take. Its sums are in
another order than Triton's, which moves a code in 60,000 to the other side of a rounding. Both ops ask it on the same terms, so
the codes of several ranks are those of one bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import reference

WIDTH, HEADS = 128, 16
"""Features of a head that csrc/qk_codes.cu is built for, and of how many heads it takes multiples."""

ALLOWED = 0.01
"""Relative error of the example beside the reference. A code in 60,000 that falls to the other side costs 3e-4; noise, 1."""


def takes(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, k_mean: Tensor, rotate: bool
) -> bool:
    """Whether the kernel takes these operands of `qkv_codes`, which have passed its validator."""
    heads = rotate and q_gain.shape[0] == WIDTH and k_mean.shape[0] % HEADS == 0 < k_mean.shape[0]
    kinds = qkv.dtype == torch.bfloat16 and {q_gain.dtype, k_gain.dtype} <= {torch.bfloat16, torch.float32}
    rows = all(x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0 for x in (qkv, cos, sin))
    starts = all(x.data_ptr() % 16 == 0 for x in (qkv, cos, sin, k_mean))
    return heads and kinds and rows and starts


def load_own(twin: Callable[..., Any], values: Callable[..., Tensor]) -> Callable[..., Any]:
    """`qkv_codes` by our CUDA kernel, after it computed the example.

    twin: the op where the kernel does not take the operands; values: (qkv, v_mean, v_step, pack) -> codes of v.
    """
    kernel = _proven_kernel()

    def call(
        qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, k_mean: Tensor, v_mean: Tensor,
        v_step: Tensor, steps: Tensor, rotate: bool, pack: bool, eps: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        given = qkv, q_gain, k_gain, cos, sin, k_mean
        if not takes(*given, rotate):
            return tuple(twin(*given, v_mean, v_step, steps, rotate, pack, eps))
        q, k = kernel(qkv, q_gain.contiguous(), k_gain.contiguous(), cos, sin, k_mean, steps, eps)
        return q, k, values(qkv, v_mean, v_step, pack)

    return call


def load_own_packed(twin: Callable[..., Any], write_values: Callable[..., None]) -> Callable[..., Any]:
    """`codes_packed` by our CUDA kernel, after it computed the example.

    twin: as for `load_own`; write_values: (qkv, v_mean, v_step, packed, columns, parts) puts codes of v in their places.
    """
    kernel = _proven_packed_kernel()

    def call(
        qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, k_mean: Tensor, v_mean: Tensor,
        v_step: Tensor, steps: Tensor, rotate: bool, columns: int, parts: int, eps: float,
    ) -> Tensor:  # fmt: skip
        given = qkv, q_gain, k_gain, cos, sin, k_mean
        if not takes(*given, rotate):
            return twin(*given, v_mean, v_step, steps, rotate, columns, parts, eps)  # type: ignore[no-any-return]
        packed = qkv.new_empty(qkv.numel(), dtype=torch.float8_e4m3fn)
        gains = q_gain.contiguous(), k_gain.contiguous()
        kernel(qkv, *gains, cos, sin, k_mean, steps, columns, parts, eps, packed)
        write_values(qkv, v_mean, v_step, packed, columns, parts)
        return packed

    return call


@cache
def _proven_kernel() -> Callable[..., tuple[Tensor, Tensor]]:
    return proven(torch.ops.cosmos_fast.qk_codes_cuda)


@cache
def _proven_packed_kernel() -> Callable[..., None]:
    return proven_packed(torch.ops.cosmos_fast.qk_codes_packed_cuda)


def proven(kernel: Callable[..., Any], device: torch.device | str = "cuda") -> Callable[..., Any]:
    """The kernel, after it computed an example. Raises RuntimeError with the error measured if its codes are others."""
    *given, steps, eps = example()
    v = torch.ones_like(given[5])
    whole = *given, v, v, steps, True, False, eps
    exact = reference.qkv_codes(*whole)
    got = kernel(*(x.to(device) for x in (*given, steps)), eps)
    _check("q", got[0], exact[0])
    _check("k", got[1], exact[1])
    return kernel


def proven_packed(kernel: Callable[..., Any], device: torch.device | str = "cuda") -> Callable[..., Any]:
    """The same of the kernel that writes to where codes travel from: two columns of 8 heads, in parts of 2, 3 and 3."""
    *given, steps, eps = example()
    mean = torch.zeros_like(given[5])
    infinite = mean + torch.inf  # codes of v are then 0, as is what the kernel must not touch
    whole = *given, mean, infinite, steps, True, 2, 3, eps
    exact = reference.codes_packed(*whole)
    got = torch.zeros_like(exact, device=device)
    kernel(*(x.to(device) for x in (*given, steps)), 2, 3, eps, got)
    _check("what travels", got, exact)
    return kernel


def _check(name: str, mine: Tensor, its: Tensor) -> None:
    error = float((mine.cpu().float() - its.float()).norm() / its.float().norm())
    if not error <= ALLOWED:  # NaN too
        raise RuntimeError(
            f"qk_codes: relative error of {name} in a small example must be at most {ALLOWED}, got {error:.3g} with "
            f"torch {torch.__version__}. It returns noise here."
        )


def example() -> tuple[Any, ...]:
    """qkv, gains, cos, sin, k_mean, steps, eps of 37 tokens: several blocks, the last partly full."""
    g, L, (N, K) = torch.Generator().manual_seed(0), 37, (HEADS, WIDTH)
    angles = torch.randn(L, K // 2, generator=g) * 3
    qkv = torch.randn(L, 3 * N * K, generator=g).to(torch.bfloat16)
    gains = (1 + torch.randn(2, K, generator=g) / 4).to(torch.bfloat16)
    steps = torch.tensor([2.0**-5, 2.0**-4, 2.0**-9 / K**0.5])
    return qkv, *gains, angles.cos(), angles.sin(), torch.randn(N, K, generator=g), steps, 1e-6
