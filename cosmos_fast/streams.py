"""Calls in turns on two CUDA streams: where the last blocks of one leave multiprocessors idle, the first of the next begin."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")


def in_turns(calls: Iterable[Callable[[], T]], device: torch.device) -> list[T]:
    """The result of every call, given to the device in this order; on CUDA neighbours may run beside each other.

    So none may read what another writes. All come after what the current stream holds, and what it is given next comes
    after all of them. Operands must be kept until then: memory freed earlier would be used again too soon.
    """
    if device.type != "cuda":
        return [call() for call in calls]
    current, side = torch.cuda.current_stream(device), _side(device)
    side.wait_stream(current)
    try:
        found = []
        for turn, call in enumerate(calls):
            with torch.cuda.stream(side) if turn % 2 else nullcontext():
                found.append(call())
        return found
    finally:
        current.wait_stream(side)


@cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """One for all who ask: each asks before anything else of its own runs there."""
    return torch.cuda.Stream(device)
