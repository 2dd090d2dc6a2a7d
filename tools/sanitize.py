"""GPU tests at small sizes under compute-sanitizer: `make sanitize`, or a part of them within a time:

    python tools/sanitize.py --tool memcheck --seconds 60 --out record.json
    python tools/sanitize.py --tool memcheck --tool initcheck --select adaln --part 2/4

Runs memcheck, synccheck and initcheck, unless --tool names fewer; racecheck is left out, because it reports correct uses
of the bulk copy engine. The tests are those marked gpu without production shapes, which take hours under the tools. --part I/N
takes every N-th of them; --seconds ends what still runs when the time is up, and the record says how many did not run.
Exits 1 if a test failed or a tool found an error, 2 if no test was selected, 3 without compute-sanitizer.
"""

from __future__ import annotations

import argparse
import json
import math
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
TOOLS = ("memcheck", "synccheck", "initcheck")
MARKS = "gpu and not slow"
SMALL = "not 84480 and not production and not beyond_31_bits and not current_stream and not captured and not without_a_break"
"""Left out besides big shapes: what is about streams, graphs (they need the caching allocator) or torch.compile, not memory."""

FILES = ("tests/test_kernels_parity.py", "tests/test_native_norm_rope.py", "tests/test_build.py")
"""Every Triton kernel and every CUDA one; the other GPU tests run the same kernels inside networks."""

BATCH = 40
"""Tests of one process, which takes seconds to start under a tool."""


def find() -> str | None:
    beside = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "compute-sanitizer")
    return shutil.which("compute-sanitizer") or (str(beside) if beside.exists() else None)


def pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]


def selected(select: str, part: tuple[int, int]) -> list[str]:
    """Ids of the tests to run, in an order that meets every op early: by turns from every file."""
    wanted = f"({SMALL}) and ({select})" if select else SMALL
    done = subprocess.run(
        pytest("-q", "--collect-only", "-m", MARKS, "-k", wanted, *FILES),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode not in (0, 5):
        raise SystemExit(
            f"sanitize: the tests could not be collected.\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    found = [line for line in done.stdout.splitlines() if "::" in line]
    queues = [[name for name in found if name.startswith(file)] for file in FILES]
    mixed = [name for turn in range(len(found)) for queue in queues for name in queue[turn : turn + 1]]
    index, count = part
    return mixed[index - 1 :: count]


def counts(output: str) -> dict[str, int]:
    """Numbers of pytest's last line and of the tool's summary in one process's output."""
    last = next((line for line in reversed(output.splitlines()) if re.search(r"\bin [\d.]+s", line)), "")
    found = {
        word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", last)
    }
    summaries = re.findall(r"ERROR SUMMARY: (\d+) error", output)
    tests = ("passed", "failed", "skipped")
    return {name: found.get(name, 0) for name in tests} | {
        "test_errors": found.get("error", 0) + found.get("errors", 0),
        "tool_errors": sum(map(int, summaries)),
        "summaries": len(summaries),
    }


def check(sanitizer: str, tool: str, tests: list[str], until: float, jobs: int) -> dict[str, Any]:
    """Run one tool over batches of the tests, `jobs` at a time, until the time is up."""
    # A caching allocator hides writes from one tensor into the next.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sanitizer, "--tool", tool, "--error-exitcode", "99", "--target-processes", "all"]

    def run(batch: list[str]) -> tuple[int, str] | None:
        """Exit status and output; None if the time was up."""
        limit = None if math.isinf(until) else until - time.monotonic()
        if limit is not None and limit <= 0:
            return None
        child = subprocess.Popen(
            [*command, *pytest("-q", "-rf", *batch)], cwd=ROOT, env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = child.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # the tool and the tests under it
            child.communicate()
            return None
        return child.returncode, output

    # By turns, so that what is slow to compile spreads over the batches.
    batches = [tests[first :: -(-len(tests) // BATCH)] for first in range(-(-len(tests) // BATCH))]
    row: dict[str, Any] = {"tool": tool, "selected": len(tests), "run": 0, "failures": []}
    start = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        ended = list(pool.map(run, batches))
    for batch, done in zip(batches, ended):
        if done is None:
            continue
        status, output = done
        found = counts(output)
        for name, number in found.items():
            row[name] = row.get(name, 0) + number
        row["run"] += len(batch)
        if status != 0 or found["tool_errors"] or not found["summaries"]:
            row["failures"].append({"exit": status, "first": batch[0], "output": output[-4000:]})
            print(output[-4000:], flush=True)
    row["seconds"] = time.monotonic() - start
    row["ok"] = not row["failures"] and row["run"] > 0
    return row


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


def part_of(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"must be I/N with 1 <= I <= N, got {text!r}")
    return int(match[1]), int(match[2])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--tool", action="append", choices=TOOLS, help="may be repeated; default: all three in turn"
    )
    parser.add_argument("--select", default="", metavar="K", help="only tests that match, as pytest -k")
    parser.add_argument(
        "--part", type=part_of, default=(1, 1), metavar="I/N", help="every N-th test, from the I-th"
    )
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes at a time")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="time for all tools together")
    parser.add_argument("--out", type=Path, help="write a JSON record here")
    options = parser.parse_args(arguments)
    sanitizer = find()
    if sanitizer is None:
        print(
            "sanitize: compute-sanitizer not found. Install the CUDA toolkit or set CUDA_HOME.",
            file=sys.stderr,
        )
        return 3
    start, tools = time.monotonic(), options.tool or list(TOOLS)
    tests = selected(options.select, options.part)
    if not tests:
        print("sanitize: no gpu test was selected", file=sys.stderr)
        return 2
    body: dict[str, Any] = {
        "kind": "sanitize", "environment": versions(sanitizer), "marks": MARKS, "left_out": SMALL,
        "select": options.select, "jobs": options.jobs, "part": "{}/{}".format(*options.part), "tests": tests, "rows": [],
    }  # fmt: skip
    for place, tool in enumerate(tools, 1):
        row = check(sanitizer, tool, tests, start + options.seconds * place / len(tools), options.jobs)
        body["rows"].append(row)
        print(
            f"{tool}: {row['run']} of {row['selected']} tests, {row.get('passed', 0)} passed, {row.get('skipped', 0)} skipped, "
            f"{row.get('failed', 0)} failed, {row.get('tool_errors', 0)} errors of the tool, {row['seconds']:.0f} s",
            flush=True,
        )
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    return int(not all(row["ok"] for row in body["rows"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
