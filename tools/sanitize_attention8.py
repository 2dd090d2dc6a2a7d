"""Rungs of the 8-bit attention kernel under compute-sanitizer: memcheck, synccheck and racecheck at once, within a minute.

    python tools/sanitize_attention8.py --rungs three,three_sparse --seconds 55 [--out record.json]

For rungs that tools/bench_attention8.py built, whether the package holds them or not. Operands are made on the CPU and
copied over, so that on the GPU nothing runs but the kernel; results are compared with fp64. Of racecheck the record has
every report: it may take correct uses of the copy engine and of mbarriers for hazards, and then says where.

Exits 1 if a result is wrong, a tool found something or did not end, 3 without compute-sanitizer.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from attention8_rungs import ROOT, RUNGS, caller, library  # noqa: E402

TOOLS = ("none", "memcheck", "synccheck", "racecheck")
SIZES = ((193, 97, 1), (65, 400, 2))
SUMMARY = re.compile(
    r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warning"
)


def checked(name: str, folder: Path) -> list[str]:
    """What is wrong with a rung's results at SIZES."""
    import torch

    sys.path.insert(0, str(ROOT))
    from attention8_proof import Version, codes_of, compared, results, tile_lists

    from cosmos_fast.ops_attention8 import Codes

    rung = next(rung for rung in RUNGS if rung.name == name)
    version, faults = Version(rung, caller(rung, folder)), []
    for L, S, N in SIZES:
        c = codes_of(L, S, N)
        there = Codes(*(getattr(c, f).cuda() for f in c.__dataclass_fields__))
        tiles, counts, flags = tile_lists(L, S, N, rung, 0.6, False)
        keep = flags.repeat_interleave(rung.queries, 1)[:, :L].repeat_interleave(rung.keys, 2)[..., :S]
        room = tuple(x.cuda() for x in results(c))
        version.launch(there, *room, *((tiles.cuda(), counts.cuda()) if rung.sparse else ()))
        torch.cuda.synchronize()
        got = tuple(x.cpu() for x in room)
        told = compared(c, got, torch.arange(L), keep if rung.sparse else None)
        if not told.pop("ok"):
            faults.append(f"{name} {L} x {S}: {told}")
    return faults


def read(output: str, tool: str) -> dict[str, Any]:
    """What one process under a tool found."""
    counts = [int(n) for found in SUMMARY.findall(output) for n in found if n]
    reports = [line.removeprefix("========= ") for line in output.splitlines() if re.match(r"========= (Error|Warning|Invalid|Barrier|Race|Program|Uninit)", line)]  # fmt: skip
    ran = re.search(r"^checked (\[.*\])$", output, re.MULTILINE)
    return {
        "tool": tool, "found": sum(counts), "reports": sorted(set(reports))[:20],
        "wrong": json.loads(ran[1]) if ran else ["did not end"], "whole": bool(ran) and (tool == "none" or bool(counts)),
    }  # fmt: skip


def under(tool: str, names: list[str], folder: Path, sanitizer: str, until: float) -> dict[str, Any]:
    prefix = [] if tool == "none" else [sanitizer, "--tool", tool, "--print-limit", "20", "--kernel-regex", "kns=attention8"]  # fmt: skip
    command = [*prefix, sys.executable, __file__, "--child", "--rungs", ",".join(names), "--folder", str(folder)]  # fmt: skip
    begin = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(until - begin, 1))
        output = done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        output = str(error.stdout or "")
    row = read(output, tool) | {"seconds": round(time.monotonic() - begin, 1)}
    return row | {"tail": "" if row["whole"] else output[-600:]}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rungs", default="three,three_sparse")
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--seconds", type=float, default=55.0, help="of all tools, which run at once")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/attention8")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    names = options.rungs.split(",")
    known = {rung.name: rung for rung in RUNGS}
    if missing := [n for n in names if n not in known or not library(known[n], options.folder).exists()]:
        parser.error(f"--rungs: must be built, got {missing}. Run tools/bench_attention8.py --build --only {','.join(missing)}.")  # fmt: skip
    if options.child:
        import attention8_proof

        attention8_proof.DEVICE = "cpu"
        faults = [fault for name in names for fault in checked(name, options.folder)]
        print(f"checked {json.dumps(faults)}", flush=True)
        return int(bool(faults))
    import sanitize

    if (sanitizer := sanitize.find()) is None:
        print(
            "sanitize: compute-sanitizer not found. Install the CUDA toolkit or set CUDA_HOME.",
            file=sys.stderr,
        )
        return 3
    until = time.monotonic() + options.seconds
    tools = options.tools.split(",")
    with ThreadPoolExecutor(len(tools)) as pool:
        rows = list(pool.map(lambda tool: under(tool, names, options.folder, sanitizer, until), tools))
    for row in rows:
        print(json.dumps(row), flush=True)
    if options.out:
        body = {"kind": "sanitize_attention8", "environment": sanitize.versions(sanitizer), "rungs": names, "rows": rows}  # fmt: skip
        options.out.write_text(json.dumps(body, indent=1) + "\n")
    return int(any(row["found"] or row["wrong"] or not row["whole"] for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
