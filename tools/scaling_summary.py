"""What bench_scaling.py prints of its record behind every section, and how the GPUs it ran on are linked."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import torch
from report_scaling import gains

GOALS = {"cfg2": 1.92, "context2": 1.90, "distilled2": 1.85}


def links(device: torch.device) -> dict[str, Any]:
    """How the GPUs are linked, as far as the driver tells."""
    if device.type != "cuda":
        return {}
    command = shutil.which("nvidia-smi")
    done = command and subprocess.run([command, "topo", "-m"], capture_output=True, text=True, timeout=20)
    return {
        "peer_access": torch.cuda.can_device_access_peer(0, 1), "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "topology": done.stdout.splitlines()[:4] if done else None,
    }  # fmt: skip


def summary(record: dict[str, Any], section: str) -> str:
    lines = []
    if section in ("link", "copies"):
        lines += [
            f"  {name}: {row['ms']:.3f} ms, {row['gb_s']:.0f} GB/s"
            for name, row in record.get(section, {"rows": {}})["rows"].items()
        ]
        lines += [f"  {record['no_copies']}"] if section == "copies" and "no_copies" in record else []
    if section == "exchange":
        lines += [f"  {name}: {row}" for name, row in record["exchange"].items()]
    if section in ("loops", "distilled"):
        for name, row in record["loops"].items():
            mhz = [gpu.get("sm_mhz", {}).get("median", 0) for gpu in row.get("gpus", [])]
            sent = row.get("sent_bytes_per_step", 0) / 1e9
            lines.append(f"  {name:<20} {row['step_s']:8.4f} s/step, sent {sent:.2f} GB, MHz {mhz}")
        lines.append(f"  equal {record.get('equal')}")
    if section == "trace":
        lines += [f"  {name}: {row}" for name, row in record["overlap"].items()]
    if section == "distilled":
        lines += [
            f"  {name}: {row['seconds']:.2f} s {row.get('stages')} beside {row.get('beside_s')}, copies {row['copies']}"
            for name, row in record["distilled"].items()
        ]
        lines.append(f"  codes that differ: {record.get('distilled_codes_off')}")
    lines += [f"  {name} {gain:.3f} x, goal {GOALS.get(name, '-')}" for name, gain in gains(record).items()]
    return "\n".join(lines)
