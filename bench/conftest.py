"""Honest timing: one clock, cold caches, candidates and peers launch by launch in turn, everything recorded.

`pytest --benchmark` runs this folder. Records are JSON files under bench/results/<gpu>/; `--benchmark-cpu` runs the
small cases on the CPU, to check the benchmarks themselves, and records nothing unless `--benchmark-results` is given.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import pytest
import roofline
import torch
from records import destination, environment

ROOT = Path(__file__).resolve().parents[1]
ROUND_S = 5e-3
"""A timed round lasts at least this long, so that the synchronisation at its end (about 10 us) vanishes."""
SETTLE_S = 0.3
"""Launches before anything is timed: short runs ride boost clocks that a clip never sees."""
LAUNCHES, MIN_LAUNCHES, BUDGET_S = 100, 7, 4.0

Inputs = tuple[Any, ...]
Call = Callable[..., Any]


def clock() -> float:
    """Seconds; on a GPU, after everything launched so far has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    runnable = torch.cuda.is_available() or config.getoption("--benchmark-cpu")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.benchmark(timer=clock))
            if not runnable:
                item.add_marker(
                    pytest.mark.skip(reason="needs a CUDA device; --benchmark-cpu runs the small cases")
                )


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def size(device: torch.device) -> str:
    """Which row of a case table to take: production on a GPU, small on a CPU."""
    return "production" if device.type == "cuda" else "small"


@pytest.fixture(scope="session")
def peaks(device: torch.device) -> roofline.Peaks | None:
    return roofline.measure_peaks(device) if device.type == "cuda" else None


def rotation(make: Callable[[], Inputs], device: torch.device) -> Iterator[Inputs]:
    """Endless inputs from enough copies that none is still in L2 when its turn comes again."""
    first = make()
    copies = [first]
    if device.type == "cuda":
        size = max(1, roofline.nbytes(part for part in _flat(first)))
        cold = 3 * torch.cuda.get_device_properties(device).L2_cache_size
        copies += [make() for _ in range(min(-(-cold // size), 64))] if size < cold else []
    return cycle(copies)


def _flat(inputs: Any) -> Iterator[torch.Tensor]:
    for part in inputs:
        if isinstance(part, torch.Tensor):
            yield part
        elif isinstance(part, list | tuple):
            yield from _flat(part)


def interleaved(
    calls: dict[str, Call], inputs: Iterator[Inputs], device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each launch, by name; every round launches each call once, so drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = clock()
    for call in calls.values():
        call(*next(inputs))
    once_s = clock() - start
    while clock() - start < SETTLE_S and device.type == "cuda":
        for call in calls.values():
            call(*next(inputs))
    rounds = max(MIN_LAUNCHES, min(LAUNCHES, int(BUDGET_S / max(once_s, 1e-6))))
    if device.type == "cpu":
        for _ in range(rounds):
            for name, call in calls.items():
                args, begin = next(inputs), time.perf_counter()
                call(*args)
                times[name].append(time.perf_counter() - begin)
        return times
    marks = []
    for _ in range(rounds):
        # About 2 ms of queue: with 0.1 ms a 40 us kernel was timed at 150, most of it Python's launch (H100).
        torch.cuda._sleep(4_000_000)
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            args = next(inputs)
            begin.record()
            call(*args)
            end.record()
            marks.append((name, begin, end))
    torch.cuda.synchronize()
    for name, begin, end in marks:
        times[name].append(begin.elapsed_time(end) / 1e3)
    return times


class Record:
    """Rows of one benchmark file, written once at the end of the session."""

    def __init__(self) -> None:
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.peaks: roofline.Peaks | None = None

    def write(self, folder: Path, environment: dict[str, Any]) -> list[Path]:
        paths = []
        for name, rows in self.rows.items():
            body = {
                "kind": "kernels",
                "environment": environment,
                "peaks": self.peaks and self.peaks.as_dict(),
                "rows": rows,
            }
            path = destination(folder, environment, name)
            path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
            paths.append(path)
        return paths


@pytest.fixture
def versus(
    request: pytest.FixtureRequest, benchmark: Any, device: torch.device, peaks: roofline.Peaks | None
) -> Call:
    """versus(op, case, calls, make, work): times `calls` (name -> function of the inputs that `make` returns).

    The first call is ours and also goes through pytest-benchmark, with the whole comparison as extra_info. A call
    that cannot run stays in the record with its reason. Returns the rows by name.
    """

    def compare(
        op: str, case: str, calls: dict[str, Call], make: Callable[[], Inputs], work: roofline.Work
    ) -> Any:
        inputs, able, rows = rotation(make, device), {}, {}
        for name, call in calls.items():
            try:
                call(*next(inputs))
                able[name] = call
            except (RuntimeError, ImportError, NotImplementedError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                rows[name] = {"op": op, "case": case, "candidate": name, "error": reason}
        for name, times in interleaved(able, inputs, device).items():
            rows[name] = {"op": op, "case": case, "candidate": name, **summary(times, work, peaks)}
        record: Record = request.config.stash[RECORD]
        record.peaks = peaks
        record.rows.setdefault(Path(request.node.path).stem.removeprefix("bench_"), []).extend(rows.values())
        ours = next(iter(calls))
        benchmark.extra_info.update(rows=list(rows.values()))
        if ours in able:
            launches = max(1, int(ROUND_S / max(rows[ours]["median_ms"] / 1e3, 1e-7)))
            benchmark.pedantic(
                lambda: able[ours](*next(inputs)), rounds=5, iterations=launches, warmup_rounds=1
            )
        return rows

    return compare


def summary(times: list[float], work: roofline.Work, peaks: roofline.Peaks | None) -> dict[str, Any]:
    """Median and interquartile range in ms, achieved rates, and % of the measured roofline."""
    mid, (low, _, high) = median(times), quantiles(times, n=4)
    row: dict[str, Any] = {"median_ms": mid * 1e3, "iqr_ms": (high - low) * 1e3, "launches": len(times)}
    row |= {
        "bytes": work.bytes,
        "flops": work.flops,
        "gb_s": work.bytes / mid / 1e9,
        "tflop_s": work.flops / mid / 1e12,
    }
    if peaks is not None:
        row["roofline_pct"] = 100 * peaks.floor_s(work) / mid
    return row


RECORD = pytest.StashKey[Record]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORD] = Record()


def pytest_sessionfinish(session: pytest.Session) -> None:
    record = session.config.stash[RECORD]
    folder = session.config.getoption("--benchmark-results")
    if record.rows and (folder or torch.cuda.is_available()):
        for path in record.write(
            folder or ROOT / "bench" / "results", environment(session.config.getoption("--benchmark-commit"))
        ):
            print(f"\nrecord: {path}")
