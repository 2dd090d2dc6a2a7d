"""What guards a running clip: its claim (one writer), its frames (not black, not frozen), and stop signals.

Shape letters: F video frames, H rows, W columns; frames are uint8 RGB `(F, H, W, 3)`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

import numpy as np

from .formats import ClipError, CosmosFastError

# ---------------------------------------------------------------------------------------------- claims


Lock = Callable[[], AbstractContextManager[Any]]


def _process(pid: int) -> str | None:
    """What tells one process from another with the same id: namespace and start time. None if it is gone."""
    try:
        space = os.readlink("/proc/self/ns/pid")
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else f"{space} {fields[19]}"


class Claim:
    """The right of one process to make one clip: a file that names host and process and is kept fresh.

    Take one with `Claim.take`; it is a context manager that gives the claim back.
    """

    def __init__(self, path: Path, token: str, lock: Lock, beat_s: float) -> None:
        self.path, self.token, self._lock = path, token, lock
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(beat_s,), name="claim", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, path: Path, lock: Lock, stale_s: float = 600.0) -> Claim | None:
        """Create the claim file, or take over a stale one; None while its owner lives.

        Stale: the owner's process is gone from this host, or its heartbeat is older than `stale_s` seconds
        by the file system's own clock, so clocks that differ between hosts do not matter.
        """
        token = uuid.uuid4().hex
        owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process": _process(os.getpid()),
            "token": token,
        }
        fresh = path.with_name(f"{path.name}.{token}")
        with lock():
            try:
                with open(fresh, "x") as file:
                    json.dump(owner, file)
                try:
                    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
                except FileExistsError:
                    if not cls._stale(path, fresh.stat().st_mtime, stale_s):
                        return None
                os.replace(fresh, path)
            finally:
                fresh.unlink(missing_ok=True)
        return cls(path, token, lock, min(stale_s / 10, 30.0))

    @staticmethod
    def _stale(path: Path, now: float, stale_s: float) -> bool:
        if path.is_symlink() or not path.is_file():
            raise ClipError(f"claim: must be a plain file, got {path}. Remove it.")
        if now - path.stat().st_mtime > stale_s:
            return True
        try:
            owner = json.loads(path.read_text())
            host, pid, process = owner["host"], owner["pid"], owner["process"]
            space = process.split()[0]
        except (ValueError, KeyError, TypeError, AttributeError):
            return False  # being written, or not ours: its age decides
        mine = _process(os.getpid())
        if host != socket.gethostname() or mine is None or mine.split()[0] != space:
            return False  # a process of another machine or container cannot be looked up from here
        return _process(pid) != process

    def held(self) -> bool:
        """Whether the claim is still ours; a process that slept too long may have lost it."""
        try:
            return bool(json.loads(self.path.read_text())["token"] == self.token)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def touch(self) -> None:
        """One heartbeat; a thread sends them by itself."""
        if self.held():
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def _beat(self, beat_s: float) -> None:
        while not self._stop.wait(beat_s):
            self.touch()

    def release(self) -> None:
        """Give the claim back. A claim that was taken over is left to its new owner."""
        self._stop.set()
        self._thread.join(timeout=5.0)
        with self._lock():
            if self.held():
                self.path.unlink(missing_ok=True)

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


# ---------------------------------------------------------------------------------------------- frames

_FLAT_STD, _FLAT_RANGE = 1.0, 8.0  # luma codes: a decoded grey frame stays under both, a night scene does not


class FrameChecks:
    """Watch decoded frames as they stream by; raise ClipError when the picture is dead.

    name: clip name, for messages. frames, size: what the plan promised, size as (width, height).
    seams: index of the first frame of every chunk but the first. run: this many frames in a row of one
    colour, or byte-identical, fail the clip; both are allowed where the source does the same.
    A jump at a seam of more than `seam_factor` times the median frame difference makes a note, not a failure.
    """

    def __init__(
        self, name: str, frames: int, size: tuple[int, int], *, seams: Sequence[int] = (), run: int = 8,
        seam_factor: float = 3.0,
    ) -> None:  # fmt: skip
        self.name, self.expected, self.size, self.run, self.seam_factor = name, frames, size, run, seam_factor
        self.seams, self.notes = tuple(seams), []  # type: tuple[int, ...], list[str]
        self.count = self._flat_run = self._flat_total = self._longest = 0
        self._same_run = 1
        self._last: np.ndarray | None = None
        self._last_source: np.ndarray | None = None
        self._luma: np.ndarray | None = None
        self._differences: list[float] = []  # [i] = mean |luma(i + 1) - luma(i)|, in codes

    def update(self, frames_FHW3: np.ndarray, source_FHW3: np.ndarray | None = None) -> None:
        """Check the next frames; `source_FHW3`, when given, holds the input's frames of the same moments."""
        width, height = self.size
        if frames_FHW3.dtype != np.uint8 or frames_FHW3.shape[1:] != (height, width, 3):
            raise ClipError(
                f"{self.name}: output frames must be uint8 {width}x{height} RGB, got {frames_FHW3.dtype} "
                f"of shape {tuple(frames_FHW3.shape)}."
            )
        if source_FHW3 is not None and len(source_FHW3) != len(frames_FHW3):
            raise ValueError(
                f"FrameChecks: source must match the frames, got {len(source_FHW3)} for {len(frames_FHW3)}."
            )
        for i, frame in enumerate(frames_FHW3):
            self._frame(frame, None if source_FHW3 is None else source_FHW3[i])

    def _frame(self, frame: np.ndarray, source: np.ndarray | None) -> None:
        luma = _luma(frame)
        is_flat = _flat(luma) and not (source is not None and _flat(_luma(source)))
        self._flat_run = self._flat_run + 1 if is_flat else 0
        self._flat_total += is_flat
        if self._flat_run >= self.run:
            what, start = self._what(luma), self.count + 1 - self._flat_run
            raise ClipError(f"{self.name}: output must show a picture, got {what} from frame {start} on.")
        if self._last is not None and self._luma is not None:
            self._differences.append(float(np.abs(luma - self._luma).mean()))
            if not np.array_equal(frame, self._last):
                self._same_run = 1
            elif source is None or self._last_source is None or not np.array_equal(source, self._last_source):
                self._same_run += 1  # a repeat that the source has too is not counted
        self._longest = max(self._longest, self._same_run)
        if self._same_run >= self.run:
            raise ClipError(
                f"{self.name}: output must move as its input does, got {self.run} identical (frozen) frames "
                f"up to frame {self.count}."
            )
        self._last, self._luma = frame.copy(), luma
        self._last_source = None if source is None else source.copy()
        self.count += 1

    @staticmethod
    def _what(luma: np.ndarray) -> str:
        return "black" if luma.mean() < 16 else "one colour"

    def finish(self) -> dict[str, Any]:
        """Close the stream and return the figures for the sidecar; ClipError if the count is wrong."""
        if self.count != self.expected:
            raise ClipError(f"{self.name}: output must have {self.expected} frames, got {self.count}.")
        if self.count and self._flat_total == self.count and self._luma is not None:
            what = self._what(self._luma)
            raise ClipError(f"{self.name}: output must show a picture, got {what} in every frame.")
        at_seam = {s - 1 for s in self.seams}
        inside = [d for i, d in enumerate(self._differences) if i not in at_seam]
        usual, jumps = (median(inside) if inside else 0.0), {}
        for seam in self.seams:
            if 0 < seam <= len(self._differences):
                jumps[seam] = round(self._differences[seam - 1], 3)
                if usual and jumps[seam] > self.seam_factor * usual:
                    self.notes.append(
                        f"seam: the jump into frame {seam} is {jumps[seam] / usual:.1f} times the median "
                        f"frame difference ({jumps[seam]:.2f} against {usual:.2f} codes)"
                    )
        return {
            "frames": self.count, "not_one_colour": True, "not_frozen": True,
            "identical_frames_longest": self._longest,
            "median_frame_difference": round(usual, 3), "seam_differences": jumps,
        }  # fmt: skip


def _luma(frame: np.ndarray) -> np.ndarray:
    """Luma of an evenly thinned grid, at least 180 rows and columns: enough to judge, cheap at any size."""
    step = max(1, min(frame.shape[:2]) // 180)
    return frame[::step, ::step].astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)


def _flat(luma: np.ndarray) -> bool:
    return bool(np.ptp(luma) <= _FLAT_RANGE and luma.std() < _FLAT_STD)


# ---------------------------------------------------------------------------------------------- signals


class Stopped(CosmosFastError):
    """The run was asked to stop. `exit_code` is 130 (interrupt) or 143 (terminate)."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("stopped on request; run the same command again to go on where it ended")
        self.exit_code = exit_code


class StopFlag:
    """Turn the first SIGINT, SIGTERM or SIGUSR1 into a request; the second does what it does by default.

    Use as a context manager in the main thread. Work asks `check()` between steps; it raises Stopped unless
    what remains of the clip fits into the grace period.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, grace_s: float = 30.0) -> None:
        if not grace_s >= 0:
            raise ValueError(f"grace: must be zero or more seconds, got {grace_s!r}.")
        self.grace_s = grace_s
        self.signal: int | None = None
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal, self._at = number, time.monotonic()
        for each in self.SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    @property
    def requested(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """0 while nothing was asked, 130 after an interrupt, 143 after the others."""
        return 0 if self.signal is None else 130 if self.signal == signal.SIGINT else 143

    def check(self, remaining_s: float | None = None) -> None:
        """Raise Stopped if asked to stop, unless `remaining_s` more seconds fit into the grace period."""
        if self.signal is None:
            return
        left_s = self._at + self.grace_s - time.monotonic()
        if remaining_s is None or remaining_s > left_s:
            raise Stopped(self.exit_code)

    def __enter__(self) -> StopFlag:
        for each in self.SIGNALS:
            self._before[each] = signal.signal(each, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
