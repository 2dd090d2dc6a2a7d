"""Every rung of the 8-bit attention kernel: right at small sizes, then its speed and error at a long one.

    python tools/bench_attention8.py --build                      # compile the rungs (no GPU needed), then stop
    python tools/bench_attention8.py --seconds 60 --out record.json
    python tools/bench_attention8.py --only three,three_cluster --length 84480 --sustain 2
    python tools/bench_attention8.py --only three_lean,three_lean_sparse --turns 5 --sustain 0.3
    python tools/bench_attention8.py --sections sustained,errors,lengths,memory,sparse,activations --seconds 190

A rung is csrc/attention8_rung.cu with the members of `Config` it changes, compiled alone into build/attention8/, so
that a fault of one costs nothing but itself: the rungs run in a child process, and one that says nothing for
--patience seconds is ended, recorded as hung, and the next child goes on behind it. One line per result.

--sections: then the fastest dense rung that is right must show what tools/attention8_proof.py asks of it, and the fastest
that takes lists of key tiles what it asks of that. --turns: in place of all this, rungs beside each other.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from attention8_cases import DEVICE, WIDTH, Case, long_cases, lse_allowed, relative, tile_lists
from attention8_proof import SECTIONS, Version, prove
from attention8_rungs import ROOT, RUNGS, Args, Rung, build, caller, library
from attention8_turns import in_turns
from attention8_watch import load, timed, watched

sys.path.insert(0, str(ROOT / "bench"))
from records import environment  # noqa: E402

# --- one rung ------------------------------------------------------------------------------------------


SHAPES = (
    (128, 128),
    (64, 200),
    (1, 1),
    (63, 65),
    (200, 1000),
    (65, 64),
    (130, 63),
    (1, 4113),
    (4113, 513),
    (300, 4113),
    (26_000, 200),
    (26_000, 1000),
)
"""(L, S) of the small checks: one tile first, so that the first line tells layouts from pipelines; at the end more query
tiles of both heads than a GPU has room for at once, so that blocks follow others on one multiprocessor."""


def check_small(rung: Rung, call: Callable[[Args], None]) -> Iterator[dict[str, Any]]:
    """Errors at small shapes: exact data must match to the output's rounding, random data to e4m3's."""
    for kind in ("exact", "random"):
        worst, faults = 0.0, []
        for L, S in SHAPES:
            # The tensor cores drop low bits of a long sum.
            limit = 4e-3 + 4e-6 * S if kind == "exact" else 6e-2
            blocks = rung.keys in (64, 128) and S > 128
            case = Case(L, S, 2, kind, blocks=blocks, mean=S == 1000)
            tiles = counts = keep = None
            if rung.sparse:
                tiles, counts, flags = tile_lists(case, rung, 1.0 if S < 1000 else 0.4)
                if S == 1000:  # some query tiles without keys
                    empty = torch.arange(counts.numel(), device=DEVICE).view(counts.shape) % 5 == 2
                    counts[empty], flags[empty] = 0, False
                keep = flags.repeat_interleave(rung.queries, 1)[:, :L].repeat_interleave(rung.keys, 2)[
                    ..., :S
                ]
            out = torch.full((L, 2, WIDTH), math.nan, device=DEVICE, dtype=torch.bfloat16)
            lse = torch.full((2, L), math.nan, device=DEVICE)
            call(case.arguments(out, lse, tiles, counts))
            torch.cuda.synchronize()
            exact, exact_lse = case.reference(slice(None), keep)
            lse_limit = 2e-3 if kind == "exact" else lse_allowed(case.largest_score)
            error = relative(out, exact)
            finite = torch.isfinite(exact_lse)
            lse_error = float((lse.double() - exact_lse)[finite].abs().max()) if finite.any() else 0.0
            same_ends = bool((torch.isfinite(lse) == finite).all())
            worst = max(worst, error)
            if not (error < limit and lse_error < lse_limit and same_ends):
                faults.append({"L": L, "S": S, "error": error, "lse": lse_error, "ends": same_ends})
        yield {"rung": rung.name, "check": kind, "ok": not faults, "worst": worst, "faults": faults[:4]}


def check_long(
    rung: Rung, call: Callable[[Args], None], cases: dict[str, Case], seconds: float
) -> Iterator[Any]:
    """Speed, and the error of a few hundred rows against fp64, with V centred and off centre."""
    case = cases["random"]
    L, S, N = case.L, case.S, case.N
    out = torch.empty(L, N, WIDTH, device=DEVICE, dtype=torch.bfloat16)
    lse = torch.empty(N, L, device=DEVICE)
    for share in (0.5, 0.35, 0.2, 0.02) if rung.sparse else (1.0,):
        tiles, counts, _ = tile_lists(case, rung, share) if rung.sparse else (None, None, None)
        args = case.arguments(out, lse, tiles, counts)
        with watched() as seen:
            ms, runs = timed(lambda args=args: call(args), seconds if not rung.sparse else seconds / 4)
        rate = 4.0 * L * S * N * WIDTH / ms / 1e9
        yield {"rung": rung.name, "share": share, "ms": ms, "tflops": rate * share, "runs": runs} | load(seen)
    if rung.sparse or rung.probe != "None":
        return
    rows = slice(0, L, max(L // 64, 1))
    errors = {}
    for name, one in cases.items():
        call(one.arguments(out, lse))
        exact, exact_lse = one.reference_cache
        errors[name] = relative(out[rows], exact)
        errors[f"{name}_bias"] = (
            float((out[rows].double().mean() / exact.mean()) - 1) if name == "shifted" else None
        )
        errors[f"{name}_lse"] = float((lse[:, rows].double() - exact_lse).abs().max())
    yield {"rung": rung.name, "long_errors": errors}


# --- others at the same shape --------------------------------------------------------------------------


def peers(case: Case, seconds: float) -> Iterator[dict[str, Any]]:
    """Other libraries that are installed, on the same values."""
    sys.path.insert(0, str(ROOT))
    work = 4.0 * case.L * case.S * case.N * WIDTH
    half = [
        (x.float() * s.view(1, -1, 1)).bfloat16()
        for x, s in ((case.q8, case.q_scale), (case.k8, case.k_scale))
    ]
    half.append((case.v8.float() * case.v_scale).bfloat16())

    def fa3_fp8() -> Callable[[], Any]:
        try:
            from flash_attn_interface import flash_attn_func  # type: ignore[import-not-found]
        except ImportError:
            from fa3_fwd_interface import flash_attn_func  # type: ignore[import-not-found]
        scales = {
            "q_descale": case.q_scale.T,
            "k_descale": case.k_scale.T,
            "v_descale": torch.ones_like(case.q_scale.T),
        }
        return lambda: flash_attn_func(case.q8[None], case.k8[None], case.v8[None], **scales)

    def ours(load: str) -> Callable[[], Any]:
        from cosmos_fast import attention

        attend = attention.load_fa3() if load == "fa3" else attention.cudnn
        return lambda: attend(*half)

    def cudnn_fp8() -> Callable[[], Any]:
        from cosmos_fast import attention8

        attend, step = attention8.load_cudnn(), case.softmax_scale * (case.q_scale * case.k_scale).mean(0)
        return lambda: attend(case.q8, case.k8, case.v8, step, torch.bfloat16)

    # cuDNN takes one step for all heads: an error of some per mille beside the others'.
    makers = {
        "fa3_fp8": fa3_fp8,
        "cudnn_fp8": cudnn_fp8,
        "fa3_bf16": lambda: ours("fa3"),
        "cudnn_bf16": lambda: ours("cudnn"),
    }
    for name, make in makers.items():
        try:
            run = make()
            result = run()
            result = (result[0] if isinstance(result, tuple) else result).view(case.L, case.N, WIDTH)
            # fp8 peers know no scale per channel of V: it belongs to their output.
            rows = result[:: max(case.L // 64, 1)].float() * (case.v_scale if "fp8" in name else 1.0)
            yield {"peer": name, "long_errors": {"random": relative(rows, case.reference_cache[0])}}
            with watched() as seen:
                ms, runs = timed(run, seconds)
            yield {"peer": name, "ms": ms, "tflops": work / ms / 1e9, "runs": runs} | load(seen)
        except Exception as error:  # what is not installed, or refuses
            yield {"peer": name, "missing": f"{type(error).__name__}: {error}"[:120]}


# --- processes -----------------------------------------------------------------------------------------


def child(names: list[str], options: argparse.Namespace) -> None:
    """Runs rungs in order; says which before it starts, so that the parent knows whom a silence belongs to."""
    begun = time.monotonic()
    say = lambda record: print("@" + json.dumps(record), flush=True)  # noqa: E731
    say({"environment": environment(options.commit)})
    chosen = [rung for rung in RUNGS if rung.name in names]
    calls = {}
    for rung in chosen:
        say({"start": rung.name})
        try:
            call = caller(rung, options.folder)
            right = True
            for record in () if rung.probe != "None" else check_small(rung, call):
                say(record)
                right &= record["ok"]
            if right or options.wrong_too:
                calls[rung.name] = (rung, call)
        except Exception as error:
            say({"rung": rung.name, "fault": f"{type(error).__name__}: {error}"[:200]})
            if "launch" not in str(error):
                raise  # the context may be lost: a new child goes on
    if options.turns:
        for record in in_turns(
            [Version(*c) for c in calls.values()], options.length, options.turns, options.sustain
        ):
            say(record)
        return
    say({"start": "operands"})
    torch.cuda.empty_cache()
    cases = long_cases(options.length)
    rates = {}
    for rung, call in calls.values():
        say({"start": rung.name + " long"})
        for record in check_long(rung, call, cases, options.sustain):
            say(record)
            if "tflops" in record and rung.probe == "None":
                rates.setdefault(rung.name, record["tflops"])  # of sparse ones at half of the tiles
    if options.sections:
        del cases
        torch.cuda.empty_cache()
        say({"start": "sections"})
        best = {}
        for name in sorted(rates, key=lambda name: rates[name]):
            best[calls[name][0].sparse] = Version(*calls[name])
        left = options.left - (time.monotonic() - begun)
        for record in prove(best[False], best.get(True), options, left) if False in best else ():
            say(record)
        return
    say({"start": "peers"})
    for record in peers(cases["random"], options.sustain):
        say(record)


def watch_child(
    names: list[str], options: argparse.Namespace, records: list[dict[str, Any]], end: float
) -> str | None:
    """Reads one child's records; what it was at when it fell silent or died, or None when it finished."""
    command = [sys.executable, __file__, "--child", ",".join(names), "--length", str(options.length)]
    command += ["--commit", options.commit] if options.commit else []
    command += ["--folder", str(options.folder), "--sustain", str(options.sustain)]
    command += ["--wrong-too"] if options.wrong_too else []
    command += ["--turns", str(options.turns)]
    if options.sections:
        command += ["--sections", options.sections, "--long", str(options.long)]
        command += ["--left", str(end - time.monotonic() - 5)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: queue.Queue[str | None] = queue.Queue()

    def pump() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=pump, daemon=True).start()
    at, patience = "torch", options.patience + 25.0  # the first line waits for torch and the context
    while True:
        try:
            line = lines.get(timeout=max(min(patience, end - time.monotonic()), 0.1))
        except queue.Empty:
            process.kill()
            return at
        patience = options.patience + options.sustain
        if line is None:
            return at if process.wait() != 0 else None
        if not line.startswith("@"):
            print("   ", line.rstrip()[:200], flush=True)
            continue
        record = json.loads(line[1:])
        if "start" in record:
            at, patience = record["start"], patience + record.get("patience", 0.0)
            continue
        records.append(record)
        if "environment" not in record:
            print(describe(record), flush=True)


def describe(record: dict[str, Any]) -> str:
    if "section" in record:
        shown = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in record.items()}
        return f"{shown.pop('section')} {shown.pop('name')}: " + json.dumps(shown)
    name = record.get("rung") or record.get("peer")
    if "check" in record:
        verdict = "ok" if record["ok"] else f"WRONG {record['faults']}"
        return f"{name:20s} {record['check']:7s} worst {record['worst']:.2e} {verdict}"
    if "tflops" in record:
        share = f" share {record['share']:.2f}" if record.get("share", 1) != 1 else ""
        load = f"{record['clock_mhz']} MHz {record['watts']} W" if record.get("clock_mhz") else ""
        return (
            f"{name:20s} {record['ms']:9.3f} ms {record['tflops']:7.1f} TF/s{share} x{record['runs']} {load}"
        )
    if "long_errors" in record:
        shown = {k: float(f"{v:.3e}") for k, v in record["long_errors"].items() if v is not None}
        return f"{name:20s} {shown}"
    return f"{name:20s} {record}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build", action="store_true", help="compile and stop")
    parser.add_argument("--only", default="", help="names of rungs, with commas; default those not extra")
    parser.add_argument("--length", type=int, default=84480, help="queries and keys of the long runs")
    parser.add_argument("--sustain", type=float, default=0.4, help="seconds of each timing")
    parser.add_argument("--seconds", type=float, default=75.0, help="end of everything")
    parser.add_argument(
        "--patience", type=float, default=10.0, help="seconds of silence that count as a hang"
    )
    parser.add_argument("--wrong-too", action="store_true", help="time rungs whose small checks failed")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="compilers at once")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/attention8")
    parser.add_argument(
        "--turns", type=int, default=0, help="turns of --sustain seconds for each rung and share"
    )
    parser.add_argument("--out", type=Path, help="JSON record")
    parser.add_argument("--commit", help="of a copy without git, for the record")
    parser.add_argument(
        "--sections", default="", help=f"of {','.join(SECTIONS)}; in place of short runs of peers"
    )
    parser.add_argument("--long", type=float, default=10.0, help="seconds of each sustained run")
    parser.add_argument("--left", type=float, default=1e9, help=argparse.SUPPRESS)
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child.split(","), options)
        return
    end = time.monotonic() + options.seconds
    asked = options.only.split(",") if options.only else [rung.name for rung in RUNGS if not rung.extra]
    unknown = set(asked) - {rung.name for rung in RUNGS}
    if bad := set(filter(None, options.sections.split(","))) - set(SECTIONS):
        parser.error(f"--sections: must be of {', '.join(SECTIONS)}, got {sorted(bad)}.")
    if unknown:
        parser.error(f"--only: must name rungs, got {sorted(unknown)}. There are {[r.name for r in RUNGS]}.")
    chosen = tuple(rung for rung in RUNGS if rung.name in asked)
    build(chosen, options.folder, options.workers)
    if options.build:
        return
    records: list[dict[str, Any]] = []
    left = [rung.name for rung in chosen if library(rung, options.folder).exists()]
    hung: list[str] = []
    while left and time.monotonic() < end:
        at = watch_child(left, options, records, end)
        if at is None or at.removesuffix(" long") not in left:
            if at is not None:
                print(f"ended at {at}", flush=True)
            break
        name = at.removesuffix(" long")
        hung.append(name)
        records.append({"rung": name, "fault": "silent or died, ended", "at": at})
        print(f"{name:20s} silent or died at {at!r}, ended", flush=True)
        left.remove(name)
    rates = [r for r in records if "tflops" in r and "section" not in r and r.get("share", 1.0) == 1.0]
    for record in sorted(rates, key=lambda r: -r["tflops"]):
        print(describe(record))
    if options.out:
        told = [record.pop("environment") for record in records if "environment" in record]
        document = {
            "kind": "attention8",
            "environment": told[0] if told else None,
            "seconds_each": options.sustain,
            "rungs": [asdict(r) for r in chosen],
            "length": options.length,
            "hung": hung,
            "records": [record for record in records if record],
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
