"""Table and figures of whole jobs, run or added up from measured calls, and of the first call of a process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

HEAD = ["denoising one clip, 93 frames, 720p", "calls", "s", "of it prepare", "peak GiB"]


def rows(part: dict[str, Any], peers: Mapping[str, str], num: Callable[..., str]) -> list[list[str]]:
    """Of the `job` or the `composed_job` of a denoiser record."""
    if not part.get("composed"):
        cells = num(part["seconds"], 1), num(part["prepare_s"], 2), num(part.get("peak_gib"), 1)
        return [[f"{part['steps']} steps, uninterrupted", str(part["calls"]), *cells]]
    return [
        [
            f"{peers.get(name, name)}, {part['steps']} steps, added up from measured calls", str(part["calls"]),
            num(row["denoise_s"], 1), num(row["prepare_s"], 2), num(None),
        ]
        for name, row in part["rows"].items()
    ]  # fmt: skip


def figures(key: str, part: dict[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(name, seconds, peers) of `composed_job` or of `first`."""
    if key == "first":
        for name, one in part.items():
            yield f"first_call_s.{name}", one["first_call"], {}
            yield f"capture_s.{name}", one["capture"], {}
        return
    whole = {name: row["seconds"] for name, row in part["rows"].items() if "seconds" in row}
    yield "job_added_up_s.exact", whole.pop("ours", None), whole
