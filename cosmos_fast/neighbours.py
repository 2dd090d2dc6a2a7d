"""Ranks of one host that make a clip together: the first of them reads it, the others hear of that and map what is read.

Read by each rank for itself, a clip would be decoded and its controls made once a rank, by cores that all of them share.
What is read lies in memory that every rank of the host maps (`rooms.SharedRooms`); how far it has come, and what kept it,
goes by a local socket, in order. Linux; elsewhere, and where sockets cannot be had, every rank reads for itself.
"""

from __future__ import annotations

import io
import os
import pickle
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np

from .formats import ClipError, EnvironmentProblem, told_by
from .inputs import ChunkInputs
from .parallel import ALONE, Group
from .peer_memory import host_name
from .rooms import Rooms, SharedRooms, mapped

MEET_S: Final = 10.0
"""How long ranks that have connected may take to say which they are."""
SEND_S: Final = 5.0
"""How long a rank may leave its socket full before it is told no more."""
POLL_S: Final = 0.2
"""How often a rank that hears nothing looks whether it still has to."""
MESSAGE_BYTES: Final = 1 << 16
MESSAGE_FILES: Final = 16
"""More than a chunk has arrays: frames, a guide, four controls and their masks."""


class News(NamedTuple):
    """Controls `there` have come up to frame `end`, the `lit` of them not all black; frames of the chunk read, and done."""

    there: tuple[str, ...]
    lit: tuple[str, ...]
    end: int
    read: int = 0
    done: int = 0


Item = ChunkInputs | News | BaseException
"""What becomes of a chunk: first where its inputs will be, then how far they are, or what kept them."""
Take = Callable[[Item], bool]
"""Takes what became of a chunk; whether that was the last."""


class Alone:
    """A rank that reads for itself and tells nobody.

    notes: which ranks of the world read for themselves because they could not help it, and why.
    """

    def __init__(self, world: Group = ALONE, notes: tuple[str, ...] = ()) -> None:
        self.rooms = Rooms()  # what this rank reads belongs here
        self.notes = notes
        self._world, self._clip = world, 0

    def begin(self) -> None:
        """A clip begins. All ranks must call it."""
        self._clip = self._world.tell(self._clip + 1)

    def carry(self, chunk: int, read: Callable[[Take], None], take: Take, stop: threading.Event) -> None:
        """All that becomes of a chunk, to `take`, until that is the last or `stop` is set.

        read: reads the chunk in this process, if that is for this rank to do, and gives what becomes of it to its argument.
        """
        read(take)

    def end(self) -> None:
        """The clip was made, or given up: nobody need wait for more of it."""


class Teller(Alone):
    """A rank that reads for others: sockets by their number among `users`."""

    def __init__(
        self, world: Group, notes: tuple[str, ...], others: dict[int, socket.socket], users: int
    ) -> None:
        super().__init__(world, notes)
        self.rooms: SharedRooms = SharedRooms(users)
        self._others, self._telling = others, threading.Lock()

    def carry(self, chunk: int, read: Callable[[Take], None], take: Take, stop: threading.Event) -> None:
        def told(item: Item) -> bool:
            is_last = take(item)  # first, whatever becomes of the others
            self._tell(chunk, item)
            return is_last

        read(told)

    def end(self) -> None:
        self._tell(None, ClipError(f"reading: rank {self._world.rank} must go on to the end, it gave up."))

    def _tell(self, chunk: int | None, item: Item) -> None:
        """To all others; chunk None: to whom waits for any."""
        with self._telling:  # two threads read
            message, files = self._packed(chunk, item)
            for user, other in list(self._others.items()):
                try:
                    socket.send_fds(other, [message], files)
                except OSError:  # gone or stuck: what becomes of its group is seen to elsewhere
                    self._others.pop(user).close()

    def _packed(self, chunk: int | None, item: Item) -> tuple[bytes, list[int]]:
        """A message, its arrays as files."""
        files: list[int] = []

        class Pickler(pickle.Pickler):
            def persistent_id(_, value: Any) -> Any:
                if not isinstance(value, np.ndarray):
                    return None
                files.append(self.rooms.hand_out(value, self._others))
                return len(files) - 1, value.shape, value.dtype.str

        told = told_by(self._world.rank, item) if isinstance(item, BaseException) else item
        packed = io.BytesIO()
        Pickler(packed).dump((self._clip, chunk, told))
        return packed.getvalue(), files


class Listener(Alone):
    """A rank for which another one reads; among those it is number `user`."""

    def __init__(self, world: Group, notes: tuple[str, ...], first: socket.socket, user: int) -> None:
        super().__init__(world, notes)
        self._first, self._user = first, user

    def carry(self, chunk: int, read: Callable[[Take], None], take: Take, stop: threading.Event) -> None:
        try:
            while not stop.is_set():
                heard = self._hear()
                # What is left of a clip or a chunk that was given up is passed over.
                if heard is not None and heard[:2] >= (self._clip, chunk) and take(heard[2]):
                    return
        except Exception as error:
            take(error)

    def _hear(self) -> tuple[int, float, Item] | None:
        """Clip, chunk (above all others: any) and item of the next message; None if none came in a while."""
        try:
            message, files, *_ = socket.recv_fds(
                self._first, MESSAGE_BYTES, MESSAGE_FILES, socket.MSG_CMSG_CLOEXEC
            )
        except TimeoutError:
            return None
        if not message:
            raise ClipError("reading: the rank that reads the clip must live to its end, it is gone.")
        user = self._user

        class Unpickler(pickle.Unpickler):
            def persistent_load(_, place: Any) -> np.ndarray:
                index, shape, dtype = place
                return mapped(files[index], shape, dtype, user)

        clip, chunk, item = Unpickler(io.BytesIO(message)).load()
        at = float("inf") if chunk is None else chunk
        return clip, at, item


def meet(world: Group) -> Alone:
    """What this rank is to the others of its host. All ranks of the world must call it."""
    if world.size == 1:
        return Alone()
    hosts = world.hear(host_name())
    here = [rank for rank, host in enumerate(hosts) if host == hosts[world.rank]]
    is_first, number = world.rank == here[0], here.index(world.rank)
    door, why = _door() if is_first and len(here) > 1 else (None, None)
    told: list[tuple[bytes | None, str | None]] = world.hear(
        (None if door is None else door.getsockname(), why)
    )
    address, closed = told[here[0]]
    first = None
    if not is_first:
        first, why = (None, closed) if address is None else _entered(address, number - 1)
    reasons = world.hear(why)
    notes = tuple(
        f"reading: rank {rank} reads for itself: {why}."
        for rank, why in enumerate(reasons)
        if why is not None
    )
    if first is not None:
        return Listener(world, notes, first, number - 1)
    if door is None:
        return Alone(world, notes)
    with door:
        return Teller(
            world, notes, _let_in(door, sum(reasons[rank] is None for rank in here[1:])), len(here) - 1
        )


def _door() -> tuple[socket.socket | None, str | None]:
    """A socket that ranks of this host can connect to, or why there is none."""
    if sys.platform != "linux":
        return None, f"memory is shared on Linux, not on {sys.platform}"
    try:
        os.close(os.memfd_create("cosmos_fast"))  # some sandboxes refuse
        door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        door.bind(f"\0cosmos_fast-{secrets.token_hex(16)}")  # a name of no file, gone with the socket
        door.listen(128)
    except OSError as error:
        return None, f"shared memory and local sockets must open, got {error}"
    return door, None


def _entered(address: bytes, number: int) -> tuple[socket.socket | None, str | None]:
    """The socket to the rank behind a door, which has been told this rank's number; or why there is none."""
    first = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        first.connect(address)
        if not _is_ours(first):
            return None, "the rank that reads must be of the same user, got another"
        first.send(b"%d" % number)
    except OSError as error:
        return None, f"local sockets must connect, got {error}"
    first.settimeout(POLL_S)
    return first, None


def _let_in(door: socket.socket, count: int) -> dict[int, socket.socket]:
    """The sockets of so many ranks that have connected, by their numbers."""
    others: dict[int, socket.socket] = {}
    until = time.monotonic() + MEET_S
    while len(others) < count:
        door.settimeout(max(until - time.monotonic(), 0.001))
        try:
            other, _ = door.accept()
            other.settimeout(SEND_S)
            # Such a door stands open to everybody here; and who finds that it is not ours leaves without a word.
            if _is_ours(other) and (number := other.recv(MESSAGE_BYTES)):
                others[int(number)] = other
        except OSError as error:
            raise EnvironmentProblem(
                f"reading: {count} ranks must connect within {MEET_S:.0f} s, got {len(others)} ({error}). Start anew."
            ) from None
    return others


def _is_ours(other: socket.socket) -> bool:
    """Whether a process of this user is at the other end."""
    _, user, _ = struct.unpack("3i", other.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return user == os.getuid()
