"""The compiled half: loads `_C` once, on first question, and keeps the reason if it cannot.

`_C` registers its ops with torch (`torch.ops.cosmos_fast.adaln_cpu`, ...); `_host` tells what was built.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

_NOT_BUILT = "_C not built (COSMOS_FAST_BUILD=none)"


@cache
def _problem(module: str) -> str | None:
    """Why a compiled module cannot be loaded, or None after loading it."""
    name = f"{__package__}.{module}"
    if find_spec(name) is None:
        return _NOT_BUILT.replace("_C", module)
    try:
        import torch  # noqa: F401  _C finds libtorch already loaded; it carries no path to it

        import_module(name)
    except ImportError as error:
        # The usual case: a module built against a CUDA torch under a CPU-only torch.
        return f"{module} does not load: {str(error).splitlines()[0]}"
    return None


def available(symbol: str) -> bool:
    """True if the op `cosmos_fast::<symbol>` is compiled in and loaded."""
    return reason(symbol) is None


def reason(symbol: str) -> str | None:
    """Why the op `cosmos_fast::<symbol>` cannot be used, or None if it can."""
    problem = _problem("_C")
    if problem is not None:
        return problem
    import torch

    if hasattr(torch.ops.cosmos_fast, symbol):
        return None
    return f"_C has no {symbol} (built with COSMOS_FAST_BUILD={build_info().get('mode', 'unknown')})"


def build_info() -> dict[str, Any]:
    """Facts of the build: mode, archs, compilers, torch; `{"mode": "none", "reason": ...}` without one."""
    problem = _problem("_host")
    if problem is not None:
        return {"mode": "none" if _problem("_C") == _NOT_BUILT else "unknown", "reason": problem}
    return dict(import_module(f"{__package__}._host").build_info())


def kernel_info() -> list[dict[str, Any]]:
    """Registers, spills and occupancy of each CUDA kernel instance; empty unless built with CUDA."""
    if _problem("_host") is not None:
        return []
    return [dict(row) for row in import_module(f"{__package__}._host").kernel_info()]
