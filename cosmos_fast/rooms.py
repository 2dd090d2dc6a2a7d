"""Memory of a chunk's inputs, used again by the next chunk or clip once its last user has dropped it.

Fresh memory costs more than what is put in it where the system gives it page by page: 0.5 GB are 120,000 pages.
"""

from __future__ import annotations

import weakref

import numpy as np
import numpy.typing as npt


class Rooms:
    """Arrays whose memory comes back when the last reference to them, views among them, is gone.

    What is back is kept for arrays of the same size. Where none is back of the size that is asked for, all others are
    given up: what is held, in use or not, is never more than was in use at once. It goes with the Rooms themselves.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}

    def take(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> np.ndarray:
        """An array with anything in it. One thread takes; any may drop."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        try:
            memory = self._free.get(size, []).pop()
        except IndexError:
            self._free = {}
            memory = np.empty(size, np.uint8)
        # Views of an array point at the last one that is not plain memory below them: this one, whose base is a buffer.
        room = np.frombuffer(memory.data, np.uint8)
        weakref.finalize(room, self._back, memory).atexit = False
        return room.view(dtype).reshape(shape)

    def _back(self, memory: np.ndarray) -> None:
        self._free.setdefault(memory.size, []).append(memory)
