"""Check every Triton kernel on this GPU and time it next to its peers, in one run of one or two minutes.

    python tools/bench_kernels.py out.json [--sweep] [--only adaln,gelu] [--compile-budget 20]

Checks the small, odd, empty and production cases of `cosmos_fast.testing` in bf16 against the references; times the
production ones, candidate by candidate in turn: triton, every built native one (cuda on a GPU), eager (the reference),
compiled (the reference through torch.compile, as long as its budget lasts). Percentages are of the copy rate measured
in the same run, or of its 8192-cubed GEMM where arithmetic is the bound (TFLOP/s then). What moves so little that starting and
ending it counts is also compared with a copy of as many bytes, timed in turn with it, and once more among many launches in
a CUDA graph. --sweep also times other launch choices. Exit status 1 if anything failed; the JSON file is written all the
same. --device cpu with TRITON_INTERPRET=1 is a dry run of this script.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import torch
from records import environment

from cosmos_fast import _native, reference, testing
from cosmos_fast.dispatch import TABLE
from cosmos_fast.packing import TILE_KEYS, TILE_QUERIES

LAUNCHES = 15
L2_MULTIPLE = 3
QUEUE_CYCLES = 500_000  # about 0.3 ms of sleep before each launch: Python is ahead, so its cost is not timed
WARPS, BLOCKS = (1, 2, 4, 8, 16), (1024, 2048, 4096, 8192)
FREE_BLOCK = {"gelu", "gelu_fp8", "guided_unipc", "pixels", "normalized"}
"""Kernels whose block may be any power of two; of the others only the warps are free."""

FP32 = {"unpatchify", "guided_unipc"}
"""Ops that the network runs on fp32 tensors; all others run in bf16."""

FLOP: dict[str, Callable[..., int]] = dict.fromkeys(
    ("linear_gelu", "linear_head_norm"), lambda x, w, *_: 2 * x.shape[0] * x.shape[1] * w.shape[0]
)
FLOP["conv3d"] = lambda x, w, b, residual, stride: (
    2 * w.numel() * x.shape[0] * ((x.shape[2] - w.shape[2]) // stride + 1)
    * (x.shape[3] - w.shape[3] + 1) * (x.shape[4] - w.shape[4] + 1)
)  # fmt: skip
FLOP["conv_half"] = lambda x, w, b: 2 * w.numel() * x[:, 0].numel() // 4
FLOP["conv_double"] = lambda x, w, b: 2 * w.numel() * x[:, 0].numel() * 4
FLOP["conv3d_fp8"] = lambda x, w, *_: FLOP["conv3d"](x, w, None, None, 1)
FLOP["linear_gelu_fp8"] = lambda a, a_steps, steps, w, *_: 2 * a.shape[0] * a.shape[1] * w.shape[0]
FLOP["attention_wide"] = lambda q, k, v: 4 * q.numel() * k.shape[0]
FLOP["attention_fp8"] = lambda q, k, *_: 4 * q.numel() * k.shape[0]
FLOP["attention_fp8_tiles"] = lambda q, *rest: 4 * TILE_QUERIES * TILE_KEYS * q.shape[2] * int(rest[7].sum())
"""Ops bound by arithmetic: how much of it they need, GELU and norms left out."""

GEMM = 8192

Call = Callable[..., Any]


class Run:
    """What has been found so far."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.rows: list[dict[str, Any]] = []
        self.sweep: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self.checks = 0
        self.copy_gb_s = self.gemm_tflop_s = float("nan")
        self.flush: torch.Tensor | None = None
        on_gpu = self.device.type == "cuda"
        self.cold = (
            L2_MULTIPLE * torch.cuda.get_device_properties(self.device).L2_cache_size if on_gpu else 2048
        )

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Note a failure and go on with the next case."""
        try:
            yield
        except Exception as error:
            self.failures.append(f"{what}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            traceback.print_exc(limit=-3)

    def check(self, what: str, op: str, call: Call, args: tuple[Any, ...]) -> None:
        with self.guarded(what):
            self.checks += 1
            self.failures += [f"{what}: {fault}" for fault in testing.faults(op, call(*args), args)]

    def times(self, calls: dict[str, Call], args: tuple[Any, ...], moved: int) -> dict[str, list[float]]:
        """Milliseconds of each launch by name, in turn; small operands are evicted from L2 before each."""
        if self.device.type == "cpu":
            return {name: [_wall_ms(call, args) for _ in range(3)] for name, call in calls.items()}
        if self.flush is None:
            self.flush = torch.empty(self.cold, dtype=torch.uint8, device=self.device)
        marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        for turn in range(LAUNCHES + 3):
            for name, call in calls.items():
                if moved < self.cold:
                    self.flush.zero_()
                torch.cuda._sleep(QUEUE_CYCLES)
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                call(*args)
                end.record()
                if turn >= 3:
                    marks.append((name, begin, end))
            torch.cuda.synchronize()
        return {name: [b.elapsed_time(e) for n, b, e in marks if n == name] for name in calls}

    def replayed(self, call: Call, make: Callable[[int], tuple[Any, ...]], moved: int) -> float:
        """Milliseconds of a launch among many in a CUDA graph, each on operands and results that L2 has lost."""
        sets = [make(seed) for seed in range(min(self.cold // moved + 2, 64))]
        if self.device.type == "cpu":
            return median(_wall_ms(call, args) for args in sets)
        call(*sets[0])  # compiles, which a capture must not
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held = [call(*args) for args in sets]  # while they are held, no result takes the place of another
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(LAUNCHES + 1)]
        graph.replay()
        for mark in marks:
            mark.record()
            graph.replay()
        torch.cuda.synchronize()
        times = [begin.elapsed_time(end) / len(sets) for begin, end in zip(marks, marks[1:])]
        del held
        return median(times)

    def copies(self, moved: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Two buffers; copying one to the other reads and writes `moved` bytes in all."""
        source = torch.full((moved // 2,), seed % 251 + 1, dtype=torch.uint8, device=self.device)
        return torch.empty_like(source), source

    def measure_copy(self) -> None:
        size = 2**30 if self.device.type == "cuda" else 2**20
        source = torch.empty(size, dtype=torch.bfloat16, device=self.device).normal_()
        target = torch.empty_like(source)
        times = self.times({"copy": target.copy_}, (source,), 4 * size)
        self.copy_gb_s = 4 * size / median(times["copy"]) / 1e6

    def measure_gemm(self) -> None:
        """On normal data: zeros take less power, so the clock would be higher than any network sees."""
        size = GEMM if self.device.type == "cuda" else 128
        a, b = (torch.randn(size, size, device=self.device).to(torch.bfloat16) for _ in range(2))
        times = self.times({"gemm": torch.mm}, (a, b), 6 * size * size)
        self.gemm_tflop_s = 2 * size**3 / median(times["gemm"]) / 1e9

    def row(
        self, op: str, case: str, name: str, times: list[float], moved: int, args: tuple[Any, ...]
    ) -> dict[str, Any]:
        low, mid, high = quantiles(times, n=4)
        rate = moved / mid / 1e6
        row = {
            "op": op, "case": case, "candidate": name, "ms": mid, "iqr_ms": high - low, "bytes": moved,
            "gb_s": rate, "copy_pct": 100 * rate / self.copy_gb_s,
        }  # fmt: skip
        told = f"{rate:8.0f} GB/s {row['copy_pct']:6.1f} %"
        if op in FLOP:
            row["tflop_s"] = FLOP[op](*args) / mid / 1e9
            row["gemm_pct"] = 100 * row["tflop_s"] / self.gemm_tflop_s
            told = f"{row['tflop_s']:8.0f} TFLOP/s {row['gemm_pct']:6.1f} %"
        print(f"{op:15s} {case:15s} {name:12s} {mid:9.4f} ms {told}", flush=True)
        return row


def copy(target: torch.Tensor, source: torch.Tensor, *_: object) -> torch.Tensor:
    return target.copy_(source)


def _wall_ms(call: Call, args: tuple[Any, ...]) -> float:
    begin = time.perf_counter()
    call(*args)
    return (time.perf_counter() - begin) * 1e3


def kernel(op: str) -> Call:
    return next(c for c in TABLE[op].candidates if c.name == "triton").load()


def peers(op: str, device: torch.device, dtype: torch.dtype) -> dict[str, Call]:
    """Our implementations for such tensors, Triton first: every built native one, also while the table does not choose it."""
    found = {"triton": kernel(op)}
    for candidate in TABLE[op].candidates:
        if (candidate.symbol is not None or candidate.name == "composed") and candidate.obstacle(
            device, dtype
        ) is None:
            found[candidate.name] = candidate.load()
    return found


def check_small(run: Run, op: str, dtype: torch.dtype) -> None:
    """Small, odd and empty cases; in fp32 the first one only, because every one is a kernel to compile."""
    cases = [case for case in testing.CASES[op] if case.group != "production"]
    for case, kind in [*((case, dtype) for case in cases), (cases[0], torch.float32)]:
        what = f"{op} {case.name} {kind}"
        with run.guarded(what):
            args = testing.inputs(op, case, run.device, kind)
            for name, call in peers(op, run.device, args[0].dtype).items():
                run.check(f"{what} {name}", op, call, args)


def production(run: Run, op: str, group: str, dtype: torch.dtype) -> None:
    for case in testing.CASES[op]:
        if case.group != group:
            continue
        with run.guarded(f"{op} {case.name}"):
            args = testing.inputs(op, case, run.device, dtype)
            calls = peers(op, run.device, args[0].dtype)
            for name, call in calls.items():
                run.check(f"{op} {case.name} {name}", op, call, args)
            moved = testing.nbytes(op, args, testing.as_tuple(calls["triton"](*args)))
            alike = {"copy": partial(copy, *run.copies(moved))} if moved < run.cold else {}
            timed = run.times({**calls, "eager": getattr(reference, op), **alike}, args, moved)
            copied = median(timed.pop("copy", [0.0]))
            rows = [run.row(op, case.name, name, times, moved, args) for name, times in timed.items()]
            if copied:
                small(run, op, case, dtype, calls, rows, copied)
            run.rows += rows
            del args, alike
        if run.device.type == "cuda":
            torch.cuda.empty_cache()


def small(
    run: Run, op: str, case: testing.Case, dtype: torch.dtype, calls: dict[str, Call], rows: list[dict[str, Any]], copied: float
) -> None:  # fmt: skip
    """Beside a copy of as many bytes, that took `copied` ms in turn with them: adds to the rows of our versions."""
    moved = rows[0]["bytes"]
    copy_graph = run.replayed(copy, lambda seed: run.copies(moved, seed), moved)
    for row in rows:
        row |= {"equal_copy_ms": copied, "equal_copy_pct": 100 * copied / row["ms"]}
        if row["candidate"] not in calls:
            continue
        alone = run.replayed(
            calls[row["candidate"]], lambda seed: testing.inputs(op, case, run.device, dtype, seed), moved
        )
        row |= {
            "graph_ms": alone, "graph_copy_pct": 100 * moved / alone / 1e6 / run.copy_gb_s,
            "equal_copy_graph_ms": copy_graph, "equal_copy_graph_pct": 100 * copy_graph / alone,
        }  # fmt: skip
        print(
            f"{op:15s} {case.name:15s} {row['candidate']:12s} of a copy of as many bytes: {row['equal_copy_pct']:.1f} % in turn, "
            f"{row['equal_copy_graph_pct']:.1f} % in a graph ({alone:.4f} ms, {row['graph_copy_pct']:.1f} % of the copy rate)",
            flush=True,
        )


def compiled(run: Run, op: str, group: str, dtype: torch.dtype) -> None:
    """The reference through torch.compile, at the first production case, next to ours again."""
    case = next(c for c in testing.CASES[op] if c.group == group)
    with run.guarded(f"{op} {case.name} compiled"):
        args = testing.inputs(op, case, run.device, dtype)
        plain = torch.compile(getattr(reference, op), dynamic=False)
        moved = testing.nbytes(op, args, testing.as_tuple(kernel(op)(*args)))
        timed = run.times({"triton": kernel(op), "compiled": plain}, args, moved)
        run.rows.append(run.row(op, case.name, "compiled", timed["compiled"], moved, args))
        run.rows[-1]["triton_in_turn_ms"] = median(timed["triton"])


def sweep(run: Run, op: str, group: str, dtype: torch.dtype) -> None:
    """Other launch choices at the first production case."""
    case = next(c for c in testing.CASES[op] if c.group == group)
    with run.guarded(f"{op} sweep"):
        args = testing.inputs(op, case, run.device, dtype)
        call = kernel(op)
        moved = testing.nbytes(op, args, testing.as_tuple(call(*args)))
        for label, choice in choices(op, args):
            with run.guarded(f"{op} {label}"):
                timed = run.times({"": lambda *a, c=choice: call(*a, **c)}, args, moved)
                run.sweep.append(run.row(op, case.name, label, timed[""], moved, args))
                if moved < run.cold:
                    row = run.sweep[-1]
                    row["graph_ms"] = run.replayed(
                        lambda *a, c=choice: call(*a, **c),
                        lambda seed: testing.inputs(op, case, run.device, dtype, seed), moved,
                    )  # fmt: skip
                    print(
                        f"{op:15s} {case.name:15s} {label:12s} {row['graph_ms']:9.4f} ms in a graph",
                        flush=True,
                    )


def choices(op: str, args: tuple[Any, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Other launch choices of a kernel, by label: the keyword that its function takes."""
    from cosmos_fast.kernels.launch import Config
    from cosmos_fast.kernels.patches import Strip

    if op in ("patchify", "unpatchify"):
        for rows, tokens, warps in product((1, 2, 4), (16, 32), (2, 4, 8)):
            if 8 <= 64 * rows * tokens / warps / 32 <= 64:
                yield f"{rows}x{tokens}/{warps}", {"strip": Strip(rows, tokens, warps)}
        return
    for block, warps in product(BLOCKS if op in FREE_BLOCK else (fixed_block(op, args),), WARPS):
        if op not in FREE_BLOCK or 4 <= block / warps / 32 <= 64:
            yield f"{block}/{warps}", {"config": Config(block, warps)}


def fixed_block(op: str, args: tuple[Any, ...]) -> int:
    if "adaln" in op or op in ("residual", "quantise"):
        return 1 << (args[0].shape[1] - 1).bit_length()
    return 1


def native() -> dict[str, str]:
    """Symbol of the compiled half -> "built", or why it is not there."""
    symbols = {c.symbol for row in TABLE.values() for c in row.candidates if c.symbol is not None}
    return {symbol: _native.reason(symbol) or "built" for symbol in sorted(symbols)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("--sweep", action="store_true", help="also time other launch choices")
    parser.add_argument("--only", default="", help="comma-separated op names")
    parser.add_argument("--compile-budget", type=float, default=20.0, metavar="SECONDS")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--commit", help="commit to record where git cannot tell")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: needs a CUDA device, torch {torch.__version__} sees none.")
    testing.kernels_from_checkout()
    dry = options.device == "cpu"
    group, dtype = ("small", torch.float16) if dry else ("production", torch.bfloat16)
    ops = [op for op, row in TABLE.items() if any(c.name == "triton" for c in row.candidates)]
    ops = [op for op in ops if not options.only or op in options.only.split(",")]
    kinds = {op: torch.float32 if op in FP32 else dtype for op in ops}
    run, start = Run(options.device), time.perf_counter()
    where = environment(options.commit) | {"native": native()}
    try:
        run.measure_copy()
        run.measure_gemm()
        print(f"copy {run.copy_gb_s:.0f} GB/s on {where['gpu']}", flush=True)
        for op in ops:
            production(run, op, group, kinds[op])
        for op in ops:
            check_small(run, op, dtype)
        print(
            f"{run.checks} checks, {len(run.failures)} failures, {time.perf_counter() - start:.0f} s",
            flush=True,
        )
        if options.sweep:
            for op in ops:
                if op not in FLOP:  # tools/tune_exact.py compares tiles, under sustained load
                    sweep(run, op, group, kinds[op])
        since = time.perf_counter()
        for op in ops:
            if time.perf_counter() - since > options.compile_budget:
                print(f"{op}: torch.compile not timed, its budget of {options.compile_budget} s is spent")
            else:
                compiled(run, op, group, kinds[op])
    except Exception as error:
        run.failures.append(f"run: {type(error).__name__}: {error}")
        traceback.print_exc()
    finally:
        body = {
            "kind": "kernels", "environment": where, "copy_gb_s": run.copy_gb_s, "gemm_tflop_s": run.gemm_tflop_s, "checks": run.checks,
            "seconds": time.perf_counter() - start, "rows": run.rows, "sweep": run.sweep, "failures": run.failures,
        }  # fmt: skip
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    print(f"{run.checks} checks in {time.perf_counter() - start:.0f} s, {len(run.failures)} failures")
    for failure in run.failures:
        print(f"FAILED {failure}")
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
