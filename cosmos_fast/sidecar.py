"""The record written beside every output: what was asked, with what it was made, how long it took.

Everything here returns plain JSON data. Imports numpy alone.
"""

from __future__ import annotations

import contextlib
import json
import platform
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import datetime, timezone
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__

SIDECAR_KEYS: dict[str, str] = {
    "name": "clip name",
    "spec": "the resolved request: every field with its default filled in, absolute paths",
    "spec_hash": "hash of the request; resume compares it",
    "inputs": "SHA-256 of every media file the request names, by its key; resume compares it",
    "recipe": "precision policy",
    "plan": "device, ranks and windows; exchange: how ranks that shared tokens passed them on, or none",
    "model": "network kind (edge, vis, depth, seg, multi, edge/distilled)",
    "checkpoint": "path and size of every weight file; resume compares it",
    "text": "prompt encoder: what and which revision; resume compares it, except its mode and files",
    "made": "what made each control and mask that came without a file from the whole clip; resume compares it",
    "weights_sha256": "hash of every weight file",
    "kernels": "implementations that ran, by op",
    "versions": "cosmos_fast, python, torch, ... as in run.json",
    "seeds": "noise seed of each chunk",
    "chunks": "source frames, dropped and kept frames of each chunk",
    "stages": "per stage: seconds that the clip waited for it, peak_bytes (null on a CPU), and beside_s where threads worked on it meanwhile",
    "output": "file, bytes, sha256, and frames, width, height, fps as written",
    "files": "controls, masks and prompt saved beside it",
    "checks": "quality checks passed, with their figures",
    "notes": "what was tolerated or changed on the way: resized controls, seams, odd timestamps",
    "guardrail": "requested, run, and the reason when it did not run; what text and frames were found to be, and by which versions",
    "created": "UTC time of the record",
}
"""Every key of a sidecar and what it holds. `ClipOutputs.finish` adds hashes and `files`."""


def plain(value: Any) -> Any:
    """`value` as JSON can hold it; sizes and rates stay exact (a Fraction becomes "30000/1001")."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if isinstance(value, (Path, Fraction)):
        return str(value)
    return value.item() if isinstance(value, np.generic) else value


def environment(gpu: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Versions and platform of this process, read from package metadata; nothing heavy is imported."""
    record: dict[str, Any] = {"cosmos_fast": __version__, "python": platform.python_version()}
    packages = (
        "torch",
        "triton",
        "numpy",
        "av",
        "opencv-python-headless",
        "opencv-python",
        "safetensors",
        "transformers",
    )
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            record[package] = metadata.version(package)
    record |= {"platform": platform.platform(), "host": socket.gethostname()}
    return record | {"gpu": dict(gpu) if gpu else None}


def build_sidecar(
    *, name: str, spec: Mapping[str, Any], spec_hash: str, recipe: Any, plan: Any, model: str,
    checkpoint: Any, seeds: Sequence[int], chunks: Sequence[Any], stages: Mapping[str, Mapping[str, Any]],
    output: Mapping[str, Any], checks: Mapping[str, Any], weights_sha256: Mapping[str, str],
    kernels: Mapping[str, Sequence[str]], text: Mapping[str, Any] | None = None, notes: Sequence[str] = (),
    versions: Mapping[str, Any] | None = None, guardrail: Mapping[str, Any] | None = None,
    made: Mapping[str, str] | None = None, inputs: Mapping[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The record of one finished clip, with exactly the keys of SIDECAR_KEYS; dataclasses become dicts.

    output: frames, width, height, fps. stages: {"encode": {"seconds": 1.2, "peak_bytes": None}, ...}.
    Raises ValueError for anything JSON cannot hold, NaN included, and for missing output keys.
    """
    if missing := [key for key in ("frames", "width", "height", "fps") if key not in output]:
        raise ValueError(f"sidecar: output must tell {', '.join(missing)}, got {sorted(output)}.")
    none = {"requested": False, "run": False, "reason": "not told by the caller"}
    record = {
        "name": name, "spec": spec, "spec_hash": spec_hash, "inputs": inputs or {}, "recipe": recipe, "plan": plan,
        "model": model, "checkpoint": checkpoint, "text": text, "made": made or {}, "weights_sha256": weights_sha256, "kernels": kernels, "versions": versions or environment(), "seeds": seeds, "chunks": chunks,
        "stages": stages, "output": output, "files": {}, "checks": checks, "notes": notes,
        "guardrail": guardrail or none,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip
    return dict(json.loads(json.dumps(plain(record), allow_nan=False)))
