"""What every launch shares: the frozen launch choices, and the guard that puts it on the tensor's device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """block: elements, rows or tokens of one program, as the kernel says; warps: of 32 threads each."""

    block: int
    warps: int


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Launch on x's device and its current stream; a CPU tensor, in the interpreter, needs no guard."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
