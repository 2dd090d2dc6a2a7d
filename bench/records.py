"""Where a measured record goes, and what its numbers depend on. For the benchmarks here and those of tools/."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import time
import traceback
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def _tell(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def environment(commit: str | None) -> dict[str, Any]:
    """What a number depends on: GPU and its limits, versions, commit, date. `commit` serves copies without git."""
    fields = "driver_version,power.limit,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu"
    smi = _tell("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader") or ""
    head = _tell("git", "rev-parse", "HEAD")
    status = _tell("git", "status", "--porcelain", "--untracked-files=no") if head else None
    try:
        import triton
    except ImportError:
        triton = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "gpu": gpu,
        "gpus": torch.cuda.device_count(),
        "nvidia_smi": dict(zip(fields.split(","), smi.splitlines()[0].split(", "))) if smi else None,
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": getattr(triton, "__version__", None),
        "commit": head or commit,
        "dirty": bool(status) if status is not None else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def destination(out: Path, environment: dict[str, Any], stem: str) -> Path:
    """The file itself, or in a folder the place that tools/report.py reads: <gpu>/<date>-<commit>-<stem>.json."""
    if out.suffix != ".json":
        gpu = re.sub(r"[^a-z0-9]+", "-", str(environment["gpu"] or "cpu").lower()).strip("-")
        commit = (environment["commit"] or "nocommit")[:8]
        out = out / gpu / f"{environment['date'][:10]}-{commit}-{stem}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def attempted(run: Callable[[], Any]) -> dict[str, Any]:
    """Run a part of a bench: its status, seconds, and the error where it failed, which must not lose the other parts."""
    start, entry = time.perf_counter(), {"status": "ok", "seconds": 0.0}
    try:
        with torch.no_grad():
            run()
    except Exception as error:
        entry |= {"status": "failed", "error": f"{type(error).__name__}: {error}"[:2000]}
        traceback.print_exc()
    return entry | {"seconds": time.perf_counter() - start}


def skipped(deadline_s: float) -> dict[str, Any]:
    """The status of a part that was not begun."""
    return {"status": "skipped", "error": f"past the deadline of {deadline_s:.0f} s", "seconds": 0.0}
