"""How much of the communication in a trace lies under computation, and how much nothing hides."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from trace import kind_of
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Span = tuple[float, float]
COMMUNICATION = re.compile(r"nccl|Memcpy (PtoP|DtoD)", re.IGNORECASE)
"""Collectives, and copies between devices; one within a device is the way into memory that others read."""
KERNELS = 20
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def union(spans: Iterable[Span]) -> list[Span]:
    """The same time, no moment twice, in order."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def length(spans: Iterable[Span]) -> float:
    return sum(end - start for start, end in spans)


def shared(one: list[Span], other: list[Span]) -> float:
    """Time in both unions."""
    return length(one) + length(other) - length(union([*one, *other]))


def overlap(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Milliseconds of one call, from a Chrome trace: compute, communication, its hidden and exposed part, idle, span.

    attention is part of compute, under_attention of hidden. Communication counts while its kernels run, waiting for the
    other rank included. kernels: those that ran longest in all, beside each other or not.
    """
    ran = [e for e in events if e.get("ph") == "X" and e.get("cat") in ON_DEVICE]
    if not ran:
        return {}
    spans: dict[bool, list[Span]] = {True: [], False: []}
    for e in ran:
        spans[bool(COMMUNICATION.search(e["name"]))].append((e["ts"], e["ts"] + e["dur"]))
    sent, computed = union(spans[True]), union(spans[False])
    attended = union((e["ts"], e["ts"] + e["dur"]) for e in ran if kind_of(e["name"]) == "attention")
    hidden, busy = shared(sent, computed), union([*sent, *computed])
    span = busy[-1][1] - busy[0][0]
    microseconds = {
        "compute_ms": length(computed), "attention_ms": length(attended), "communication_ms": length(sent), "hidden_ms": hidden,
        "under_attention_ms": shared(sent, attended),
        "exposed_ms": length(sent) - hidden, "idle_ms": span - length(busy), "span_ms": span,
    }  # fmt: skip
    found: dict[str, Any] = {name: value / 1e3 for name, value in microseconds.items()}
    return found | {"kernels": _longest(ran)}


def _longest(ran: list[dict[str, Any]]) -> list[dict[str, Any]]:
    total: dict[str, list[float]] = {}
    for e in ran:
        total.setdefault(e["name"], []).append(e["dur"])
    longest = sorted(total.items(), key=lambda item: -sum(item[1]))[:KERNELS]
    return [{"name": name[:120], "count": len(took), "ms": sum(took) / 1e3} for name, took in longest]


def profiled(call: Callable[[], object], device: torch.device) -> list[dict[str, Any]]:
    """Trace events of one call; on a CPU none are of a device."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    if cuda:
        with profile(activities=activities):  # the first profile of a process pays for starting CUPTI
            torch.ones(1, device=device)
            torch.cuda.synchronize()
    with profile(activities=activities) as done:
        call()
        if cuda:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        done.export_chrome_trace(str(path))
        return list(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])
