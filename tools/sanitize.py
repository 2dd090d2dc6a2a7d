"""Every kernel of ours at its small cases under compute-sanitizer: `make sanitize`, or a part of it within a time:

    python tools/sanitize.py --tool memcheck --tool initcheck --select adaln --seconds 90 --out record.json

Runs memcheck, synccheck and initcheck, unless --tool names fewer; racecheck is left out, because it reports correct uses of
the bulk copy engine. The cases are those of tools/sanitize_cases.py, shared out among --jobs processes, first without a tool:
that compiles the kernels, which takes long under one. --seconds is the time of each tool; what still runs then is ended, and
the record says which cases did not run.

initcheck does not follow what the copy engine writes: those kernels (sanitize_cases.BULK) run with results that were filled
before. That nothing else is hidden by it is shown in the record: unfilled, a case of each gives errors, and filled, none.

Exits 1 if a result is wrong, a tool found an error or a case did not run, 2 if no case was selected, 3 without
compute-sanitizer.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DRIVER = ROOT / "tools" / "sanitize_cases.py"
TOOLS = ("memcheck", "synccheck", "initcheck")
HEADER = re.compile(r"^========= (?!COMPUTE-SANITIZER|ERROR SUMMARY|Target|LEAK)[A-Z]\w+ ", re.MULTILINE)
"""First line of an error that a tool reports; the lines that follow are indented further."""


def find() -> str | None:
    beside = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "compute-sanitizer")
    return shutil.which("compute-sanitizer") or (str(beside) if beside.exists() else None)


def names(select: str) -> list[str]:
    command = [sys.executable, str(DRIVER), "--list", *(["--select", select] if select else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, 2):
        raise SystemExit(
            f"sanitize: the cases could not be listed.\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return [line for line in done.stdout.splitlines() if "/" in line]


def read(output: str) -> dict[str, Any]:
    """What one process did: cases that ended, were skipped, were wrong; errors by the case after whose start they appear."""
    row: dict[str, Any] = {"done": [], "skipped": {}, "wrong": {}, "suspects": {}}
    current = "start"
    for line in output.splitlines():
        if line.startswith('{"case"'):
            told = json.loads(line)
            current = told["case"]
            if "skipped" in told:
                row["skipped"][current] = told["skipped"]
            elif "faults" in told:
                row["done"].append(current)
                if told["faults"]:
                    row["wrong"][current] = told["faults"]
        elif HEADER.match(line):
            first = row["suspects"].setdefault(
                current, {"errors": 0, "first": line.removeprefix("========= ")}
            )
            first["errors"] += 1
    summaries = [int(n) for n in re.findall(r"ERROR SUMMARY: (\d+) error", output)]
    row["tool_errors"] = max(sum(summaries), sum(s["errors"] for s in row["suspects"].values()))
    row["summaries"] = len(summaries)
    return row


def share(
    prefix: list[str], select: str, jobs: int, until: float, *, filled: bool = False, quiet: bool = False
) -> list[dict[str, Any]]:
    """Run the selected cases in `jobs` processes, each under `prefix`; one row a process. quiet: errors are expected."""
    # A caching allocator hides writes from one tensor into the next.
    env = {
        **os.environ,
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "CUDA_MODULE_LOADING": "LAZY",
        "OMP_NUM_THREADS": "1",
    }
    command = [*prefix, sys.executable, str(DRIVER), *(["--select", select] if select else []), *(["--filled"] if filled else [])]  # fmt: skip

    def one(index: int) -> dict[str, Any]:
        child = subprocess.Popen(
            [*command, "--part", f"{index}/{jobs}"], cwd=ROOT, env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        ended = True
        try:
            output, _ = child.communicate(timeout=max(until - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # the tool and the process under it
            output, _ = child.communicate()
            ended = False
        row = read(output)
        nothing = ended and child.returncode == 2 and not row["done"]  # more processes than cases
        row |= {"exit": 0 if nothing else child.returncode, "ended": ended, "tail": output[-2000:]}
        row["whole"] = nothing or not prefix or bool(row["summaries"])
        if ended and not quiet and (row["exit"] or row["tool_errors"] or not row["whole"]):
            told = f"{' '.join(prefix[1:3])} part {index}/{jobs}, exit {child.returncode}:"
            print(f"{told}\n{output[-3000:]}", flush=True)
        return row

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, range(1, jobs + 1)))


def summed(
    what: str, selected: list[str], parts: list[list[dict[str, Any]]], seconds: float
) -> dict[str, Any]:
    """One row of the record from the rows of all processes."""
    rows = [row for part in parts for row in part]
    done = sorted(name for row in rows for name in row["done"])
    skipped: dict[str, str] = {}
    wrong: dict[str, Any] = {}
    suspects: dict[str, Any] = {}
    for row in rows:
        skipped |= row["skipped"]
        wrong |= row["wrong"]
        suspects |= row["suspects"]
    missing = sorted(set(selected) - set(done) - set(skipped))
    broken = [
        row["tail"] for row in rows if row["ended"] and (not row["whole"] or row["exit"] not in (0, 1, 99))
    ]
    errors = sum(row["tool_errors"] for row in rows)
    return {
        "tool": what, "selected": len(selected), "run": len(done), "skipped": skipped, "not_run": missing, "wrong": wrong,
        "tool_errors": errors, "suspects": suspects, "broken": broken, "seconds": seconds,
        "ok": bool(done) and not (missing or wrong or errors or broken),
    }  # fmt: skip


SHORT = ("--show-backtrace", "no", "--print-limit", "20")
"""Where thousands of errors are expected: looking up where each came from takes a minute."""


def first_of(kernel: str, selected: list[str]) -> str:
    """One case of a kernel is enough to see that it gives errors."""
    return next(name for name in selected if kernel_of(name) == kernel)


def kernel_of(name: str) -> str:
    """op/implementation of op/implementation/case/dtype."""
    return "/".join(name.split("/")[:2])


def initchecked(
    prefix: list[str], selected: list[str], select: str, bulk: dict[str, str], jobs: int, until: float
) -> dict[str, Any]:
    """initcheck: what the copy engine writes with results filled before, and once without, to show that it is that alone.

    All at once: the processes of those kernels come on top of the `jobs` of the others.
    """
    start = time.monotonic()
    known = sorted({kernel_of(name) for name in selected} & set(bulk))

    def joined(*words: str) -> str:
        return " and ".join([*([select] if select else []), *words])

    with ThreadPoolExecutor(1 + 2 * len(known)) as pool:
        others = pool.submit(share, prefix, joined(*(f"not {kernel}/" for kernel in known)), jobs, until)
        filled = {k: pool.submit(share, prefix, joined(f"{k}/"), 1, until, filled=True) for k in known}
        bare = {
            k: pool.submit(share, [*prefix, *SHORT], first_of(k, selected), 1, until, quiet=True)
            for k in known
        }
        parts = [others.result(), *(filled[kernel].result() for kernel in known)]
        proof = {
            kernel: {
                "why": bulk[kernel], "cases_filled": sum(len(r["done"]) for r in filled[kernel].result()),
                "errors_filled": sum(r["tool_errors"] for r in filled[kernel].result()),
                "cases_unfilled": sum(len(r["done"]) for r in bare[kernel].result()),
                "errors_unfilled": sum(r["tool_errors"] for r in bare[kernel].result()),
                "wrong_unfilled": sum(len(r["wrong"]) for r in bare[kernel].result()),
            } for kernel in known
        }  # fmt: skip
    return summed("initcheck", selected, parts, time.monotonic() - start) | {"filled_before": proof}


def versions(sanitizer: str) -> dict[str, Any]:
    import torch

    told = subprocess.run([sanitizer, "--version"], capture_output=True, text=True).stdout
    number = re.search(r"Version (\S+)", told)
    try:
        import triton
    except ImportError:
        triton_version = None
    else:
        triton_version = triton.__version__
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "torch": torch.__version__,
        "cuda": torch.version.cuda, "triton": triton_version, "sanitizer": number[1] if number else told.strip(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip


def bulk_kernels() -> dict[str, str]:
    sys.path.insert(0, str(ROOT / "tools"))
    import sanitize_cases

    return sanitize_cases.BULK


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--tool", action="append", choices=TOOLS, help="may be repeated; default: all three in turn"
    )
    parser.add_argument(
        "--select", default="", metavar="WORDS", help="only cases whose name has these words, joined by 'and'"
    )
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes at a time")
    parser.add_argument("--seconds", type=float, default=90.0, help="time of each tool")
    parser.add_argument("--out", type=Path, help="write a JSON record here")
    options = parser.parse_args(arguments)
    sanitizer = find()
    if sanitizer is None:
        print(
            "sanitize: compute-sanitizer not found. Install the CUDA toolkit or set CUDA_HOME.",
            file=sys.stderr,
        )
        return 3
    selected, bulk = names(options.select), bulk_kernels()
    if not selected:
        print("sanitize: no case was selected", file=sys.stderr)
        return 2
    body: dict[str, Any] = {
        "kind": "sanitize", "environment": versions(sanitizer), "select": options.select, "jobs": options.jobs,
        "seconds_each": options.seconds, "cases": selected, "rows": [],
    }  # fmt: skip
    for tool in ("none", *(options.tool or TOOLS)):
        start = time.monotonic()
        # Exit codes of errors: of the tool 99, of a wrong result 1.
        prefix = [] if tool == "none" else [sanitizer, "--tool", tool, "--error-exitcode", "99", "--target-processes", "application-only"]  # fmt: skip
        until = start + options.seconds
        if tool == "initcheck":
            row = initchecked(prefix, selected, options.select, bulk, options.jobs, until)
        else:
            parts = [share(prefix, options.select, options.jobs, until)]
            row = summed(tool, selected, parts, time.monotonic() - start)
        body["rows"].append(row)
        print(
            f"{tool}: {row['run']} of {row['selected']} cases, {len(row['skipped'])} skipped, {len(row['wrong'])} wrong, "
            f"{row['tool_errors']} errors of the tool, {len(row['not_run'])} not run, {row['seconds']:.0f} s"
            + (f", filled before: {row['filled_before']}" if "filled_before" in row else ""),
            flush=True,
        )
        for name, found in row["suspects"].items():
            print(
                f"  after the start of {name}: {found['errors']} errors, first {found['first']}", flush=True
            )
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    return int(not all(row["ok"] for row in body["rows"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
