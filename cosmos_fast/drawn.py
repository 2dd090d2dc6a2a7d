"""What the tables of cases are made of: a case, and what draws its inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Args = tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """One row of the table: sizes for the op's maker, and why the row is there."""

    name: str
    group: str
    why: str
    sizes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Random:
    """Draws reproducible inputs on one device; floating-point ones in `dtype` unless told otherwise."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype or self.dtype)

    def codes(self, *shape: int) -> Tensor:
        return torch.randint(0, 256, shape, generator=self.generator, device=self.device, dtype=torch.uint8)
