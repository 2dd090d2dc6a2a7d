"""What the sections of tools/bench_denoiser.py share: the network, the peer, the record, and how a call is timed."""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import published
import roofline
import torch
from peers import Diffusers, faster_attention
from published import gib
from records import attempted, skipped
from torch import Tensor
from watch import Watch

from cosmos_fast import dispatch
from cosmos_fast.config import NetworkConfig

STEP = 10
"""Step of the schedule that single calls are timed and compared at."""
GRIDS = {"720": (24, 88, 160), "480": (24, 54, 96), "image": (1, 88, 160)}
SMOKE_GRIDS = {"720": (3, 8, 12), "480": (2, 6, 10), "image": (1, 8, 12)}

Call = Callable[[], Any]


class Bench:
    """One run: `record` is what gets written."""

    def __init__(self, args: argparse.Namespace, environment: dict[str, Any]) -> None:
        self.args = args
        self.started = time.perf_counter()
        self.device = dispatch.pick_device("cpu" if args.smoke else "cuda")
        self.config = NetworkConfig.tiny() if args.smoke else NetworkConfig.single()
        self.grids = dict(SMOKE_GRIDS if args.smoke else GRIDS)
        if args.grid:
            self.grids["720"] = tuple(map(int, args.grid.split(",")))
        self.watch = Watch()
        self.peaks: roofline.Peaks | None = None
        self.record: dict[str, Any] = {
            "kind": "denoiser", "environment": environment,
            "args": {k: str(v) for k, v in vars(args).items() if k != "out"}, "sections": {}, "cases": {},
        }  # fmt: skip
        self.peer: Diffusers | None = None

    def build(self) -> None:
        """Our network first and alone, so that its memory and its first call are its own."""
        with torch.no_grad():
            state = published.random_state(self.config, 0, self.device)
            self.network = published.build(self.config, state, self.device, torch.bfloat16)
        self.record["ops"] = [
            {"op": op, "chosen": name, "others": why}
            for op, name, why in dispatch.explain(self.device, torch.bfloat16)
        ]
        self.record["weights_gib"] = gib(published.weight_bytes(self.network))

    def theirs(self) -> Diffusers | None:
        """The peer, built when first needed; None if peers are skipped."""
        if self.peer is None and not self.args.skip_peers:
            self.build_peer()
        return self.peer

    def build_peer(self) -> None:
        grid = self.grids["720"]
        L = grid[0] * grid[1] * grid[2] // 4
        self.peer = Diffusers(self.config, published.published(self.network))
        self.peer.backends, times = faster_attention(
            L, self.config.heads, self.config.head_width, self.device
        )
        self.peer.compile("aot_eager" if self.args.smoke else "inductor")
        import diffusers

        self.record["peer"] = {
            "diffusers": diffusers.__version__, "attention": "cudnn" if self.peer.backends else "torch's choice",
            "attention_ms": times,
        }  # fmt: skip

    def sync(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, call: Call) -> float:
        start = self.sync()
        call()
        return self.sync() - start

    def memory(self, call: Call) -> dict[str, float]:
        """GiB held before a call, and the most held during it."""
        if self.device.type != "cuda":
            call()
            return {}
        self.clear()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return {"resident_gib": gib(before), "peak_gib": gib(torch.cuda.max_memory_allocated())}

    def is_late(self) -> bool:
        return time.perf_counter() - self.started > self.args.deadline_s

    def section(self, name: str, run: Callable[[], Any], path: Path) -> None:
        """Run one section, unless the deadline has passed, and write the record with all there is so far."""
        entry = skipped(self.args.deadline_s) if self.is_late() else attempted(run)
        self.record["sections"][name] = entry
        path.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")
        print(f"[{time.perf_counter() - self.started:6.1f} s] {name}: {entry['status']}", flush=True)
        self.clear()

    def measure_peaks(self) -> None:
        if self.device.type == "cuda":
            self.peaks = roofline.measure_peaks(self.device)
            self.record["peaks"] = self.peaks.as_dict()

    def clear(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def interleave(
        self, calls: dict[str, Call], rounds: int, label: str, settle_s: float = 2.0
    ) -> dict[str, Any]:
        """Rows by variant name; each round runs every variant once, after the clocks have settled."""
        if self.device.type == "cuda":
            until = time.perf_counter() + settle_s
            while time.perf_counter() < until:
                for call in calls.values():
                    self.timed(call)
        runs: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                with self.watch(f"{label}/{name}"):
                    runs[name].append(self.timed(call))
        rows = {}
        for name, times in runs.items():
            low, _, high = quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
            rows[name] = {
                "median_s": median(times), "iqr_s": high - low, "min_s": min(times), "max_s": max(times),
                "runs_s": times, "gpu": self.watch.summary(f"{label}/{name}"),
            }  # fmt: skip
        return rows

    def peer_calls(self, given: published.Inputs) -> dict[str, Call]:
        peer = self.theirs()
        if peer is None:
            return {}
        tau = given.times[STEP].to(self.device) * self.config.timestep_scale

        def compiled() -> Tensor:
            return peer(given.z, given.control, given.text, tau)

        def eager() -> Tensor:
            with peer.eager():
                return compiled()

        return {"diffusers": eager, "diffusers_compiled": compiled}
