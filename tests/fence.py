"""Catches writes outside of what an implementation allocated, and values it forgot to write."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SENTINEL = 0xA5


class Fenced(TorchDispatchMode):
    """Every tensor allocated inside lies between two fences of sentinel bytes and starts out full of them."""

    def __init__(self, fence: int = 4096) -> None:
        super().__init__()
        self.fence, self.buffers = fence, []  # type: int, list[Tensor]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        if func.overloadpacket not in (aten.empty, aten.empty_like, aten.new_empty) or out.numel() == 0:
            return out
        size = out.numel() * out.element_size()
        buffer = torch.full((size + 2 * self.fence,), SENTINEL, dtype=torch.uint8, device=out.device)
        self.buffers.append(buffer)
        inside = buffer[self.fence : self.fence + size].view(out.dtype)
        return inside.as_strided(out.shape, out.stride())

    def broken(self) -> int:
        """How many fence bytes were overwritten."""
        ends = [part for b in self.buffers for part in (b[: self.fence], b[-self.fence :])]
        return sum(int((end != SENTINEL).sum()) for end in ends)
