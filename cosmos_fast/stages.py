"""Seconds and peak memory of each stage of a run, measured where the stage happens."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass
class Stages:
    """Accumulates by stage name. The sum over stages is what the caller waited: no moment counts twice.

    seconds: wall clock, summed over the times a stage ran. peak_bytes: most device memory allocated at any
    moment of the stage, or None on a CPU, where the process cannot tell. beside_s: seconds of the stage's work in
    threads beside the caller, which cost it nothing but what is in `seconds`.
    """

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    beside_s: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """A stage on the device, which is synchronised at both ends."""
        self._begin()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._end(name)
            self._add(name, start)

    def through(self, name: str, things: Iterable[T]) -> Iterator[T]:
        """`things`, whose making is a stage on the device; what is done with each counts elsewhere.

        The device is synchronised before the first and behind the last alone: between them it works ahead.
        """
        self._begin()
        made = iter(things)
        while True:
            start = time.perf_counter()
            try:
                thing = next(made)
            except StopIteration:
                self._end(name)
                return
            finally:
                self._add(name, start)
            yield thing

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """A stage that the device has no part in, or one that the caller waits for another thread to end."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._add(name, start)

    @contextmanager
    def beside(self, name: str) -> Iterator[None]:
        """Work of a stage in another thread, one thread for each name."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.beside_s[name] = self.beside_s.get(name, 0.0) + time.perf_counter() - start

    def reset(self) -> None:
        """Forget what was measured: the next clip starts from zero."""
        self.seconds.clear()
        self.peak_bytes.clear()
        self.beside_s.clear()

    def record(self) -> dict[str, dict[str, float | int | None]]:
        """{stage: {"seconds", "peak_bytes"}} in the order stages first ran, and "beside_s" where there is any."""
        record: dict[str, dict[str, float | int | None]] = {}
        beside = dict(self.beside_s)
        for name in (*self.seconds, *(name for name in beside if name not in self.seconds)):
            seconds = round(self.seconds.get(name, 0.0), 4)
            record[name] = {"seconds": seconds, "peak_bytes": self.peak_bytes.get(name)}
            if name in beside:
                record[name]["beside_s"] = round(beside[name], 4)
        return record

    def _begin(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)

    def _end(self, name: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
            self.peak_bytes[name] = max(peak, self.peak_bytes.get(name, 0))

    def _add(self, name: str, start: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
