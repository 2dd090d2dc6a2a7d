"""Ranks of one host that make a clip together: the first of them reads it, the others hear of that and map what is read.

Read by each rank for itself, a clip would be decoded and its controls made once a rank, by cores that all of them share.
What is read lies in memory that every rank of the host maps (`rooms.SharedRooms`); how far it has come, and what kept it,
goes by a local socket, one for each clip and rank, in order. Linux; elsewhere, and where a rank cannot be reached so, it reads
for itself.
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
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Final, NamedTuple

import numpy as np

from .formats import EnvironmentProblem, GivenUp, told_by
from .inputs import ChunkInputs
from .parallel import ALONE, Group
from .peer_memory import host_name
from .rooms import Rooms, SharedRooms, mapped

MEET_S: Final = 10.0
"""How long ranks of a host that have connected may take to say which they are, and to see that they share memory."""
POLL_S: Final = 0.2
"""How often who waits for the other end looks whether it still has to."""
MESSAGE_BYTES: Final = 1 << 16
MESSAGE_FILES: Final = 16
"""More than a chunk has arrays: frames, a guide, four controls and their masks."""
PROOF: Final = 173


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


# --- of one clip -------------------------------------------------------------------------------------


class Channel:
    """How chunks of a clip come to a rank that reads them itself and tells nobody."""

    def carry(self, chunk: int, read: Callable[[Take], None], take: Take, stop: threading.Event) -> None:
        """All that becomes of a chunk, to `take`, until that is the last or `stop` is set.

        read: reads the chunk in this process, if that is for this rank to do, and gives what becomes of it to its argument.
        """
        read(take)

    def close(self) -> None:
        """The clip was made, or given up: nobody need wait for more of it."""


class Telling(Channel):
    """That of a rank that reads for others: sockets by their number among the users of its rooms."""

    def __init__(self, rank: int, rooms: SharedRooms, others: dict[int, socket.socket]) -> None:
        self._rank, self._rooms, self._others = rank, rooms, others
        self._telling = threading.Lock()  # two threads read

    def carry(self, chunk: int, read: Callable[[Take], None], take: Take, stop: threading.Event) -> None:
        def told(item: Item) -> bool:
            is_last = take(item)  # first, whatever becomes of the others
            with self._telling:
                self._tell(chunk, item, stop)
            return is_last

        read(told)

    def close(self) -> None:
        for other in self._others.values():
            other.close()

    def _tell(self, chunk: int, item: Item, stop: threading.Event) -> None:
        told = told_by(self._rank, item) if isinstance(item, BaseException) else item
        packed = io.BytesIO()
        pickler = _Pickler(packed, self._rooms, self._others)
        pickler.dump((chunk, told))
        for user, other in list(self._others.items()):
            if not _sent(other, packed.getvalue(), pickler.files, stop):
                self._others.pop(user).close()


class Hearing(Channel):
    """That of a rank for which another one reads; it is number `user` of that one's rooms."""

    def __init__(self, first: socket.socket, user: int) -> None:
        self._first, self._user = first, user
        first.settimeout(POLL_S)

    def carry(self, chunk: int, read: Callable[[Take], None], take: Take, stop: threading.Event) -> None:
        try:
            while not stop.is_set():
                heard = self._hear()
                # Of a chunk that failed here more may come, which is passed over.
                if heard is not None and heard[0] == chunk and take(heard[1]):
                    return
        except Exception as error:
            take(error)

    def close(self) -> None:
        self._first.close()

    def _hear(self) -> tuple[int, Item] | None:
        """The next chunk and item; None if nothing came in a while."""
        try:
            message, files = _received(self._first)
        except TimeoutError:
            return None
        unpickler = _Unpickler(io.BytesIO(message), files, self._user)
        try:
            heard: tuple[int, Item] = unpickler.load()
            return heard
        finally:
            for file in unpickler.left:
                os.close(file)


class _Pickler(pickle.Pickler):
    """Arrays in rooms go as `files`, beside the message."""

    def __init__(self, to: io.BytesIO, rooms: SharedRooms, users: Iterable[int]) -> None:
        super().__init__(to)
        self.files: list[int] = []
        self._rooms, self._users = rooms, users

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return None
        self.files.append(self._rooms.hand_out(value, self._users))
        return value.shape, value.dtype.str


class _Unpickler(pickle.Unpickler):
    """Files become arrays, in the same order. left: those that no array has taken yet."""

    def __init__(self, of: io.BytesIO, files: list[int], user: int) -> None:
        super().__init__(of)
        self.left, self._user = files, user

    def persistent_load(self, place: Any) -> np.ndarray:
        if not self.left:
            raise EnvironmentProblem(
                "reading: a process must have room for the files of all inputs of a chunk. Raise `ulimit -n`."
            )
        shape, dtype = place
        return mapped(self.left.pop(0), shape, dtype, self._user)


def _sent(other: socket.socket, message: bytes, files: list[int], stop: threading.Event) -> bool:
    """Whether it went out: not where the other has left the clip, or is so late that its socket is full when that ends here."""
    while True:
        try:
            socket.send_fds(other, [message], files)
            return True
        except TimeoutError:
            if stop.is_set():
                return False
        except OSError:
            return False


def _received(other: socket.socket) -> tuple[bytes, list[int]]:
    """A message and its files. Raises TimeoutError, and GivenUp where the other end is closed."""
    message, files, *_ = socket.recv_fds(other, MESSAGE_BYTES, MESSAGE_FILES, socket.MSG_CMSG_CLOEXEC)
    if not message:
        raise GivenUp("reading: the rank that reads the clip must go on to its end, it gave up or is gone.")
    return message, files


# --- of an engine ------------------------------------------------------------------------------------


class Neighbours:
    """What the other ranks of this host are to one that reads for itself.

    notes: which ranks of the world read for themselves because they could not help it, and why.
    """

    def __init__(self, world: Group = ALONE, notes: tuple[str, ...] = ()) -> None:
        self.rooms = Rooms()  # what this rank reads belongs here
        self.notes = notes
        self._world, self._clip = world, 0

    def begin(self) -> Channel:
        """The channel of a clip that begins. All ranks must call it."""
        self._clip = self._world.tell(self._clip + 1)
        return self._channel()

    def _channel(self) -> Channel:
        return Channel()


class First(Neighbours):
    """To the rank that reads for the others: the sockets by which they get that of each clip, by their number as users."""

    def __init__(
        self, world: Group, notes: tuple[str, ...], rooms: SharedRooms, others: dict[int, socket.socket]
    ) -> None:
        super().__init__(world, notes)
        self.rooms: SharedRooms = rooms
        self._others = others

    def _channel(self) -> Channel:
        ends = {}
        for user, other in self._others.items():
            end, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            end.settimeout(POLL_S)
            ends[user] = end
            with theirs, suppress(OSError):  # gone: what becomes of its group is seen to elsewhere
                socket.send_fds(other, [b"%d" % self._clip], [theirs.fileno()])
        return Telling(self._world.rank, self.rooms, ends)


class Other(Neighbours):
    """To a rank for which the first one reads."""

    def __init__(self, world: Group, notes: tuple[str, ...], first: socket.socket, user: int) -> None:
        super().__init__(world, notes)
        self._first, self._user = first, user

    def _channel(self) -> Channel:
        while True:
            clip, (file,) = _received(self._first)
            end = socket.socket(fileno=file)
            if int(clip) == self._clip:
                return Hearing(end, self._user)
            end.close()  # of a clip that this rank never came to


def meet(world: Group) -> Neighbours:
    """What the other ranks of its host are to this one. All ranks of the world must call it."""
    if world.size == 1:
        return Neighbours()
    hosts = world.hear(host_name())
    here = [rank for rank, host in enumerate(hosts) if host == hosts[world.rank]]
    place, users = here.index(world.rank), len(here) - 1
    door, why = _opened() if place == 0 and users else (None, None)
    addresses: list[tuple[bytes | None, str | None]] = world.hear(
        (None if door is None else door.getsockname(), why)
    )
    first, others, rooms = None, {}, None
    if place > 0:
        first, why = _entered(*addresses[here[0]], place - 1)
    outside = world.hear(why)
    if door is not None:
        with door:
            others, rooms = _let_in(door, sum(outside[rank] is None for rank in here[1:])), SharedRooms(users)
        _prove(others, rooms)
    if first is not None:
        why = _seen(first, place - 1)
    reasons = world.hear(why)
    notes = tuple(
        f"reading: rank {rank} reads for itself: {reason}."
        for rank, reason in enumerate(reasons)
        if reason is not None
    )
    if first is not None and why is None:
        first.settimeout(None)
        return Other(world, notes, first, place - 1)
    if rooms is None:
        return Neighbours(world, notes)
    near = {user: other for user, other in others.items() if reasons[here[user + 1]] is None}
    return First(world, notes, rooms, near)


def _opened() -> tuple[socket.socket | None, str | None]:
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


def _entered(address: bytes | None, shut: str | None, user: int) -> tuple[socket.socket | None, str | None]:
    """The socket to the rank behind a door, which has been told this user's number; or why there is none."""
    if address is None:
        return None, shut
    first = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    first.settimeout(MEET_S)
    try:
        first.connect(address)
        if not _is_ours(first):
            return None, "the rank that reads must be of the same user, got another"
        first.send(b"%d" % user)
    except OSError as error:
        return None, f"local sockets must connect, got {error}"
    return first, None


def _let_in(door: socket.socket, count: int) -> dict[int, socket.socket]:
    """The sockets of so many users that have connected, by their numbers."""
    others: dict[int, socket.socket] = {}
    until = time.monotonic() + MEET_S
    while len(others) < count:
        door.settimeout(max(until - time.monotonic(), 0.001))
        try:
            other, _ = door.accept()
            other.settimeout(MEET_S)
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
    return user == os.geteuid()


def _prove(others: dict[int, socket.socket], rooms: SharedRooms) -> None:
    """Hand every user a byte to see."""
    room = rooms.take((1,), np.uint8)
    room[0] = PROOF
    for user, other in others.items():
        try:
            socket.send_fds(other, [b"proof"], [rooms.hand_out(room, [user])])
        except OSError:  # it is told so by what it gets
            other.close()


def _seen(first: socket.socket, user: int) -> str | None:
    """Why memory that the first rank hands out cannot be seen here, or None."""
    try:
        _, (file,) = _received(first)
        found = mapped(file, (1,), np.uint8, user)[0]
    except (OSError, ValueError, GivenUp) as error:
        return f"memory must be handed from process to process, got {type(error).__name__}: {error}"
    return None if found == PROOF else f"shared memory must hold {PROOF}, got {found}"
