"""Seconds and peak memory of each stage of a run, measured where the stage happens."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class Stages:
    """Accumulates by stage name. On CUDA the device is synchronised at both ends of a stage.

    seconds: wall clock, summed over the times a stage ran. peak_bytes: most device memory allocated at any
    moment of the stage, or None on a CPU, where the process cannot tell.
    """

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        try:
            yield
        finally:
            if cuda:
                torch.cuda.synchronize(self.device)
                peak = torch.cuda.max_memory_allocated(self.device)
                self.peak_bytes[name] = max(peak, self.peak_bytes.get(name, 0))
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def reset(self) -> None:
        """Forget what was measured: the next clip starts from zero."""
        self.seconds.clear()
        self.peak_bytes.clear()

    def record(self) -> dict[str, dict[str, float | int | None]]:
        """{stage: {"seconds", "peak_bytes"}} in the order stages first ran."""
        return {
            name: {"seconds": round(seconds, 4), "peak_bytes": self.peak_bytes.get(name)}
            for name, seconds in self.seconds.items()
        }
