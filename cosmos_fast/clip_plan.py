"""What `planning` decides: one `ClipPlan` per clip, printed together as a `BatchPlan`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from . import costs
from .chunking import Chunk
from .spec import Spec
from .video import Probe

_FILES = ("video_path", "image_context_path", "guided_generation_mask")


@dataclass(frozen=True)
class ClipPlan:
    """All that is decided about one clip. Sizes are (width, height) in pixels.

    frames: of the finished clip. output_size: of the result alone; `tiles` pictures of that size stand to its
    left. guided: (frames, width, height) of the guided mask. tflop: per stage, plus "total".
    memory: estimated peak bytes per stage, see costs.MEMORY_FORMULA. seconds: None without rates.
    made: what made each control and mask that `makers` added, by its key in the request.
    """

    name: str
    spec: Spec
    model: str
    steps: int
    source: Probe
    controls: Mapping[str, Probe | None]
    masks: Mapping[str, Probe]
    guided: tuple[int, int, int] | None
    style: Probe | int | None
    frames: int
    fps: Fraction
    model_size: tuple[int, int]
    output_size: tuple[int, int]
    tiles: int
    chunk_frames: int
    chunks: tuple[Chunk, ...]
    tokens: int
    network_calls: int
    tflop: Mapping[str, float]
    memory: Mapping[str, int]
    seconds: float | None
    notes: tuple[str, ...] = ()
    made: Mapping[str, str] = field(default_factory=dict)

    @property
    def peak(self) -> tuple[str, int]:
        """(stage, estimated bytes) where the clip needs most memory."""
        return max(((s, b) for s, b in self.memory.items() if s != "weights"), key=lambda item: item[1])

    @property
    def inputs(self) -> dict[str, Path]:
        """Every media file the request names, by its key: "video_path", "edge.mask_path", ..."""
        named = {key: getattr(self.spec, key) for key in _FILES}
        for name, control in self.spec.controls.items():
            named |= {f"{name}.control_path": control.control_path, f"{name}.mask_path": control.mask_path}
        return {key: path for key, path in named.items() if path is not None}

    @property
    def masks_in_words(self) -> dict[str, str]:
        """Masks asked for in words that no maker has looked for yet: the words, by control."""
        return {
            name: control.mask_prompt
            for name, control in self.spec.controls.items()
            if control.mask_prompt is not None and control.mask_path is None
            if name not in self.masks and f"{name}.mask_prompt" not in self.made
        }

    @property
    def prompts(self) -> dict[str, str]:
        """What the network reads, by spec key; the negative prompt counts where there is guidance."""
        has_negative = self.network_calls > self.steps * len(self.chunks)
        return {k: getattr(self.spec, k) for k in ("prompt", "negative_prompt")[: 1 + has_negative]}

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name, "spec_hash": self.spec.hash(), "model": self.model, "steps": self.steps,
            "frames": self.frames, "fps": str(self.fps), "source": str(self.source.path),
            "source_size": self.source.size, "model_size": self.model_size, "output_size": self.output_size,
            "tiles": self.tiles,
            "controls": {key: str(file.path) if file else None for key, file in self.controls.items()},
            "chunk_frames": self.chunk_frames, "chunks": [(c.start, c.stop) for c in self.chunks],
            "tokens": self.tokens, "network_calls": self.network_calls, "tflop": dict(self.tflop),
            "memory_estimate_bytes": dict(self.memory), "seconds_estimate": self.seconds,
            "notes": list(self.notes),
        }  # fmt: skip


@dataclass(frozen=True)
class BatchPlan:
    """Plans of the clips that can run, and every problem of those that cannot (empty unless asked for)."""

    clips: tuple[ClipPlan, ...]
    problems: tuple[str, ...] = ()
    rates_source: str | None = None

    def as_dict(self) -> dict[str, Any]:
        seconds = [c.seconds for c in self.clips]
        return {
            "clips": [c.as_dict() for c in self.clips],
            "total": {
                "clips": len(self.clips),
                "frames": sum(c.frames for c in self.clips),
                "network_calls": sum(c.network_calls for c in self.clips),
                "tflop": sum(c.tflop["total"] for c in self.clips),
                "memory_estimate_bytes": max((c.peak[1] for c in self.clips), default=0),
                "seconds_estimate": None if None in seconds else sum(s or 0 for s in seconds),
            },
            "memory_formula": costs.MEMORY_FORMULA,
            "rates": self.rates_source,
            "problems": list(self.problems),
        }

    def as_json(self) -> str:
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False)

    def as_table(self) -> str:
        """The plan as text: one row per clip, the total, every note, every problem."""
        head = (
            "clip",
            "model",
            "frames",
            "fps",
            "source > model > output",
            "chunks",
            "tokens",
            "steps",
            "calls",
        )
        rows = [(*head, "PFLOP", "memory*", "time")]
        for c in self.clips:
            sizes = " > ".join(f"{w}x{h}" for w, h in (c.source.size, c.model_size, c.output_size))
            rows.append(
                (
                    c.name, c.model, f"{c.frames}", f"{float(c.fps):g}",
                    sizes + (f" +{c.tiles} tiles" if c.tiles else ""), f"{len(c.chunks)} x {c.chunk_frames}",
                    f"{c.tokens}", f"{c.steps}", f"{c.network_calls}", f"{c.tflop['total'] / 1e3:.3g}",
                    f"{c.peak[1] / 2**30:.1f} GiB", "-" if c.seconds is None else f"{c.seconds:.0f} s",
                )
            )  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        total = self.as_dict()["total"]
        seconds = total["seconds_estimate"]
        time = "no rates for this machine" if seconds is None else f"{seconds:.0f} s by {self.rates_source}"
        lines += [
            f"total: {total['clips']} clips, {total['frames']} frames, {total['network_calls']} network "
            f"calls, {total['tflop'] / 1e3:.3g} PFLOP, time: {time}",
            f"* {costs.MEMORY_FORMULA}",
        ]
        lines += [f"note: {c.name}: {note}" for c in self.clips for note in c.notes]
        return "\n".join(lines + [f"problem: {problem}" for problem in self.problems])
