"""Whether this process still does anything: how a thread beside the others tells a rank that works from one that hangs.

A process moves while one of its Python threads uses a core or goes from one instruction to another, or while bytes are
read or written. What hangs (a file system or a driver that does not answer, a lock nobody gives back) does none of that.
Waiting for another process is no hanging: that one is watched where it runs. Linux; elsewhere everything moves.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType

PROC = Path("/proc/self")
BUSY = 0.02
"""Share of a core from which on a thread works; one that asks a store every 20 ms stays below it."""
MOVED_BYTES = 1 << 20
"""Bytes in and out that are no mere signs of life: beating and asking here take some kB a second."""
PATIENT = ("torch.distributed", "filelock", "subprocess")
"""Packages whose calls wait for other processes: exchanges, downloads that another rank does, compilers."""
EXCHANGE = f"{__package__}.parallel"
"""Waits for other ranks where it calls no Python itself; what it calls may be a rank's own work, which may hang."""
READING, HEARING = f"{__package__}.reading", f"{__package__}.neighbours"
"""Who waits in the first waits for another process where a thread hears in the second what that one reads."""
_TICKS_PER_S = 100.0  # USER_HZ, the same on every Linux


class Motion:
    """Samples all Python threads but the one that asks. Ask often: what happens between two questions counts as one move."""

    def __init__(self) -> None:
        self._places: dict[int, tuple[tuple[int, int], ...]] = {}
        self._cpu_s = self._bytes = 0.0
        self._at = self._moved_at = time.monotonic()

    def still_s(self, waits: bool = False) -> float:
        """Seconds since the process was last seen to move, or to wait for another one; waits: whether it does, as it knows."""
        if not PROC.exists():
            return 0.0
        now, me = time.monotonic(), threading.get_ident()
        frames = {ident: frame for ident, frame in sys._current_frames().items() if ident != me}
        places = {
            ident: tuple((id(f.f_code), f.f_lasti) for f in _stack(frame)) for ident, frame in frames.items()
        }
        cpu_s, moved = _cpu_s(me), _bytes()
        main = frames.get(threading.main_thread().ident or 0)
        waits = waits or _is_waiting(main, frames.values())
        works = cpu_s - self._cpu_s > BUSY * (now - self._at)
        if waits or works or places != self._places or moved - self._bytes > MOVED_BYTES:
            self._places, self._bytes, self._moved_at = places, moved, now
        self._cpu_s, self._at = cpu_s, now
        return now - self._moved_at


def place(frame: FrameType | None) -> str:
    """Innermost frame, and the innermost one of this package: `tensor.py:12, network.py:130`."""
    own = (f for f in _stack(frame) if Path(f.f_code.co_filename).parent == Path(__file__).parent)
    frames = dict.fromkeys(f for f in (frame, next(own, None)) if f is not None)
    return ", ".join(f"{Path(f.f_code.co_filename).name}:{f.f_lineno}" for f in frames) or "nowhere"


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_waiting(main: FrameType | None, threads: Iterable[FrameType]) -> bool:
    """Whether the main thread, by where it and the others are, waits for another process."""
    names = _modules(main)
    if names[:1] == [EXCHANGE] or any(name.startswith(PATIENT) for name in names):
        return True
    return READING in names and any(HEARING in _modules(frame)[:2] for frame in threads)


def _modules(frame: FrameType | None) -> list[str]:
    """Of every frame from the innermost out."""
    return [str(f.f_globals.get("__name__", "")) for f in _stack(frame)]


def _cpu_s(but: int) -> float:
    """Seconds that the Python threads have had a core; threads of libraries may spin for their own reasons."""
    total = 0.0
    for thread in threading.enumerate():
        if thread.ident == but:
            continue
        try:
            fields = (PROC / "task" / str(thread.native_id) / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        total += (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    return total


def _bytes() -> float:
    """Bytes that the process has read and written, mapped files included; 0 where nobody may know."""
    try:
        lines = (PROC / "io").read_text().splitlines()
    except OSError:
        return 0.0
    found = {key: int(value) for key, _, value in (line.partition(": ") for line in lines)}
    return float(found["rchar"] + found["wchar"] + found["read_bytes"])
