"""What this machine can do, for `cosmos-fast info` and for the record beside every batch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import av
import torch

from . import _native, dispatch
from . import ops as ops  # fills the table that `explain` reads
from . import ops_attention8 as ops_attention8
from .sidecar import environment
from .video import CODECS


def gpu_record(device: torch.device) -> dict[str, Any] | None:
    """Name, memory and capability of a CUDA device; None for a CPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda,
    }  # fmt: skip


def _hub() -> dict[str, str]:
    """Where downloads lie, how much room is left there, and whether somebody is logged in; never the token itself."""
    from huggingface_hub import constants, get_token

    cache = Path(constants.HF_HUB_CACHE)
    there = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    return {
        "cache": f"{cache} ({shutil.disk_usage(there).free / 2**30:.0f} GiB free)",
        "hub token": "found" if get_token() else "none; for gated weights: hf auth login",
    }


def machine(wanted: str | None = None) -> dict[str, Any]:
    """Everything `cosmos-fast info` prints, JSON-ready."""
    device = dispatch.pick_device(wanted)
    dtypes = (torch.bfloat16, torch.float32)
    return {
        **environment(gpu_record(device)),
        "device": str(device),
        "extension": _native.build_info(),
        "codecs": [name for name in CODECS if name in av.codecs_available],
        **_hub(),
        "ops": {
            str(dtype).removeprefix("torch."): [
                {"op": name, "chosen": chosen, "others": others}
                for name, chosen, others in dispatch.explain(device, dtype)
            ]
            for dtype in dtypes
        },
    }
