"""adaln and residual_adaln: memory-bound, so the figure to look at is % of the measured copy rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import roofline
import torch

from cosmos_fast import _native, ops
from cosmos_fast.dispatch import TABLE

# (L, D, T, J): 93 frames of 720p; the same on one of 8 context ranks; 480p; with the hints of one and of four branches.
CASES = {
    "production": {
        "720p": (84480, 2048, 24, 0),
        "720p-hint": (84480, 2048, 24, 1),
        "720p-4hints": (84480, 2048, 24, 4),
        "720p-8ranks": (10560, 2048, 4, 0),
        "480p": (37440, 2048, 24, 0),
    },
    "small": {"small": (64, 256, 4, 0), "small-hints": (64, 256, 4, 2)},
}
NAMES = sorted({name for cases in CASES.values() for name in cases})


def candidates(op: str, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[..., Any]]:
    """Everything in the table that can run here, ours first, then the reference through torch.compile."""
    row = TABLE[op]
    found = {c.name: c.load() for c in row.candidates if c.obstacle(device, dtype) is None}
    symbol = f"{op}_{device.type}"
    if _native.available(symbol):  # also while the table does not choose it
        found = {"native": getattr(torch.ops.cosmos_fast, symbol), **found}
    if device.type == "cuda":
        found["torch.compile"] = torch.compile(found["reference"])
    return found


@pytest.mark.parametrize("name", NAMES)
def bench_residual_adaln(name: str, size: str, device: torch.device, versus: Callable[..., Any]) -> None:
    if name not in CASES[size]:
        pytest.skip(f"a case of another size than {size}")
    L, D, T, J = CASES[size][name]

    def make() -> tuple[Any, ...]:
        x, branch, *hints = (torch.randn(L, D, dtype=torch.bfloat16, device=device) for _ in range(2 + J))
        gate, shift, scale = (torch.randn(T, D, device=device) for _ in range(3))
        weights = torch.rand(J, 1, device=device) if J else None
        return x, branch, gate, hints, weights, shift, scale, -(-L // T), 0, ops.EPS, torch.bfloat16

    calls = candidates("residual_adaln", device, torch.bfloat16)
    rows = versus("residual_adaln", name, calls, make, roofline.residual_adaln(L, D, J))
    assert any("median_ms" in row for row in rows.values())


@pytest.mark.parametrize("name", [name for name in NAMES if "hint" not in name])
def bench_adaln(name: str, size: str, device: torch.device, versus: Callable[..., Any]) -> None:
    if name not in CASES[size]:
        pytest.skip(f"a case of another size than {size}")
    L, D, T, _ = CASES[size][name]

    def make() -> tuple[Any, ...]:
        x = torch.randn(L, D, dtype=torch.bfloat16, device=device)
        shift, scale = (torch.randn(T, D, device=device) for _ in range(2))
        return x, shift, scale, -(-L // T), 0, ops.EPS, torch.bfloat16

    rows = versus("adaln", name, candidates("adaln", device, torch.bfloat16), make, roofline.adaln(L, D))
    assert any("median_ms" in row for row in rows.values())
