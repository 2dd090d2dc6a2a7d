"""Guidance and one UniPC step in one pass: `guided_unipc`.

    v = v_cond + guidance * (v_cond - v_uncond);   m = x - sigma * v
    corrected = c_last * last + c_m * m + c_m1 * m1 + c_m2 * m2
    x_next = p_x * corrected + p_m * m + p_m1 * m1

Shapes: all alike; x, m1, m2, last and the three results fp32, velocities any float. A tensor whose coefficient is
0 is not read. Rounded step by step as the reference is (no fused multiply-add), so the bits are the same.
Bytes at (1, 16, 24, 88, 160) with fp32 velocities: 9 x 21.6 MB, floor 0.065 ms at 2.98 TB/s, the assumed copy
of one H100; eleven passes over the state otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from cosmos_fast.kernels.launch import Config, on_device_of
from torch import Tensor

# block: elements. One 16-byte load a thread for each of the six inputs. Swept like adaln's.
CONFIG = Config(1024, 8)


@triton.jit
def _term(factor, value):
    # Where, not times zero: a NaN in a tensor without weight must not reach the result.
    return tl.where(factor != 0.0, factor * value, 0.0)


@triton.jit
def _solver_kernel(
    x, v_cond, v_uncond, m1, m2, last, x_next, m_out, corrected_out, count, guidance,
    sigma, c_last, c_m, c_m1, c_m2, p_x, p_m, p_m1, GUIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = at < count
    v = tl.load(v_cond + at, keep, 0.0).to(tl.float32)
    if GUIDED:
        v = v + guidance * (v - tl.load(v_uncond + at, keep, 0.0).to(tl.float32))
    before = tl.load(last + at, keep & (c_last != 0.0), 0.0)
    one = tl.load(m1 + at, keep & ((c_m1 != 0.0) | (p_m1 != 0.0)), 0.0)
    two = tl.load(m2 + at, keep & (c_m2 != 0.0), 0.0)
    m = tl.load(x + at, keep, 0.0) - sigma * v
    corrected = _term(c_last, before) + _term(c_m, m) + _term(c_m1, one) + _term(c_m2, two)
    following = _term(p_x, corrected) + _term(p_m, m) + _term(p_m1, one)
    tl.store(m_out + at, m, keep)
    tl.store(corrected_out + at, corrected, keep)
    tl.store(x_next + at, following, keep)


def guided_unipc(
    x: Tensor, v_cond: Tensor, v_uncond: Tensor | None, m1: Tensor, m2: Tensor, last: Tensor, guidance: float,
    coefficients: Sequence[float], *, config: Config = CONFIG,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(x_next, m, corrected) as above; coefficients in the order of `StepCoefficients`."""
    x_next, m, corrected = (torch.empty_like(x) for _ in range(3))
    count = x.numel()
    if count:
        v_cond = v_cond.contiguous()
        other = v_cond if v_uncond is None else v_uncond.contiguous()
        with on_device_of(x):
            _solver_kernel[(triton.cdiv(count, config.block),)](
                x, v_cond, other, m1, m2, last, x_next, m, corrected, count, guidance, *coefficients,
                GUIDED=v_uncond is not None, BLOCK=config.block, num_warps=config.warps, enable_fp_fusion=False,
            )  # fmt: skip
    return x_next, m, corrected
