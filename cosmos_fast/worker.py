"""One thread that does one kind of work on things in the order they are given, a bounded number behind."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Worker(Generic[T]):
    """Calls `work` on every thing that is `put`, in order, in a thread of its own. A context manager.

    At most `room` things wait; `put` waits while there are more. What `work` raises is raised, itself, by the next `put`,
    `check` or `finish`; nothing is done after it. Leaving the block with an exception drops what waits.
    """

    def __init__(self, work: Callable[[T], None], room: int, name: str) -> None:
        self._work = work
        self._things: queue.Queue[T | None] = queue.Queue(room)
        self._error: BaseException | None = None
        self._dropped = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, thing: T) -> None:
        self.check()
        self._things.put(thing)

    def finish(self) -> None:
        """Wait until everything is done; a second call does nothing but raise again what was raised."""
        if self._thread.is_alive():
            self._things.put(None)
            self._thread.join()
        self.check()

    def check(self) -> None:
        """Raise what `work` has raised, if it has."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        # After an error the queue is still emptied: who waits in `put` must come back to hear of it.
        while (thing := self._things.get()) is not None:
            if self._error is None and not self._dropped:
                try:
                    self._work(thing)
                except BaseException as error:  # carried to the thread that waits for the result
                    self._error = error

    def __enter__(self) -> Worker[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
            return
        self._dropped = True
        if self._thread.is_alive():
            self._things.put(None)
            self._thread.join()
