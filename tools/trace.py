"""Where the time of one denoiser step goes: every kernel, its class, calls and ms.

    python tools/trace.py [--grid 24,88,160] [--pair] [--out FILE.json] [--smoke]

The share that is neither attention nor matrix products counts everything in the span from the first kernel to the last,
gaps between kernels included.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT)]

# First match wins. Inductor names a fused kernel after every op around it, attention too; attention kernels are built
# of the same parts as GEMMs and say so in their names.
CLASSES = (
    ("pointwise", r"^triton_(poi|red|per|for)_"),
    # What follows the product, GELU or a norm, is part of it; the two cannot be told apart.
    ("gemm", r"^_linear_\w+_kernel"),
    ("attention", r"flash|fmha|sdpa|attention|attn"),
    ("gemm", r"gemm|nvjet|cutlass|cublas|xmma|splitk|gemv|triton_tem|(?<![a-z])mm(?![a-z])|_mma_|wgmma|::linear$|matmul|einsum"),
    ("copy", r"^mem(cpy|set)|aten::(copy_|clone|contiguous|cat)$"),
)  # fmt: skip
KINDS = ("attention", "gemm", "pointwise", "copy")
DEVICE_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Row:
    """All calls of one kernel."""

    name: str
    kind: str
    calls: int
    ms: float


@dataclass(frozen=True)
class Trace:
    """Kernels by time, ms by class, and the span from the first kernel's start to the last one's end."""

    rows: list[Row]
    span_ms: float

    @property
    def classes(self) -> dict[str, float]:
        return {kind: sum(r.ms for r in self.rows if r.kind == kind) for kind in KINDS}

    @property
    def other_share(self) -> float:
        """Share of the span that is neither attention nor GEMM."""
        busy = self.classes
        return 1 - (busy["attention"] + busy["gemm"]) / self.span_ms

    def as_dict(self) -> dict[str, Any]:
        idle = self.span_ms - sum(self.classes.values())
        return {
            "span_ms": self.span_ms, "classes_ms": self.classes, "idle_ms": idle, "other_share": self.other_share,
            "kernels": [asdict(r) for r in self.rows],
        }  # fmt: skip

    def table(self, limit: int = 25) -> str:
        lines = [
            f"{kind:<10}{ms:>10.2f} ms {100 * ms / self.span_ms:6.2f} %" for kind, ms in self.classes.items()
        ]
        lines.append(
            f"{'span':<10}{self.span_ms:>10.2f} ms, not attention or GEMM {100 * self.other_share:.2f} %"
        )
        for r in self.rows[:limit]:
            lines.append(
                f"{r.ms:10.3f} ms {100 * r.ms / self.span_ms:6.2f} % {r.calls:5d}x {r.kind:<10}{r.name[:80]}"
            )
        return "\n".join(lines)


def kind_of(kernel: str) -> str:
    """Class of a kernel by its name."""
    found = (kind for kind, pattern in CLASSES if re.search(pattern, kernel, re.IGNORECASE))
    return next(found, "pointwise")


def from_events(events: list[dict[str, Any]]) -> Trace:
    """From the `traceEvents` of a Chrome trace: only what ran on the device, annotations left out."""
    ran = [e for e in events if e.get("ph") == "X" and e.get("cat") in DEVICE_EVENTS]
    if not ran:
        raise RuntimeError("trace: no kernel was recorded. The profiler needs CUPTI and a GPU.")
    found: dict[str, list[float]] = {}
    for event in ran:
        found.setdefault(event["name"], []).append(event["dur"] / 1e3)
    span = max(e["ts"] + e["dur"] for e in ran) - min(e["ts"] for e in ran)
    rows = [Row(name, kind_of(name), len(times), sum(times)) for name, times in found.items()]
    return Trace(sorted(rows, key=lambda r: -r.ms), span / 1e3)


def trace(call: Callable[[], object], device: torch.device) -> Trace:
    """Trace one call, after one that warms up. On a CPU the rows are torch ops, by their own time."""
    call()
    if device.type == "cpu":
        with profile(activities=[ProfilerActivity.CPU]) as done:
            call()
        ops = [e for e in done.key_averages() if e.self_cpu_time_total > 0]
        rows = [Row(e.key, kind_of(e.key), e.count, e.self_cpu_time_total / 1e3) for e in ops]
        return Trace(sorted(rows, key=lambda r: -r.ms), sum(r.ms for r in rows))
    torch.cuda.synchronize()
    with profile(
        activities=[ProfilerActivity.CUDA]
    ):  # the first profile of a process pays for starting CUPTI
        torch.ones(1, device=device)
        torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as done:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        done.export_chrome_trace(str(path))
        return from_events(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Kernel table of one denoiser step, on random weights.")
    parser.add_argument("--grid", default="24,88,160", help="T,H,W of the latent")
    parser.add_argument("--pair", action="store_true", help="both prompts instead of one")
    parser.add_argument("--out", type=Path, help="also write JSON here")
    parser.add_argument("--smoke", action="store_true", help="tiny network on the CPU")
    args = parser.parse_args(argv)
    import published

    from cosmos_fast import testing
    from cosmos_fast.config import NetworkConfig
    from cosmos_fast.dispatch import pick_device

    testing.kernels_from_checkout()
    device = pick_device("cpu" if args.smoke else "cuda")
    config = NetworkConfig.tiny() if args.smoke else NetworkConfig.single()
    T, H, W = (3, 8, 12) if args.smoke else map(int, args.grid.split(","))
    with torch.no_grad():
        network = published.build(config, published.random_state(config, 0, device), device, torch.bfloat16)
        given = published.inputs(config, (T, H, W), device, torch.bfloat16)
        single, pair = published.bind(network, given)
        bound = pair if args.pair else single
        found = trace(lambda: bound(given.z[None], 0), device)
    print(found.table())
    if args.out is not None:
        args.out.write_text(json.dumps(found.as_dict(), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
