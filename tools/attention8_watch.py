"""Times of single runs, and the clock and power of the GPU meanwhile, for `bench_attention8.py`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "bench")]

from watch import Sample, Watch, column  # noqa: E402


def timed(run: Callable[[], None], seconds: float) -> tuple[float, int]:
    """Median milliseconds of single runs, and how many there were."""
    run()
    torch.cuda.synchronize()
    times: list[float] = []
    end = time.monotonic() + seconds
    while len(times) < 3 or time.monotonic() < end:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times)[len(times) // 2], len(times)


@contextmanager
def watched() -> Iterator[list[Sample]]:
    """What was seen of the GPU in this block; the list is filled when it ends."""
    watch, seen = Watch(), list[Sample]()
    try:
        with watch("block"):
            yield seen
    finally:
        seen += watch.samples("block")
        watch.close()


def load(seen: list[Sample]) -> dict[str, float | None]:
    """Median SM clock, and median power as it was at each look: a mean over a second outlasts a timing."""
    return {name: median(values) if values else None for name, values in _columns(seen).items()}


def mean_load(seen: list[Sample]) -> dict[str, float | None]:
    """Means of clock, power and temperature: of a run without a break."""
    columns = _columns(seen) | {"temperature_c": column(seen, "temperature_c")}
    return {name: fmean(values) if values else None for name, values in columns.items()}


def _columns(seen: list[Sample]) -> dict[str, list[float]]:
    return {"clock_mhz": column(seen, "sm_mhz"), "watts": column(seen, "instant_w")}
