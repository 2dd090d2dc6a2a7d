"""The inputs of a clip read by a thread: ahead of who encodes them by what is left of a chunk, and the chunk after it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Final

import numpy as np

from .chunking import Chunk, is_black
from .inputs import ChunkInputs, ClipInputs
from .stages import Stages
from .worker import Worker

WINDOW: Final = 8
"""Frames read before those who wait are told: enough for controls that are made of frames by eight threads."""
AHEAD: Final = 3
"""Windows that are read while the controls of the one before them are made."""


class Reading:
    """The inputs of one chunk while they are read. Every method waits for what it gives, and raises what kept it."""

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk
        self._news = threading.Condition()
        self._given: ChunkInputs | None = None
        self._read = self._done = 0  # frames read; frames whose controls are made as well
        self._there: dict[str, int] = {}  # frames of each control
        self._lit: set[str] = set()
        self._error: BaseException | None = None

    def frames(self, start: int, stop: int) -> np.ndarray:
        """Frames of the input."""
        return self._await(lambda: self._read >= stop).frames[start:stop]

    def control(self, name: str, start: int, stop: int) -> np.ndarray:
        """Frames of a control."""
        return self._await(lambda: self._there.get(name, 0) >= stop).controls[name][start:stop]

    def is_lit(self, name: str) -> bool:
        """Whether there is such a control and any pixel of it is not black; known with the first that is not."""
        self._await(lambda: name in self._lit or self._done == self.chunk.length)
        return name in self._lit

    def whole(self) -> ChunkInputs:
        return self._await(lambda: self._done == self.chunk.length)

    def _await(self, has_come: Callable[[], bool]) -> ChunkInputs:
        with self._news:
            self._news.wait_for(lambda: has_come() or self._error is not None)
            if self._error is not None:
                raise self._error
            assert self._given is not None
            return self._given

    # --- the reader's side ---

    def read(self, inputs: ClipInputs, stop: threading.Event) -> None:
        """Read it all, unless told to stop; an error is for those who wait.

        A second thread makes the controls that have no file, a few windows behind this one.
        """
        try:
            given = inputs.room(self.chunk)

            def make(window: tuple[int, int]) -> None:
                there = inputs.make(self.chunk, given, *window)
                self._tell(given, there, window[1], done=window[1])

            with Worker(make, AHEAD, "maker") as maker:
                for start, end in _windows(self.chunk.length):
                    if stop.is_set():
                        return
                    self._tell(given, inputs.fill(self.chunk, given, start, end), end, read=end)
                    maker.put((start, end))
        except BaseException as error:  # raised where it is waited for
            with self._news:
                self._error = error
                self._news.notify_all()

    def _tell(self, given: ChunkInputs, there: list[str], end: int, *, read: int = 0, done: int = 0) -> None:
        """These controls are there up to frame `end`; so much of the chunk has been read, or done."""
        lit = {
            name
            for name in there
            if name not in self._lit and not is_black(given.controls[name][self._there.get(name, 0) : end])
        }
        with self._news:
            self._given, self._read, self._done = given, max(self._read, read), max(self._done, done)
            self._there |= dict.fromkeys(there, end)
            self._lit |= lit
            self._news.notify_all()


def _windows(length: int) -> list[tuple[int, int]]:
    """Frame 0 alone, as the VAE takes it, then WINDOW at a time."""
    return [(0, 1), *((start, min(start + WINDOW, length)) for start in range(1, length, WINDOW))]


class Reader:
    """Readings of `chunks` in order, the first one begun at once, the next one before the one given is used.

    A context manager.

    Seconds of the thread are told to `stages` as "inputs".
    """

    def __init__(self, inputs: ClipInputs, chunks: Sequence[Chunk], stages: Stages) -> None:
        self._inputs, self._stages = inputs, stages
        self._readings, self._last = [Reading(chunk) for chunk in chunks], chunks[-1]
        self._stop = threading.Event()
        self._worker = Worker(self._read, len(chunks), "reader")
        for reading in self._readings[:1]:
            self._worker.put(reading)

    def __iter__(self) -> Iterator[Reading]:
        readings, self._readings = self._readings, []  # a chunk's frames go when its user drops them
        while readings:
            for following in readings[1:2]:
                self._worker.put(following)
            yield readings.pop(0)

    def _read(self, reading: Reading) -> None:
        with self._stages.beside("inputs"):
            reading.read(self._inputs, self._stop)
            if reading.chunk == self._last:
                self._inputs.close()  # its threads and memory go while others work

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._worker.__exit__(kind, error, trace)
