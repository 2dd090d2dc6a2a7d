"""The other fused ops at every production case of the case table: memory-bound, so look at % of the copy rate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import pytest
import roofline
import torch

from cosmos_fast import testing
from cosmos_fast.dispatch import TABLE

testing.kernels_from_checkout()

OPS = [op for op in TABLE if op not in ("adaln", "residual_adaln", "attention")]
"""adaln and residual_adaln have a file of their own; attention is bound by arithmetic."""

FLOP = {"linear_gelu": 2, "linear_head_norm": 2, "attention_wide": 4}
"""Floating-point operations for each value of the first operand and row of the second, where they are the bound."""


def candidates(op: str, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[..., Any]]:
    """Everything in the table that can run here, ours first, and the reference through torch.compile."""
    found = {c.name: c.load() for c in TABLE[op].candidates if c.obstacle(device, dtype) is None}
    if device.type == "cuda":
        found["torch.compile"] = torch.compile(found["reference"])
    return found


def cases(*groups: str) -> list[Any]:
    return [
        pytest.param(op, case, id=f"{op}-{case.name.replace(' ', '_')}")
        for op in OPS
        for case in testing.CASES[op]
        if case.group in groups
    ]


@pytest.mark.parametrize(("op", "case"), cases("production", "small"))
def bench_kernel(
    op: str, case: testing.Case, size: str, device: torch.device, versus: Callable[..., Any]
) -> None:
    if case.group != size:
        pytest.skip(f"a case of another size than {size}")
    seeds = count()
    make = partial(testing.inputs, op, case, device, torch.bfloat16)
    args = make()
    flop = FLOP[op] * args[0].numel() * args[1].shape[0] if op in FLOP else 0
    work = roofline.Work(testing.nbytes(op, args, testing.eager(op, args)), flop)
    calls = candidates(op, device, args[0].dtype)
    rows = versus(op, case.name, calls, lambda: make(seed=next(seeds)), work)
    assert all("median_ms" in rows[name] for name in calls if name != "torch.compile"), rows
