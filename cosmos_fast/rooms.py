"""Memory of a chunk's inputs, used again by the next chunk or clip once its last user has dropped it.

Fresh memory costs more than what is put in it where the system gives it page by page: 0.5 GB are 120,000 pages.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import numpy.typing as npt


class Rooms:
    """Arrays whose memory comes back when the last reference to them, views among them, is gone.

    What is back is kept for arrays of the same size. Where none is back of the size that is asked for, all others are
    given up: what is held, in use or not, is never more than was in use at once. It goes with the Rooms themselves.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}
        self._taking = threading.Lock()

    def take(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> np.ndarray:
        """An array with anything in it. Any thread may take, and drop."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        with self._taking:
            memory = self._used(size)
            if memory is None:
                self._free = {}
                memory = self._new(size)
        return room_in(memory, shape, dtype, partial(self._back, size, memory))

    def _new(self, size: int) -> np.ndarray:
        """Memory of `size` bytes; behind them those of others who use it, zero where they do not."""
        return np.empty(size, np.uint8)

    def _used(self, size: int) -> np.ndarray | None:
        """Memory that is back and that nobody else uses."""
        free = self._free.get(size, [])
        for index, memory in enumerate(free):
            if not memory[size:].any():
                return free.pop(index)
        return None

    def _back(self, size: int, memory: np.ndarray) -> None:
        self._free.setdefault(size, []).append(memory)


def room_in(
    memory: np.ndarray, shape: tuple[int, ...], dtype: npt.DTypeLike, on_drop: Callable[[], object]
) -> np.ndarray:
    """An array at the start of `memory`; on_drop is called when nothing refers to it or a view of it any more."""
    # Views of an array point at the last one that is not plain memory below them: this one, whose base is a buffer.
    room = np.frombuffer(memory.data, np.uint8, int(np.prod(shape)) * np.dtype(dtype).itemsize)
    weakref.finalize(room, on_drop).atexit = False
    return room.view(dtype).reshape(shape)


class SharedRooms(Rooms):
    """Rooms in memory that other processes of this host map as well (Linux): it is back when they, too, have dropped it.

    users: how many others there may be. Each has a byte behind the memory, set here when the memory is handed out to it,
    cleared there when it drops what it mapped (`mapped`).
    """

    def __init__(self, users: int) -> None:
        super().__init__()
        self._users = users
        self._shared: weakref.WeakValueDictionary[int, np.ndarray] = weakref.WeakValueDictionary()
        self._files: dict[int, int] = {}  # by address

    def _new(self, size: int) -> np.ndarray:
        # Not a file of /dev/shm: containers give that a few MB.
        file = os.memfd_create("cosmos_fast")
        os.ftruncate(file, size + self._users)
        memory = np.frombuffer(mmap.mmap(file, size + self._users), np.uint8)
        where = _address(memory)
        self._shared[where], self._files[where] = memory, file
        weakref.finalize(memory, _close, self._files, where).atexit = False
        return memory

    def hand_out(self, room: np.ndarray, users: Iterable[int]) -> int:
        """The file, still this object's, that these users are to map for an array that `take` gave."""
        where = _address(room)
        self._shared[where][self._shared[where].size - self._users :][list(users)] = 1
        return self._files[where]


def mapped(file: int, shape: tuple[int, ...], dtype: npt.DTypeLike, user: int) -> np.ndarray:
    """What user number `user` of several sees of an array in a room handed out to it; the file is closed."""
    try:
        memory = np.frombuffer(mmap.mmap(file, 0), np.uint8)
    finally:
        os.close(file)
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return room_in(memory, shape, dtype, partial(memory.__setitem__, size + user, 0))


def _close(files: dict[int, int], where: int) -> None:
    os.close(files.pop(where))


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])
