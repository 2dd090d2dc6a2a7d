"""8-bit attention at production shape: is it right, how fast is each library, what do its operands cost?

    python tools/bench_fp8_attention.py OUT [--only producers,errors] [--deadline-s 90] [--grid 24,88,160] [--sustain-s 0]
    python tools/bench_fp8_attention.py OUT.json --smoke      a small run on the CPU, emulated

First every implementation on inputs that are hard for 8 bits, against fp64 on sampled rows: relative error of bf16, of
naive codes (one step per tensor, nothing removed), of ours with and without rotation. Then times in turn, on one layer
of the published 2B network: attention in TFLOP/s, producers and epilogue in ms, every launch choice of them, and at the end
the best ones as the constants to set in kernels/qkv_codes.py. One line per result as it comes; what fails is recorded with
what it said, and the run goes on. OUT: a .json file, or the folder bench/results.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "tools")]

import torch  # noqa: E402
from fp8_producers import Calls, producers  # noqa: E402
from records import destination, environment  # noqa: E402
from torch import Tensor  # noqa: E402

from cosmos_fast import ops, ops_attention8, self_attention, testing  # noqa: E402
from cosmos_fast.config import NetworkConfig  # noqa: E402
from cosmos_fast.context import rope  # noqa: E402
from cosmos_fast.dispatch import TABLE, use  # noqa: E402
from cosmos_fast.self_attention8 import SLOW, Fp8  # noqa: E402

E4M3 = torch.float8_e4m3fn
ROWS = 48
KINDS = ("gaussian", "shifted", "peaked", "outliers")

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Codes = ops_attention8.Codes
T = TypeVar("T")


class Run:
    """What was found, and how much time is left."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = torch.device("cpu" if args.smoke else "cuda")
        self.end = time.perf_counter() + args.deadline_s
        grid = (2, 8, 12) if args.smoke else tuple(map(int, args.grid.split(",")))
        config = NetworkConfig.single()
        self.N, self.K = (2, 128) if args.smoke else (config.heads, config.head_width)
        self.cos, self.sin = rope(config, grid, self.device, rounded=True)
        self.L = self.cos.shape[0]
        self.flop = 4 * self.L**2 * self.N * self.K
        self.record: dict[str, Any] = {
            "kind": "fp8_attention", "environment": environment(args.commit) | {"libraries": libraries()}, "shape": [self.L, self.N, self.K],
            "errors": {}, "attention": {}, "producers": {}, "checks": {}, "failures": {},
        }  # fmt: skip

    @contextmanager
    def trial(self, name: str) -> Iterator[None]:
        """Note a failure with its text and go on."""
        try:
            yield
        except Exception as error:
            self.record["failures"][name] = f"{type(error).__name__}: {error}"[:1500]
            print(f"FAILED {name}: {self.record['failures'][name]}", flush=True)
            if not isinstance(error, LookupError):
                traceback.print_exc(limit=-4)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def in_time(self, what: str, items: Iterable[T]) -> Iterator[T]:
        """The items, until the time is up."""
        for item in items:
            if time.perf_counter() > self.end:
                self.record["failures"][what] = "no time left"
                return
            yield item

    def sync(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def once(self, what: str, calls: Calls) -> Calls:
        """Those of the calls that return."""
        good = {}
        for name, call in self.in_time(what, calls.items()):
            with self.trial(f"{what} {name}"):
                call()
                self.sync()
                good[name] = call
        return good

    def times_ms(self, calls: Calls, rounds: int) -> dict[str, float]:
        """Median of each, in turn."""
        runs: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                if self.device.type == "cpu":
                    begun = time.perf_counter()
                    call()
                    runs[name].append((time.perf_counter() - begun) * 1e3)
                    continue
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                call()
                end.record()
                torch.cuda.synchronize()
                runs[name].append(begin.elapsed_time(end))
        return {name: median(values) for name, values in runs.items()}

    def inputs(self, kind: str, seed: int = 0) -> Inputs:
        """qkv, gains, cos, sin of one layer. Shifts are large beside the spread, outliers sit in four channels."""
        draw = torch.Generator(self.device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, device=self.device)

        width = self.N * self.K
        qkv = normal(self.L, 3 * width).bfloat16()
        gains = [1 + 0.1 * normal(self.K) for _ in "qk"]
        if kind == "shifted":
            qkv += torch.cat((normal(width), 4 * normal(width), 4 * normal(width))).bfloat16()
        if kind == "peaked":
            gains = [2.5 * gain for gain in gains]
        if kind == "outliers":
            for gain in gains:
                gain[[3, 40, 77, 101]] *= 12
            qkv[:, 2 * width :: 37] *= 12
        q_gain, k_gain = (gain.bfloat16() for gain in gains)
        return qkv, q_gain, k_gain, self.cos, self.sin


def libraries() -> dict[str, Any]:
    """Versions of what computes attention, or why it is not there."""
    found: dict[str, Any] = {}
    for module in ("fa3_fwd_interface", "flash_attn_interface", "cudnn"):
        try:
            found[module] = str(getattr(__import__(module), "__version__", "present"))
        except Exception as error:
            found[module] = f"{type(error).__name__}: {error}"[:200]
    if "cudnn" in sys.modules:
        found["cudnn_backend"] = sys.modules["cudnn"].backend_version()
    return found


def smi() -> list[str]:
    query = "clocks.sm,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip().split(", ")


# --- errors ----------------------------------------------------------------------------------------


def exact_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """Attention of some queries in fp64, head by head."""
    outs = []
    for n in range(q.shape[1]):
        scores = q[rows, n].double() @ k[:, n].double().T * q.shape[2] ** -0.5
        outs.append(torch.softmax(scores, -1) @ v[:, n].double())
    return torch.stack(outs, 1)


def naive(q: Tensor, k: Tensor, v: Tensor) -> Codes:
    """One step per tensor from its largest value, nothing removed, nothing rotated."""
    steps = [x.float().abs().amax() / 448 for x in (q, k, v)]
    codes = ((x.float() / step).to(E4M3).contiguous() for x, step in zip((q, k, v), steps, strict=True))
    table = torch.ones(q.shape[1:], device=q.device)
    score = (steps[0] * steps[1] * q.shape[2] ** -0.5).view(1)
    return Codes(*codes, score, table * steps[2], table * 0)


def backends(run: Run) -> list[str]:
    """Implementations of attention_fp8 that run here, on a GPU the fast ones; why the others do not is a failure."""
    found = []
    for candidate in TABLE["attention_fp8"].candidates:
        if candidate.name == "reference" or (candidate.name in SLOW and run.device.type == "cuda"):
            continue
        with run.trial(f"load {candidate.name}"):
            if obstacle := candidate.obstacle(run.device, E4M3):
                raise LookupError(obstacle)
            candidate.load()
            found.append(candidate.name)
    print("implementations:", found, flush=True)
    return found


def errors(run: Run, names: list[str]) -> None:
    rows = torch.linspace(0, run.L - 1, ROWS, device=run.device).long()
    for kind in run.in_time("errors", KINDS):
        with run.trial(f"errors {kind}"):
            errors_of(run, names, kind, rows)


def errors_of(run: Run, names: list[str], kind: str, rows: Tensor) -> None:
    given, table = run.inputs(kind), run.record["errors"].setdefault(kind, {})
    q, k, v = ops.qk_norm_rope(*given)
    exact = exact_rows(q, k, v, rows)

    def tell(name: str, out: Tensor) -> None:
        table[name] = testing.rel_error(out[rows].view_as(exact), exact)
        print(f"error {kind:9s} {name:24s} {table[name]:.3e}", flush=True)

    with run.trial(f"{kind} bf16"):
        tell("bf16", ops.attention(q, k, v))
    made = {"naive": partial(naive, q, k, v)}
    made["smoothed"] = partial(ops_attention8.qkv_codes, *given, rotate=False)
    made["rotated"] = partial(ops_attention8.qkv_codes, *given, rotate=True)
    for label, make in run.in_time(f"errors {kind}", made.items()):
        with run.trial(f"{kind} codes {label}"):
            codes = make()
            for name in names:
                with run.trial(f"{kind} {name} {label}"), use(attention_fp8=name):
                    tell(f"{name} {label}", ops_attention8.attention_fp8(codes))


# --- times -----------------------------------------------------------------------------------------


def attention_times(run: Run, names: list[str], rounds: int, sustain_s: float) -> None:
    given = run.inputs("gaussian")
    q, k, v = ops.qk_norm_rope(*given)
    made = {pack: ops_attention8.qkv_codes(*given, pack=pack) for pack in (False, True)}
    calls: Calls = {}
    for candidate in TABLE["attention"].candidates:
        if candidate.name in ("fa3", "cudnn") and candidate.obstacle(run.device, q.dtype) is None:
            with run.trial(f"load {candidate.name} bf16"):
                calls[f"{candidate.name} bf16"] = partial(candidate.load(), q, k, v)
    for candidate in TABLE["attention_fp8"].candidates:
        if candidate.name in names:
            c = made[
                candidate.name in ("own", "triton")
            ]  # as each wants v, else it would pack it in every call
            operands = c.q, c.k, c.v, c.score_step, c.v_step, c.v_mean, torch.bfloat16
            calls[f"{candidate.name} fp8"] = partial(candidate.load(), *operands)
    calls = tell_attention(run, "alone", calls, rounds)

    def layer(name: str) -> Tensor:
        with use(attention_fp8=name):
            return Fp8()(*given, 0)

    layers: Calls = {"exact layer": lambda: self_attention.exact(*given, 0)}
    layers |= {f"{name} fp8 layer": partial(layer, name) for name in names}
    tell_attention(run, "with producers", layers, max(rounds // 2, 1))
    for name, call in run.in_time("sustained", calls.items() if sustain_s else ()):
        with run.trial(f"sustained {name}"):
            begin, count, seen = run.sync(), 0, []
            while run.sync() - begin < sustain_s:
                call()
                count += 1
                if count % 16 == 8 and run.device.type == "cuda":
                    seen.append(smi())
            rate = run.flop * count / (run.sync() - begin) / 1e12
            run.record["attention"][f"{name} sustained"] = {
                "tflop_s": rate,
                "seconds": sustain_s,
                "smi": seen,
            }
            print(f"attention {name:24s} {rate:7.0f} TFLOP/s over {sustain_s} s {seen[-1:]}", flush=True)


def tell_attention(run: Run, what: str, calls: Calls, rounds: int) -> Calls:
    calls = run.once(what, calls)
    with run.trial(f"times {what}"):
        for name, ms in run.times_ms(calls, rounds).items():
            rate = run.flop / ms / 1e9
            run.record["attention"][name] = {"ms": ms, "tflop_s": rate}
            print(f"attention {name:24s} {ms:9.3f} ms {rate:7.0f} TFLOP/s {what}", flush=True)
    return calls


def checks(run: Run, names: list[str]) -> None:
    """Every implementation on the small cases, against its reference."""
    for op in ("qkv_moments", "qkv_codes", "values_restored", "attention_fp8"):
        for case in run.in_time(f"checks {op}", testing.CASES[op]):
            if case.group == "production":
                continue
            args = testing.inputs(op, case, run.device, torch.bfloat16)
            for candidate in TABLE[op].candidates:
                wanted = candidate.name in (*names, "triton", "emulated")
                if not wanted or candidate.obstacle(run.device, args[0].dtype):
                    continue
                label = f"{op} {case.name} {candidate.name}"
                with run.trial(f"check {label}"):
                    run.record["checks"][label] = faults = testing.faults(op, candidate.load()(*args), args)
                    if faults:
                        print(f"WRONG {label}: {faults}", flush=True)
    wrong = sum(bool(faults) for faults in run.record["checks"].values())
    print(f"{len(run.record['checks'])} checks, {wrong} wrong", flush=True)


SECTIONS = ("errors", "attention", "producers", "checks")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections in order, separated by commas")
    parser.add_argument("--deadline-s", type=float, default=90)
    parser.add_argument("--grid", default="24,88,160", help="latent frames, rows, columns")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--sustain-s", type=float, default=0, help="seconds of each implementation without a break"
    )
    parser.add_argument("--commit", help="commit to record where git cannot tell")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args(argv)
    wanted = args.only.split(",")
    if unknown := set(wanted) - set(SECTIONS):
        parser.error(f"--only: sections are {', '.join(SECTIONS)}, got {', '.join(sorted(unknown))}")
    testing.kernels_from_checkout()
    run = Run(args)
    out = destination(args.out, run.record["environment"], "fp8-attention")
    print(json.dumps(run.record["environment"]), flush=True)
    with torch.inference_mode():
        names = backends(run)
        sections = {
            "errors": partial(errors, run, names),
            "attention": partial(attention_times, run, names, args.rounds, args.sustain_s),
            "producers": partial(producers, run, args.rounds), "checks": partial(checks, run, names),
        }  # fmt: skip
        for name in run.in_time("sections", wanted):
            if args.smoke and name == "producers":
                continue  # kernels alone
            with run.trial(name):
                sections[name]()
            out.write_text(json.dumps(run.record, indent=1) + "\n", encoding="utf-8")
    print(f"{out}: {len(run.record['failures'])} failures, {run.end - time.perf_counter():.0f} s left")
    return 0


if __name__ == "__main__":
    sys.exit(main())
