"""What all stages share: the clock, the loop, averaged weights, saving and resuming, logs and pictures.

A stage owns two folders below OUT: `work/` holds everything an interrupted run needs to go on exactly, `keep/`
what is worth carrying to another machine: averaged weights in bf16, logs, pictures.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from optimise import Optimiser
from sizes import Sizes
from torch import Tensor, nn

from cosmos_fast.formats import CONTROLS

LOG_EVERY = 20
# Shape of the running average: 7 weights the last eighth of the steps so far, at any length of run.
AVERAGE_POWER = 7.0


@dataclass(frozen=True)
class Run:
    """One call of the driver. `minutes` ends a stage by the clock; `steps`, if given, by count.

    `stop` ends it earlier without touching the learning-rate schedule, as a kill would. `controls` are those whose
    branches stage `control` trains; the others stay bit for bit.
    """

    out: Path
    data: Path
    sizes: Sizes = field(default_factory=Sizes)
    minutes: float | None = None
    steps: int | None = None
    stop: int | None = None
    batch: int | None = None
    controls: tuple[str, ...] = CONTROLS
    seed: int = 0
    device: str = "cuda"
    is_compiled: bool = True
    save_every_s: float = 60.0
    log_every: int = LOG_EVERY
    warmup: int = 100

    @property
    def work(self) -> Path:
        return self.out / "work"

    @property
    def keep(self) -> Path:
        return self.out / "keep"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.startswith("cuda") else torch.float32

    def generator(self, stage: str, step: int) -> torch.Generator:
        """Randomness of one step: the same after a resume as without one."""
        salt = int.from_bytes(stage.encode()[:3].ljust(3, b"\0"), "big")
        return torch.Generator(self.device).manual_seed(salt * 2**36 + self.seed * 2**28 + step)


class Clock:
    """How much of a stage's time is used; one second of a run by count is one step."""

    def __init__(self, run: Run, step: int) -> None:
        self.run, self.began, self.first = run, time.monotonic(), step

    def progress(self, step: int) -> float:
        """0 at the start of this call's share of the stage, 1 at its end."""
        if self.run.steps is not None:
            return min(1.0, step / self.run.steps)
        assert self.run.minutes is not None, "a stage ends by minutes or by steps"
        return min(1.0, (time.monotonic() - self.began) / (60 * self.run.minutes))

    def is_over(self, step: int) -> bool:
        return self.progress(step) >= 1 or (self.run.stop is not None and step >= self.run.stop)


def atomic(path: Path, write: Callable[[Path], Any]) -> Path:
    """Write a file so that it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    write(part)
    os.replace(part, path)
    return path


class Trainer:
    """Trains named parameters with the loss of a stage until its time is up."""

    def __init__(
        self,
        run: Run,
        stage: str,
        named: Mapping[str, nn.Parameter],
        *,
        lr: float,
        lr_plain: float,
        decay: float = 0.0,
        clip: float = 1.0,
    ) -> None:
        self.run, self.stage, self.named, self.clip = run, stage, dict(named), clip
        self.optimiser = Optimiser(self.named.items(), lr, lr_plain, decay)
        self.average = {name: weight.detach().float().clone() for name, weight in self.named.items()}
        self.step, self.warm_from, self.seconds = 0, 0, 0.0
        self.log = run.keep / "logs" / f"{stage}.jsonl"

    # --- resuming ---

    @property
    def state_path(self) -> Path:
        return self.run.work / f"{self.stage}.pt"

    @property
    def kept_path(self) -> Path:
        return self.run.keep / f"{self.stage}.pt"

    def resume(self) -> bool:
        """Go on from the full state, or else from the averaged weights with a fresh optimiser."""
        if self.state_path.exists():
            state = torch.load(self.state_path, map_location=self.run.device, weights_only=True)
            self._put(state["weights"], state["average"])
            self.optimiser.load(state["optimiser"])
            self.step, self.warm_from, self.seconds = state["step"], state["warm_from"], state["seconds"]
            return True
        if self.kept_path.exists():
            state = torch.load(self.kept_path, map_location=self.run.device, weights_only=True)
            self._put(state["weights"], state["weights"])
            self.step = self.warm_from = state["step"]
            self.seconds = state["seconds"]
            return True
        return False

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor], average: Mapping[str, Tensor]) -> None:
        if set(weights) != set(self.named):
            odd = ", ".join(sorted(set(weights) ^ set(self.named))[:10])
            raise SystemExit(
                f"{self.stage}: the saved run must have the weights of this one, got others: {odd}."
            )
        for name, weight in self.named.items():
            weight.copy_(weights[name])
            self.average[name].copy_(average[name])

    def save(self) -> None:
        # One flush of both files: a machine that disappears leaves the last pair, not a mixture.
        state = {
            "weights": {name: weight.detach() for name, weight in self.named.items()},
            "average": self.average, "optimiser": self.optimiser.state(),
            "step": self.step, "warm_from": self.warm_from, "seconds": self.seconds,
        }  # fmt: skip
        atomic(self.state_path, lambda path: torch.save(state, path))
        self.save_kept()

    def save_kept(self, weights: Mapping[str, Tensor] | None = None, is_finished: bool = False) -> None:
        """What is carried away: the averaged weights in bf16, or others that the stage made of them."""
        kept = {
            "weights": {name: weight.bfloat16() for name, weight in (weights or self.average).items()},
            "step": self.step, "seconds": self.seconds, "sizes": self.run.sizes.record(),
            "is_finished": is_finished,
        }  # fmt: skip
        atomic(self.kept_path, lambda path: torch.save(kept, path))

    # --- the loop ---

    def train(self, loss_of: Callable[[int, torch.Generator], dict[str, Tensor]]) -> None:
        """Minimise `loss_of(step, generator)["loss"]`; the other values are logged beside it."""
        clock, began, saved = Clock(self.run, self.step), time.monotonic(), time.monotonic()
        before, recent = self.seconds, []
        while not clock.is_over(self.step):
            parts = loss_of(self.step, self.run.generator(self.stage, self.step))
            parts["loss"].backward()
            factor = self.factor(clock.progress(self.step))
            norm = self.optimiser.step(factor, self.clip)
            self.step += 1
            self._blend()
            self.seconds = before + time.monotonic() - began
            recent.append({**{name: value.detach() for name, value in parts.items()}, "norm": norm})
            if self.step % self.run.log_every == 0 or clock.is_over(self.step):
                self._write(recent, factor)
                recent = []
            if time.monotonic() - saved > self.run.save_every_s:
                self.save()
                saved = time.monotonic()
        self.save()

    def factor(self, progress: float) -> float:
        """Share of the learning rate: warm-up, constant, and down to a tenth over the last third of the time."""
        warm = min(1.0, (self.step - self.warm_from + 1) / self.run.warmup)
        return warm * (1 - 0.9 * max(0.0, progress - 0.65) / 0.35)

    @torch.no_grad()
    def _blend(self) -> None:
        share = 1 - (1 - 1 / (self.step + 1)) ** (AVERAGE_POWER + 1)
        torch._foreach_lerp_(list(self.average.values()), [w.detach() for w in self.named.values()], share)

    def _write(self, recent: Sequence[Mapping[str, Tensor]], factor: float) -> None:
        names = sorted({name for row in recent for name in row})
        # Parts that not every step has are averaged over the steps that have them.
        values = {
            name: float(torch.stack([row[name].float() for row in recent if name in row]).mean())
            for name in names
        }
        if not np.isfinite(values["loss"]):
            raise SystemExit(
                f"{self.stage}: the loss must be finite, got {values['loss']} at step {self.step}. "
                "Resume from the last saved state with a lower learning rate."
            )
        record(self.log, step=self.step, seconds=round(self.seconds, 2), lr=round(factor, 4), **values)


def record(path: Path, **values: Any) -> None:
    """Append one line to a log and show it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(rounded) + "\n")
    print(path.stem, " ".join(f"{k}={v}" for k, v in rounded.items()), flush=True)


def sheet(path: Path, rows: Sequence[Sequence[np.ndarray]]) -> Path:
    """A picture of clips: each row is clips (F, H, W, 3) side by side, first, middle and last frame of each."""
    lines = []
    for row in rows:
        frames = [clip[i] for clip in row for i in sorted({0, len(clip) // 2, len(clip) - 1})]
        lines.append(np.concatenate(frames, axis=1))
    width = max(line.shape[1] for line in lines)
    lines = [np.pad(line, ((0, 2), (0, width - line.shape[1]), (0, 0))) for line in lines]
    picture = np.ascontiguousarray(np.concatenate(lines)[..., ::-1])
    # JPEG inside a PNG name would lie; pictures are small enough after halving.
    picture = cv2.resize(
        picture, (picture.shape[1] // 2, picture.shape[0] // 2), interpolation=cv2.INTER_AREA
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), picture, [cv2.IMWRITE_PNG_COMPRESSION, 6]):
        raise SystemExit(f"{path}: the picture must be writable, got an error from OpenCV.")
    return path
