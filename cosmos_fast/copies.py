"""An exchange between ranks that computes nothing: each rank copies what is meant for it out of the others' memory.

    sender     rows for a peer -> a slot that the peer can read; then tell it "ready"
    receiver   await "ready"; slot of the peer -> where the rows belong; then tell it "taken"

Between each two ranks, in each direction, runs a pipe of a few slots. Rows travel through it in chunks of a slot, numbered
from the first one on; a flag holds how many chunks are ready, or taken. Copies and waits are given to lanes, each of which
does what it is given in order, beside the others and beside whatever computes. `peer_memory` has the lanes of a GPU.

Waits cannot form a circle: in every round a rank puts one chunk for each peer before it takes one from any, so even if a
device did all lanes' work one after the other, what is awaited would have been given before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Final, Protocol

from torch import Tensor

READY: Final = 0
TAKEN: Final = 1


class Work(Protocol):
    def wait(self) -> object:
        """What the caller computes next comes after the copies."""


class Peers(Protocol):
    """This rank among those that read each other's memory. A lane is named by a word and the peer it serves."""

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

    def copy(self, lane: tuple[str, int], target: Tensor, source: Tensor) -> None: ...

    def tell(self, lane: tuple[str, int], peer: int, flag: int, value: int) -> None:
        """Set this rank's flag in the peer's memory, once all that the lane was given before is done and can be seen."""

    def await_(self, lane: tuple[str, int], peer: int, flag: int, value: int) -> None:
        """Hold the lane until the peer's flag in this rank's memory is `value` or more."""


class Copies:
    """The all-to-all of `parallel.Group` over `peers`. All ranks must start the same exchanges in the same order."""

    def __init__(self, peers: Peers) -> None:
        self.peers = peers
        self._put_so_far, self._taken_so_far = [0] * peers.size, [0] * peers.size

    def start(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> tuple[Tensor, Work]:
        """What arrives, and when; shapes as `Group.all_to_all`. `rows` must stay as they are until then."""
        peers, me = self.peers, self.peers.rank
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        to = [part.view(-1).split(peers.slot_bytes) for part in rows.split(list(sent))]
        of = [part.view(-1).split(peers.slot_bytes) for part in arrived.split(list(received))]
        others = [(me + turn) % peers.size for turn in range(1, peers.size)]
        peers.begin()
        for target, source in zip(of[me], to[me], strict=True):
            peers.copy(("own", me), target, source)
        rounds = zip_longest(*(zip_longest(to[peer], of[peer]) for peer in others), fillvalue=(None, None))
        for chunks in rounds:
            for peer, (chunk, _) in zip(others, chunks, strict=True):
                self._put(peer, chunk)
            for peer, (_, chunk) in zip(others, chunks, strict=True):
                self._take(peer, chunk)
        return arrived, peers.end()

    def _put(self, peer: int, chunk: Tensor | None) -> None:
        if chunk is None or len(chunk) == 0:
            return
        number, lane, slots = self._put_so_far[peer], ("out", peer), self.peers.slots
        if number >= slots:
            self.peers.await_(lane, peer, TAKEN, number - slots + 1)
        self.peers.copy(lane, self.peers.outbox(peer, number % slots)[: len(chunk)], chunk)
        self.peers.tell(lane, peer, READY, number + 1)
        self._put_so_far[peer] += 1

    def _take(self, peer: int, chunk: Tensor | None) -> None:
        if chunk is None or len(chunk) == 0:
            return
        number, lane = self._taken_so_far[peer], ("in", peer)
        self.peers.await_(lane, peer, READY, number + 1)
        self.peers.copy(lane, chunk, self.peers.inbox(peer, number % self.peers.slots)[: len(chunk)])
        self.peers.tell(lane, peer, TAKEN, number + 1)
        self._taken_so_far[peer] += 1


def box(peer: int, owner: int) -> int:
    """Number of the boxes for `peer` among those of `owner`, who has none for itself."""
    return peer - (peer > owner)
