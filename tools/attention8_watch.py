"""Times of single runs, and the clock and power of the GPU meanwhile, for `bench_attention8.py`."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

import torch


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


class Watch:
    """SM clock and board power while something runs, from nvidia-smi: medians, and all samples in `rows`."""

    def __enter__(self) -> Watch:
        query = [
            "nvidia-smi",
            "--query-gpu=clocks.sm,power.draw.instant,temperature.gpu",  # power.draw is a mean over a second
            "--format=csv,noheader,nounits",
            "-lms",
            "100",
        ]
        try:
            self.process = subprocess.Popen(
                query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        except OSError:
            self.process = None
        return self

    def __exit__(self, *_: object) -> None:
        self.clock = self.power = None
        self.rows: list[tuple[float, ...]] = []
        if self.process is None:
            return
        self.process.terminate()
        lines = (self.process.communicate()[0] or "").splitlines()
        fields = [line.split(",") for line in lines if line.count(",") == 2 and "N/A" not in line]
        self.rows = [tuple(map(float, row)) for row in fields]
        if self.rows:
            self.clock, self.power = (
                sorted(column)[len(self.rows) // 2] for column in list(zip(*self.rows))[:2]
            )
