"""Progress of a batch: a bar with clip, chunk, step and ETA on a terminal, plain lines elsewhere. On stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .clip_plan import ClipPlan
    from .engine import Step

QUIET_LINES_S = 30.0
"""At most one progress line in so many seconds when stderr is not a terminal."""


class Progress:
    """Counts network steps over the whole batch. Use as a context manager.

    label: led by it, lines of several processes can be told apart. workers: how many such processes share the clips;
    with more than one there is no bar, and the ETA is what it would be if all were as fast as this one.
    """

    def __init__(
        self, clips: Sequence[ClipPlan], *, quiet: bool = False, label: str = "", workers: int = 1
    ) -> None:
        from tqdm import tqdm

        self.label, self.workers = label, workers
        self.clips = {clip.name: i for i, clip in enumerate(clips, start=1)}
        self.total = sum(clip.steps * len(clip.chunks) for clip in clips)
        self.chunks = sum(len(clip.chunks) for clip in clips)
        self.quiet, self.is_terminal = quiet, sys.stderr.isatty() and workers == 1
        self.done, self._before, self._last = 0, time.monotonic(), time.monotonic()
        # Seconds and number of steps: those behind another of their chunk, and those that a chunk begins with, which
        # wait for weights, encoding and the decoding before it.
        self._later_s, self._later, self._first_s, self._first = 0.0, 0, 0.0, 0
        self._bar = tqdm(
            total=self.total, unit="step", disable=quiet or not self.is_terminal, file=sys.stderr
        )

    def step(self, step: Step) -> None:
        """Called after every denoising step."""
        self.done += 1
        where = (
            f"{self.label}clip {self.clips.get(step.name, '?')}/{len(self.clips)} {step.name} "
            f"chunk {step.chunk + 1}/{step.chunks} step {step.step}/{step.steps}"
        )
        self._bar.set_description(where, refresh=False)
        self._bar.update()
        now = time.monotonic()
        if step.step == 1:
            self._first_s, self._first = self._first_s + now - self._before, self._first + 1
        else:
            self._later_s, self._later = self._later_s + now - self._before, self._later + 1
        self._before = now
        if (
            not self.is_terminal
            and not self.quiet
            and (now - self._last >= QUIET_LINES_S or step.step == step.steps)
        ):
            self._last = now
            print(where + self._estimate(), file=sys.stderr, flush=True)

    def _estimate(self) -> str:
        """Seconds a step and until the end; nothing before there is a step to tell it by."""
        first = self._first_s / max(self._first, 1)
        if self._later == 0 and self.total > self.chunks:
            return ""
        pace = self._later_s / self._later if self._later else first
        chunks = max(self.chunks / self.workers - self._first, 0)
        later = max(self.total / self.workers - self.done - chunks, 0)
        return f", {pace:.2f} s/step, ETA {chunks * first + later * pace:.0f} s"

    def made(self, name: str, what: str, done: int, total: int) -> None:
        """Called after every frame of a control that is computed from the whole clip, and every chunk saved."""
        where = f"{self.label}clip {self.clips.get(name, '?')}/{len(self.clips)} {name} {what} {done}/{total}"
        self._bar.set_description(where)
        now = time.monotonic()
        if not self.is_terminal and not self.quiet and (now - self._last >= QUIET_LINES_S or done == total):
            self._last = now
            print(where, file=sys.stderr, flush=True)

    def line(self, text: str) -> None:
        """One line about a clip, above the bar."""
        if self.is_terminal and not self.quiet:
            self._bar.write(self.label + text, file=sys.stderr)
        else:
            print(self.label + text, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
