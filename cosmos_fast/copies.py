"""An exchange between ranks that computes nothing: each rank copies what is meant for it out of the others' memory.

    sender     rows for a peer -> a slot that the peer can read; then tell it "ready"
    receiver   await "ready"; slot of the peer -> where the rows belong; then tell it "taken"

Between each two ranks, in each direction, runs a pipe of a few slots. Rows travel through it in chunks of a slot, one slot
after the other, round after round; flags of each slot hold the last round that is ready, or taken. Copies and waits are
given to lanes, each of which does what it is given in order, beside the others and beside whatever computes. `peer_memory`
has the lanes of a GPU.

Waits cannot form a circle: in every turn a rank puts one chunk for each peer before it takes one from any, so even if a
device did all lanes' work one after the other, what is awaited would have been given before it.

Rounds are counted by every rank for itself and never start anew, so what was given cannot be given once more (a recorded
CUDA graph would), and ranks whose counts differ can only part. They differ where one rank alone began an exchange; then
its lanes wait, and nobody who waits for its device takes it for done.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import zip_longest
from typing import Final, Protocol

from torch import Tensor

READY: Final = 0
TAKEN: Final = 1

Lane = tuple[str, int]
"""What it does, for which peer."""

PATIENCE_S: Final = 5.0
"""How long lanes may take to come to an end before what they wait for is given up."""


class Work(Protocol):
    def wait(self) -> object:
        """What the caller computes next comes after the copies."""

    def is_done(self) -> bool:
        """Whether nothing is left to copy."""


class Peers(Protocol):
    """This rank among those that read each other's memory."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def slots(self) -> int:
        """Of each pipe."""

    @property
    def slot_bytes(self) -> int: ...

    def begin(self) -> None:
        """What lanes are given from now on comes after all that the caller has computed so far."""

    def end(self) -> Work:
        """Of what lanes were given since `begin`."""

    def outbox(self, peer: int, slot: int) -> Tensor:
        """(slot_bytes,) uint8 of this rank, which the peer reads."""

    def inbox(self, peer: int, slot: int) -> Tensor:
        """The outbox of the peer for this rank."""

    def copy(self, lane: Lane, target: Tensor, source: Tensor) -> None: ...

    def tell(self, lane: Lane, peer: int, flag: int, slot: int, value: int) -> None:
        """Set this rank's flag in the peer's memory, once all that the lane was given before is done and can be seen."""

    def await_(self, lane: Lane, peer: int, flag: int, slot: int, value: int) -> None:
        """Hold the lane until the peer's flag in this rank's memory is `value` or more."""

    def is_idle(self) -> bool:
        """Whether every lane has done all that it was given."""

    def release(self, value: int) -> None:
        """Set all flags in this rank's memory, past every lane: its own are as good as lost."""


class UnderWay:
    """Copies that were started. Their tensors are kept until somebody awaits them, or they are done."""

    def __init__(self, work: Work, tensors: tuple[Tensor, ...], others: list[UnderWay]) -> None:
        self._work, self._tensors, self._others = work, tensors, others
        others[:] = [other for other in others if not other.is_done()]
        others.append(self)

    def wait(self) -> None:
        self._work.wait()
        if self in self._others:
            self._others.remove(self)

    def is_done(self) -> bool:
        return self._work.is_done()


class Copies:
    """The all-to-all of `parallel.Group` over `peers`. All ranks must start the same exchanges in the same order."""

    def __init__(self, peers: Peers) -> None:
        self.peers = peers
        self._put_so_far, self._taken_so_far = [0] * peers.size, [0] * peers.size
        self._unawaited: list[UnderWay] = []

    def start(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> tuple[Tensor, UnderWay]:
        """What arrives, and when; shapes as `Group.all_to_all`. `rows` must stay as they are until then."""
        peers, me = self.peers, self.peers.rank
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        to = [part.view(-1).split(peers.slot_bytes) for part in rows.split(list(sent))]
        of = [part.view(-1).split(peers.slot_bytes) for part in arrived.split(list(received))]
        others = [(me + turn) % peers.size for turn in range(1, peers.size)]
        peers.begin()
        for target, source in zip(of[me], to[me], strict=True):
            peers.copy(("own", me), target, source)
        turns = zip_longest(*(zip_longest(to[peer], of[peer]) for peer in others), fillvalue=(None, None))
        for chunks in turns:
            for peer, (chunk, _) in zip(others, chunks, strict=True):
                self._put(peer, chunk)
            for peer, (_, chunk) in zip(others, chunks, strict=True):
                self._take(peer, chunk)
        return arrived, UnderWay(peers.end(), (rows, arrived), self._unawaited)

    def _put(self, peer: int, chunk: Tensor | None) -> None:
        if chunk is None or len(chunk) == 0:
            return
        lane, slot, turn = self._next("out", peer, self._put_so_far)
        if turn > 1:
            self.peers.await_(lane, peer, TAKEN, slot, turn - 1)
        self.peers.copy(lane, self.peers.outbox(peer, slot)[: len(chunk)], chunk)
        self.peers.tell(lane, peer, READY, slot, turn)

    def _take(self, peer: int, chunk: Tensor | None) -> None:
        if chunk is None or len(chunk) == 0:
            return
        lane, slot, turn = self._next("in", peer, self._taken_so_far)
        self.peers.await_(lane, peer, READY, slot, turn)
        self.peers.copy(lane, chunk, self.peers.inbox(peer, slot)[: len(chunk)])
        self.peers.tell(lane, peer, TAKEN, slot, turn)

    def _next(self, what: str, peer: int, counts: list[int]) -> tuple[Lane, int, int]:
        """Lane, slot and round, from 1 on, of the next chunk."""
        turn, slot = divmod(counts[peer], self.peers.slots)
        counts[peer] += 1
        return (what, peer), slot, turn + 1

    def has_ended(self, within_s: float) -> bool:
        """Whether all that was started has arrived, and left, by then. Holds up nothing but the caller."""
        until = time.monotonic() + within_s
        while not (ended := self.peers.is_idle()) and time.monotonic() < until:
            time.sleep(0.001)
        return ended

    def give_up(self, within_s: float) -> bool:
        """Let lanes pass whatever they wait for, until none is left; whether that is so by then.

        What arrives is of no use any more, here and at the peers: all of them must give up.
        """
        until = time.monotonic() + within_s
        past = max(*self._put_so_far, *self._taken_so_far) // self.peers.slots + 1
        while not (ended := self.peers.is_idle()) and time.monotonic() < until:
            self.peers.release(past)  # again and again: peers that give up tell lower rounds
            time.sleep(0.01)
        return ended

    def close(self) -> None:
        """Leave no lane that waits: whoever frees memory, or waits for the device, would wait with it."""
        if not self.has_ended(PATIENCE_S):
            self.give_up(PATIENCE_S)


def box(peer: int, owner: int) -> int:
    """Number of the boxes for `peer` among those of `owner`, who has none for itself."""
    return peer - (peer > owner)
