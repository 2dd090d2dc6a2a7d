"""Time the ways to compute linear_gelu on this GPU: torch's GEMM alone, with our GELU after it, and every fused choice.

    python tools/tune_linear_gelu.py out.json [--seconds 1.0] [--tokens 84480]

Each choice is checked against the reference on rows from the start, the middle and the end, then runs for the given
seconds without a break, so that the clock is the one that the power limit allows. A version through CUTLASS 4 was measured
beside these and lost by 12 % at best; it is in the history (839da87) and in the record.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from watch import Watch  # noqa: E402

from cosmos_fast import testing  # noqa: E402

D, M = 2048, 8192
ROWS = 512
Call = Callable[[Tensor, Tensor], Tensor]


def triton_choices() -> dict[str, Call]:
    from cosmos_fast.kernels.linear_gelu import Tiles, linear_gelu

    found: dict[str, Call] = {}
    for tiles in (
        Tiles(128, 256, 64, 8, 3),
        Tiles(128, 256, 64, 8, 4),
        Tiles(128, 256, 64, 8, 3, parts=4),
        Tiles(128, 256, 64, 8, 4, parts=4, group=16),
        Tiles(128, 256, 64, 8, 3, flatten=False),
        Tiles(256, 128, 64, 8, 4),
        Tiles(128, 128, 64, 4, 3, programs=264),
    ):
        cut = "" if tiles.flatten else " by tile"
        most = "" if tiles.programs is None else f" {tiles.programs} programs"
        name = f"triton {tiles.l}x{tiles.m}x{tiles.d} {tiles.stages} stages group {tiles.group} parts {tiles.parts}{cut}{most}"
        found[name] = lambda x, w, t=tiles: linear_gelu(x, w, tiles=t)
    return found


def wrong(call: Call, x: Tensor, w: Tensor) -> str | None:
    """What is wrong with the call on sampled rows, or None."""
    L = x.shape[0]
    out = call(x, w)
    starts = sorted({0, max(L // 2 - ROWS // 2, 0), max(L - ROWS, 0)})
    for start in starts:
        part = slice(start, start + ROWS)
        if faults := testing.faults("linear_gelu", out[part].contiguous(), (x[part], w)):
            return f"rows from {start}: {faults[0]}"
    return None


def timed(call: Call, x: Tensor, w: Tensor, seconds: float, watch: Watch, name: str) -> dict[str, Any]:
    """Median over batches of 20 launches that follow each other without a gap."""
    call(x, w)
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True)]
    with watch(name):
        begin = time.perf_counter()
        marks[0].record()
        while time.perf_counter() - begin < seconds or len(marks) < 4:
            for _ in range(20):
                call(x, w)
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
            if len(marks) > 2:
                marks[-2].synchronize()  # one batch is queued while the one before runs
        torch.cuda.synchronize()
    batches = [a.elapsed_time(b) / 20 for a, b in zip(marks, marks[1:])]
    settled = batches[len(batches) // 3 :]
    ms = median(settled)
    flop = 2 * x.shape[0] * x.shape[1] * w.shape[0]
    return {
        "name": name,
        "ms": ms,
        "tflop_s": flop / ms / 1e9,
        "first_ms": batches[0],
        "gpu": watch.summary(name),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each choice")
    parser.add_argument("--tokens", type=int, default=84480)
    parser.add_argument("--only", default="", help="choices whose name contains this")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error(f"needs a CUDA device, torch {torch.__version__} sees none.")
    testing.kernels_from_checkout()
    import triton
    from cosmos_fast.kernels.gelu import gelu

    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(options.tokens, D, generator=generator, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(M, D, generator=generator, device="cuda", dtype=torch.bfloat16) * (2 * D**-0.5)
    choices: dict[str, Call] = {
        "torch matmul alone": F.linear,
        "torch matmul, our gelu": lambda x, w: gelu(F.linear(x, w)),
    }
    choices |= triton_choices()
    rows, watch, start = [], Watch(), time.perf_counter()
    for name, call in choices.items():
        if options.only not in name:
            continue
        try:
            fault = None if name == "torch matmul alone" else wrong(call, x, w)
            row = {"name": name, "fault": fault} if fault else timed(call, x, w, options.seconds, watch, name)
        except Exception as error:  # a choice this GPU cannot run must not end the comparison
            row = {"name": name, "fault": f"{type(error).__name__}: {str(error)[:300]}"}
        rows.append(row)
        told = row["fault"] if "fault" in row else f"{row['ms']:7.3f} ms {row['tflop_s']:6.0f} TFLOP/s"
        clock = row.get("gpu", {}).get("sm_mhz", {}).get("median", 0)
        print(f"{name:58s} {told}  {clock:.0f} MHz", flush=True)
    watch.close()
    body = {
        "kind": "linear_gelu", "shape": {"L": options.tokens, "D": D, "M": M}, "seconds_each": options.seconds,
        "environment": {
            "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
            "triton": triton.__version__, "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
        "seconds": time.perf_counter() - start, "rows": rows,
    }  # fmt: skip
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    good = sorted((row for row in rows if "ms" in row), key=lambda row: row["ms"])
    print(*(f"{row['ms']:7.3f} ms  {row['name']}" for row in good[:6]), sep="\n")
    return int(any("fault" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
