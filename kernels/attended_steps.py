"""The step of attention's results as e4m3 codes, known before attention runs: they are weighted means of v.

    |y| <= |v_mean| + 448 * v_step of its channel;   step = the power of two above the largest of these / 448

One step for all rows: e4m3 is floating point, and results down to 2^-14 of the largest keep all its digits. Shapes: v_step
and v_mean (N, K) fp32 -> (rows,) fp32, all alike, as a scaled product takes them. 0.34 MB at L 84480: a launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from cosmos_fast.kernels.launch import Config, on_device_of
from cosmos_fast.kernels.qkv_codes import power_of_two
from torch import Tensor

STEPS = Config(4096, 4)


@triton.jit
def _attended_steps_kernel(
    v_step, v_mean, steps, rows, NK: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    cols = tl.arange(0, BLOCK)
    step, mean = tl.load(v_step + cols, cols < NK, 0.0), tl.load(v_mean + cols, cols < NK, 0.0)
    bound = tl.div_rn(tl.abs(mean), 448.0) + step
    # A maximum may pass over NaN.
    largest = tl.where(tl.max((bound != bound).to(tl.int32), 0) > 0, float("nan"), tl.max(bound, 0))
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(steps + row, tl.zeros((ROWS,), tl.float32) + power_of_two(largest), row < rows)


def attended_steps(v_step: Tensor, v_mean: Tensor, rows: int, *, config: Config = STEPS) -> Tensor:
    """(rows,) times the step. config.block: rows of one program."""
    steps = v_step.new_empty(rows, dtype=torch.float32)
    if rows:
        with on_device_of(v_step):
            _attended_steps_kernel[(triton.cdiv(rows, config.block),)](
                v_step, v_mean, steps, rows, NK=v_step.numel(), BLOCK=triton.next_power_of_2(v_step.numel()),
                ROWS=config.block, num_warps=config.warps,
            )  # fmt: skip
    return steps
