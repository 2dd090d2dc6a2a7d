"""What several GPUs gain over one, from a record of bench_scaling.py. Standard library only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

LOOPS = {
    "one": "base, a step, 1 GPU", "cfg2": "base, a step, 2 GPUs, cfg=2", "context2": "base, a step, 2 GPUs, context=2",
    "collectives2": "the same, exchange by collectives", "fp8_one": "base, a step, 1 GPU, recipe fp8",
    "fp8_context2": "base, a step, 2 GPUs, context=2, recipe fp8",
}  # fmt: skip
CLIPS = {
    "one": "distilled clip to its frames, 1 GPU",
    "context2": "distilled clip to its frames, 2 GPUs, context=2",
}
ALONE = {"cfg2": "one", "context2": "one", "collectives2": "one", "fp8_context2": "fp8_one"}
"""Loops of two GPUs, and that of one which they are compared with."""
HEAD = ["random weights, 93 frames, 720p", "s", "speed over 1 GPU", "% of ideal", "GB sent by a GPU", "ms of exchange hidden",
        "exposed", "SM MHz"]  # fmt: skip


def gains(record: dict[str, Any]) -> dict[str, float]:
    """Seconds of one GPU over those of two: each loop of a step, distilled2 of a clip."""
    loops, clips, found = record.get("loops", {}), record.get("distilled", {}), {}
    for name, alone in ALONE.items():
        if {alone, name} <= set(loops):
            found[name] = loops[alone]["step_s"] / loops[name]["step_s"]
    if {"one", "context2"} <= set(clips):
        found["distilled2"] = clips["one"]["seconds"] / clips["context2"]["seconds"]
    return found


def rows(record: dict[str, Any]) -> list[list[str]]:
    """Rows under HEAD: steps of the base model, then clips of the distilled one."""
    gain, hidden, clips = gains(record), record.get("overlap", {}), record.get("distilled", {})
    steps = [
        _row(title, row["step_s"], gain.get(name), row, hidden.get(name, {}))
        for name, title in LOOPS.items()
        if (row := record["loops"].get(name)) is not None
    ]
    of = {"context2": gain.get("distilled2")}
    return steps + [
        _row(title, clips[name]["seconds"], of.get(name), clips[name], {})
        for name, title in CLIPS.items()
        if name in clips
    ]


def _row(
    title: str, seconds: float, gain: float | None, row: dict[str, Any], hidden: dict[str, float]
) -> list[str]:
    sent, of = row.get("sent_bytes_per_step"), ("hidden_ms", "exposed_ms")
    clocks = [f"{gpu['sm_mhz']['median']:.0f}" for gpu in row.get("gpus", []) if "sm_mhz" in gpu]
    return [
        title, f"{seconds:.3f}", f"{gain:.2f}" if gain else "–", f"{50 * gain:.0f}" if gain else "–",
        f"{sent / 1e9:.2f}" if sent else "–", *(f"{hidden[key]:.1f}" if key in hidden else "–" for key in of),
        ", ".join(clocks) or "–",
    ]  # fmt: skip


def shown(results: Any, table: Callable[..., str], note: Callable[..., str]) -> str | None:
    """The table of the newest record, two GPUs against one of the same run; None without one."""
    if (found := results.own("loops", "scaling")) is None:
        return None
    return f"{table(HEAD, rows(found[1]))}\n\n{note(found[0], found[1])}"
