"""The inputs of a clip read by a thread: ahead of who encodes them by what is left of a chunk, and the chunk after it.

Ranks of one host read a clip once (`neighbours`): a Reader on the others hears of it, and its Readings cannot be told apart.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Final

import numpy as np

from .chunking import Chunk, is_black
from .inputs import ChunkInputs, ClipInputs
from .neighbours import Item, Neighbours, News, Take
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
        self._changed = threading.Condition()
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
        with self._changed:
            self._changed.wait_for(lambda: has_come() or self._error is not None)
            if self._error is not None:
                raise self._error
            assert self._given is not None
            return self._given

    # --- the reader's side ---

    def take(self, item: Item) -> bool:
        """What has become of the chunk, for those who wait; whether that was the last."""
        with self._changed:
            if isinstance(item, ChunkInputs):
                self._given = item
            elif isinstance(item, News):
                self._read, self._done = max(self._read, item.read), max(self._done, item.done)
                self._there |= dict.fromkeys(item.there, item.end)
                self._lit |= set(item.lit)
            else:
                self._error = item
            self._changed.notify_all()
            return self._error is not None or self._done == self.chunk.length

    def read(self, open_inputs: Callable[[], ClipInputs], stop: threading.Event, tell: Take) -> None:
        """Read it all, unless told to stop, and `tell` what becomes of it; an error is for those who wait.

        A second thread makes the controls that have no file, a few windows behind this one.
        """
        try:
            inputs = open_inputs()
            given = inputs.room(self.chunk)
            tell(given)

            def make(window: tuple[int, int]) -> None:
                there = inputs.make(self.chunk, given, *window)
                tell(self._news(given, there, window[1], done=window[1]))

            with Worker(make, AHEAD, "maker") as maker:
                for start, end in _windows(self.chunk.length):
                    if stop.is_set():
                        return
                    tell(self._news(given, inputs.fill(self.chunk, given, start, end), end, read=end))
                    maker.put((start, end))
        except BaseException as error:  # raised where it is waited for
            tell(error)

    def _news(self, given: ChunkInputs, there: list[str], end: int, *, read: int = 0, done: int = 0) -> News:
        """These controls are there up to frame `end`; so much of the chunk has been read, or done."""
        lit = (
            name
            for name in there
            if name not in self._lit and not is_black(given.controls[name][self._there.get(name, 0) : end])
        )
        return News(tuple(there), tuple(lit), end, read, done)


def _windows(length: int) -> list[tuple[int, int]]:
    """Frame 0 alone, as the VAE takes it, then WINDOW at a time."""
    return [(0, 1), *((start, min(start + WINDOW, length)) for start in range(1, length, WINDOW))]


class Reader:
    """Readings of `chunks` in order, the first one begun at once, the next one before the one given is used.

    A context manager. open_inputs: called in the thread, and not on a rank whose `neighbours` read for it; closed here.

    Seconds of the thread are told to `stages` as "inputs".
    """

    def __init__(
        self,
        open_inputs: Callable[[], ClipInputs],
        chunks: Sequence[Chunk],
        stages: Stages,
        neighbours: Neighbours | None = None,
    ) -> None:
        self._open, self._stages = open_inputs, stages
        self._inputs: ClipInputs | None = None
        self._readings, self._last = [Reading(chunk) for chunk in chunks], chunks[-1]
        self._stop = threading.Event()
        self._channel = (neighbours or Neighbours()).begin()
        self._worker = Worker(self._read, len(chunks), "reader")
        self._worker.put(self._readings[0])

    def __iter__(self) -> Iterator[Reading]:
        readings, self._readings = self._readings, []  # a chunk's frames go when its user drops them
        while readings:
            for following in readings[1:2]:
                self._worker.put(following)
            yield readings.pop(0)

    def _read(self, reading: Reading) -> None:
        with self._stages.beside("inputs"):
            read = partial(reading.read, self._opened, self._stop)
            self._channel.carry(reading.chunk.index, read, reading.take, self._stop)
            if reading.chunk == self._last:
                self._close()  # its threads and memory go while others work

    def _opened(self) -> ClipInputs:
        self._inputs = self._inputs or self._open()
        return self._inputs

    def _close(self) -> None:
        if self._inputs is not None:
            self._inputs.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        try:
            self._worker.__exit__(kind, error, trace)
            self._close()
        finally:
            self._channel.close()
