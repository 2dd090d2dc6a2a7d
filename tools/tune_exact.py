"""Time the ways to compute each part of a block of the exact recipe on this GPU, the ways of a part in turn.

    python tools/tune_exact.py out.json [--deadline-s 100] [--only heads,residual] [--smoke]

Parts: products (vendor's GEMM against ours at every shape), gelu, heads (cross-attention's query), residual (a gated branch
added by the GEMM itself, its weights times the gate), cross (attention to 512 keys), self (attention to all tokens).
Every way is checked first, on rows from the start, the middle and the end; then all ways of a part run in short turns, so that
they meet the same clock, the one that the power limit allows. What cannot run here is recorded with its reason. Kernels are
compiled by several processes before anything is timed. --smoke runs tiny sizes on a CPU, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median, quantiles
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "tools")]

import torch  # noqa: E402
from exact_parts import SMALL, Parts, Sizes, Way  # noqa: E402
from records import environment  # noqa: E402
from watch import Watch  # noqa: E402

from cosmos_fast import dispatch  # noqa: E402

ROUNDS, TURN_S, SETTLE_S = 7, 0.03, 0.4
WORKERS = 8

PARTS = ("residual", "gelu", "heads", "cross", "products", "self")
"""In the order of what they may give."""

# --- running them ----------------------------------------------------------------------------------


class Run:
    """The record so far, and when to stop."""

    def __init__(self, device: torch.device, deadline: float, seconds: float) -> None:
        self.device, self.until, self.turn_s = device, deadline, seconds
        self.watch = Watch()
        self.rows: list[dict[str, Any]] = []

    def late(self) -> bool:
        return time.monotonic() > self.until

    def launches(self, way: Way, count: int) -> Any:
        if self.device.type == "cpu":
            begin = time.perf_counter()
            for _ in range(count):
                way.call()
            return (time.perf_counter() - begin) * 1e3 / count
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            way.call()
        end.record()
        return begin, end, count

    def part(self, name: str, ways: Iterator[Way]) -> None:
        able, counts = [], []
        for way in ways:
            if self.late():
                break
            try:
                if fault := way.check(way.call()):
                    raise ArithmeticError(fault)
                once = self._ms(self.launches(way, 1))
            except Exception as error:  # a way that cannot run here must not end the comparison
                text = f"{type(error).__name__}: {str(error)[:300]}"
                self.rows.append({"part": name, "name": way.name, "fault": text})
                print(f"{name:9} {way.name:45} {text}", flush=True)
                continue
            able.append(way)
            counts.append(max(1, round(self.turn_s * 1e3 / max(once, 1e-3))))
        on_gpu = self.device.type == "cuda"
        with self.watch(name):
            settled = time.monotonic() + (SETTLE_S if on_gpu else 0)
            for turn in range(100):
                if self.late() or (turn >= ROUNDS and time.monotonic() > settled):
                    break
                marks = [self.launches(way, count) for way, count in zip(able, counts)]
                for way, mark in zip(able, marks):
                    way.ms.append(self._ms(mark))
        for way in able:
            kept = way.ms[1:] or way.ms  # the first turn meets a clock that no clip sees
            if not kept:
                self.rows.append({"part": name, "name": way.name, "fault": "past the deadline"})
                continue
            low, mid, high = quantiles(kept, n=4) if len(kept) > 1 else kept * 3
            row = {
                "part": name,
                "name": way.name,
                "ms": median(kept),
                "iqr_ms": high - low,
                "turns": len(kept),
            }
            row |= {"tflop_s": way.work / mid / 1e9} if way.work else {}
            self.rows.append(row)
            print(
                f"{name:9} {way.name:45} {row['ms']:9.4f} ms  iqr {row['iqr_ms']:.4f}  {row.get('tflop_s', 0):6.0f} TFLOP/s",
                flush=True,
            )
        print(f"{name:9} clocks {self.watch.summary(name)}", flush=True)

    def _ms(self, mark: Any) -> float:
        if self.device.type == "cpu":
            return float(mark)
        begin, end, count = mark
        end.synchronize()
        return begin.elapsed_time(end) / count


def compile_all(place_of: tuple[int, int], s: Sizes, dtype: torch.dtype) -> None:
    """Compile this process's share of the Triton kernels, at few tokens: the number of tokens is no part of a kernel."""
    parts = Parts(Sizes(256, s.D, s.N, s.K, s.S), torch.device("cuda"), dtype, smoke=False)
    index, count = place_of
    names = [f for part in ("products", "gelu", "heads") for f in getattr(parts, part)()]
    for way in names[index::count]:
        try:
            way.call()
        except Exception as error:  # reported when it is timed
            print(f"compile {way.name}: {type(error).__name__}", flush=True)
    torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("--deadline-s", type=float, default=100.0, help="stop timing after so many seconds")
    parser.add_argument("--only", default="", help=f"comma-separated parts of {', '.join(PARTS)}")
    parser.add_argument("--tokens", type=int, default=Sizes.L)
    parser.add_argument("--commit", default="", help="commit to record where git cannot tell")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU: checks this script")
    parser.add_argument("--compile", type=int, nargs=2, metavar=("I", "N"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    started = time.monotonic()
    if not options.smoke and not torch.cuda.is_available():
        parser.error(f"needs a CUDA device, torch {torch.__version__} sees none.")
    s = SMALL if options.smoke else Sizes(options.tokens)
    device, dtype = (
        (torch.device("cpu"), torch.float16) if options.smoke else (torch.device("cuda"), torch.bfloat16)
    )
    if options.compile:
        compile_all((options.compile[0], options.compile[1]), s, dtype)
        return 0
    wanted = options.only.split(",") if options.only else list(PARTS)
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"--only: parts are {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    if not options.smoke:
        command = [sys.executable, __file__, str(options.json), "--compile"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        children = [subprocess.Popen([*command, str(i), str(WORKERS)], env=env) for i in range(WORKERS)]
        for child in children:
            child.wait()
        print(f"compiled in {time.monotonic() - started:.1f} s", flush=True)
    run = Run(device, started + options.deadline_s, 0.0 if options.smoke else TURN_S)
    body: dict[str, Any] = {
        "kind": "exact_ways", "sizes": asdict(s), "rows": run.rows, "clocks": {},
        "environment": environment(options.commit),
        "ops": [{"op": op, "chosen": name} for op, name, _ in dispatch.explain(device, dtype)],
    }  # fmt: skip
    options.json.parent.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        parts = Parts(s, device, dtype, options.smoke)
        try:
            with torch.no_grad():
                run.part(name, getattr(parts, name)())
        except Exception as error:  # one part must not lose the others
            run.rows.append({"part": name, "fault": f"{type(error).__name__}: {str(error)[:300]}"})
            print(f"{name}: {error}", flush=True)
        del parts
        if device.type == "cuda":
            torch.cuda.empty_cache()
        body["clocks"][name] = run.watch.summary(name)
        body["seconds"] = time.monotonic() - started
        options.json.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    run.watch.close()
    print(f"{time.monotonic() - started:.0f} s, written: {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
