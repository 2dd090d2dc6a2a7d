"""csrc/qk_codes.cu behind `qkv_codes`: which operands it takes, and what it must prove before it is chosen.

It makes the codes of rotated q and k; those of v are the Triton kernel's, and so is whatever it does not take. Its sums are in
another order than Triton's, which moves a code in 60,000 to the other side of a rounding: one rank's codes are those of several,
which are Triton's (`codes_packed`), up to that, and bit for bit with qkv_codes=triton.
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


@cache
def _proven_kernel() -> Callable[..., tuple[Tensor, Tensor]]:
    return proven(torch.ops.cosmos_fast.qk_codes_cuda)


def proven(kernel: Callable[..., Any], device: torch.device | str = "cuda") -> Callable[..., Any]:
    """The kernel, after it computed an example. Raises RuntimeError with the error measured if its codes are others."""
    operands = example()
    v = torch.ones_like(operands[5])
    whole = (*operands[:6], v, v, operands[6], True, False, operands[7])
    exact = reference.qkv_codes(*whole)[:2]
    got = kernel(*(x.to(device) if isinstance(x, Tensor) else x for x in operands))
    for name, mine, its in zip("qk", got, exact, strict=True):
        error = float((mine.cpu().float() - its.float()).norm() / its.float().norm())
        if not error <= ALLOWED:  # NaN too
            raise RuntimeError(
                f"qk_codes: relative error of {name} in a small example must be at most {ALLOWED}, got {error:.3g} with "
                f"torch {torch.__version__}. It returns noise here."
            )
    return kernel


def example() -> tuple[Any, ...]:
    """qkv, gains, cos, sin, k_mean, steps, eps of 37 tokens: several blocks, the last partly full."""
    g, L, (N, K) = torch.Generator().manual_seed(0), 37, (HEADS, WIDTH)
    angles = torch.randn(L, K // 2, generator=g) * 3
    qkv = torch.randn(L, 3 * N * K, generator=g).to(torch.bfloat16)
    gains = (1 + torch.randn(2, K, generator=g) / 4).to(torch.bfloat16)
    steps = torch.tensor([2.0**-5, 2.0**-4, 2.0**-9 / K**0.5])
    return qkv, *gains, angles.cos(), angles.sin(), torch.randn(N, K, generator=g), steps, 1e-6
