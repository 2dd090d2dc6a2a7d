"""Adapters from the compiled extension to op signatures, for `ops.adaln` and `ops.residual_adaln`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def same_dtype(symbol: str, other: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled op where the output has the input's dtype; `other` for the head's fp32 output.

    The compiled kernels write what they read. Both sides answer to one reference and one tolerance.
    """
    compiled = getattr(torch.ops.cosmos_fast, symbol)

    def run(*args: Any) -> Any:
        return compiled(*args[:-1]) if args[-1] == args[0].dtype else other(*args)

    return run
