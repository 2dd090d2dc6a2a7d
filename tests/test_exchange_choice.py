"""Which exchange ranks take, and that they all take the same, whatever one of them finds. Over gloo, lanes as threads.

`Mapped` stands in for `peer_memory.PeerMemory`: a file that all processes map in place of GPU memory, threads in place of streams.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import ranks
import torch
from torch import Tensor

from cosmos_fast import peer_memory
from cosmos_fast.cli_parallel import described, tell_exchange
from cosmos_fast.copies import box
from cosmos_fast.formats import CosmosFastError, EnvironmentProblem
from cosmos_fast.layout import Layout
from cosmos_fast.parallel import ALONE, Group, Mesh
from cosmos_fast.peer_memory import NoCopies
from cosmos_fast.recipe import Plan

CPU = torch.device("cpu")
FLAGS, SLOTS, SLOT_BYTES = 1024, 3, 8192


class Mapped:
    """fault: what goes wrong on the rank `faulty` of the world."""

    fault, faulty, here = "", 0, 0

    def __init__(self, group: Group, device: torch.device) -> None:
        self.fault = Mapped.fault if Mapped.here == Mapped.faulty else ""
        if self.fault == "driver":
            raise NoCopies("copies need a driver")
        if self.fault == "memory":
            raise torch.OutOfMemoryError("no 128 MiB left\nand a long story")
        self.rank, self.size, self.slots, self.slot_bytes = group.rank, group.size, SLOTS, SLOT_BYTES
        self.pools, self.given = defaultdict[Any, Any](lambda: ThreadPoolExecutor(1)), list[Future[Any]]()
        self.file = tempfile.NamedTemporaryFile(prefix="peer-")
        self.file.truncate(FLAGS + (self.size - 1) * SLOTS * SLOT_BYTES)
        self.is_dead = False

    def meet(self, group: Group) -> None:
        names = group.hear(self.file.name)
        if self.fault == "meet":
            raise OSError("no descriptor came")
        total = FLAGS + (self.size - 1) * SLOTS * SLOT_BYTES
        self.all = [torch.from_file(name, shared=True, size=total, dtype=torch.uint8) for name in names]

    def begin(self) -> None:
        self.started = len(self.given)

    def end(self) -> Any:
        given = self.given[self.started :]
        return SimpleNamespace(
            wait=lambda: [future.result(timeout=10) for future in given],
            is_done=lambda: all(future.done() for future in given),
        )

    def outbox(self, peer: int, slot: int) -> Tensor:
        return self._slot(self.rank, peer, slot)

    def inbox(self, peer: int, slot: int) -> Tensor:
        return self._slot(peer, self.rank, slot)

    def copy(self, lane: Any, target: Tensor, source: Tensor) -> None:
        flip = 1 if self.fault == "bytes" and lane[0] == "in" else 0
        self._give(lane, lambda: target.copy_(source ^ flip))

    def tell(self, lane: Any, peer: int, flag: int, slot: int, value: int) -> None:
        if self.fault not in ("silent", "stuck"):
            self._give(lane, lambda: self._flags(peer)[flag, slot, self.rank].fill_(value))

    def await_(self, lane: Any, peer: int, flag: int, slot: int, value: int) -> None:
        if self.fault == "refuses":
            raise NoCopies("copies need streams that await flags")

        def wait() -> None:
            while not self.is_dead and self._flags(self.rank)[flag, slot, peer] < value:
                time.sleep(2e-4)

        self._give(lane, wait)

    def is_idle(self) -> bool:
        return all(future.done() for future in self.given)

    def release(self, value: int) -> None:
        if Mapped.fault != "stuck":
            self._flags(self.rank).fill_(value)

    def _flags(self, owner: int) -> Tensor:
        return self.all[owner][: 4 * 2 * SLOTS * self.size].view(torch.int32).view(2, SLOTS, self.size)

    def _slot(self, owner: int, peer: int, slot: int) -> Tensor:
        return self.all[owner][FLAGS:].view(-1, SLOTS, SLOT_BYTES)[box(peer, owner), slot]

    def _give(self, lane: Any, work: Callable[[], Any]) -> None:
        self.given.append(self.pools[lane].submit(work))


def choices(context: int, cfg: int, faults: list[str], faulty: int, wanted: str) -> list[tuple[str, str]]:
    """On this rank, for every fault: the exchange that was taken, and what was told or raised."""
    mesh = Mesh.open(Plan(device="cpu", context=context, cfg=cfg))
    assert (mesh.exchange, mesh.notes) == ("collectives", ()), "a CPU needs no reason"
    open_copies, made = peer_memory.open_copies, []

    def opened(group: Group, device: torch.device) -> Any:
        return open_copies(group, CPU)

    class Kept(Mapped):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            made.append(self)

    peer_memory.obstacle = lambda rank, everyone: None
    peer_memory.PeerMemory, peer_memory.open_copies, peer_memory.PROOF_S = Kept, opened, 0.4
    Mapped.faulty, Mapped.here = faulty, mesh.ranks.rank
    found = []
    for Mapped.fault in faults:
        try:
            gpu: Any = SimpleNamespace(type="cuda", index=mesh.ranks.rank)
            group, notes = peer_memory.exchanging(mesh.context, mesh.world, wanted, gpu)
            taken = Mesh(mesh.ranks, mesh.device, mesh.world, group, mesh.cfg, notes)
            check(group, mesh.context)
            found.append((taken.exchange, "".join(notes)))
            if group.copies is None:
                assert all(peers.is_idle() for peers in made if hasattr(peers, "all")), "lanes wait on"
        except CosmosFastError as error:
            found.append((type(error).__name__, str(error)))
        for peers in made:
            peers.is_dead = True
    mesh.close()
    return found


def check(group: Group, plain: Group) -> None:
    """An all-to-all of the group is that of collectives, also after copies were given up."""
    for turn in range(3):
        rows = torch.full((2 * group.size, 5000), 10 * turn + group.rank, dtype=torch.uint8)
        counts = [2] * group.size
        assert torch.equal(
            group.all_to_all(rows, counts, counts).wait(), plain.all_to_all(rows, counts, counts).wait()
        )


FAULTS = {
    "": ("copies", ""),
    "driver": ("collectives", "copies need a driver, on rank 1."),
    "memory": ("collectives", "OutOfMemoryError: no 128 MiB left, on rank 1."),
    "meet": ("collectives", "OSError: no descriptor came, on rank 1."),
    "refuses": (
        "collectives",
        "got nothing within 0 s, on rank 0; copies need streams that await flags, on rank 1.",
    ),
    "bytes": ("collectives", "copies must bring what collectives bring, got other bytes, on rank 1."),
    "silent": ("collectives", "got nothing within 0 s, on rank 0."),
}


def test_auto_takes_copies_where_all_ranks_prove_them() -> None:
    """What one rank alone finds wrong, all are told, in the same words; after every fault the next try works."""
    faults = [fault for other in FAULTS for fault in (other, "")]
    zero, one = ranks.run(2, choices, 2, 1, faults, 1, "auto")
    assert zero == one
    for fault, (exchange, told) in zip(faults, zero, strict=True):
        assert exchange == FAULTS[fault][0] and told.endswith(FAULTS[fault][1]), (fault, exchange, told)
        assert told.startswith("exchange: by collectives, not by copies: ") or not told


def test_one_group_without_copies_leaves_none_with_them() -> None:
    """cfg=2: two groups share tokens, rank 3 is number 1 of the second."""
    found = ranks.run(4, choices, 2, 2, ["", "bytes", "driver"], 3, "auto")
    assert all(one == found[0] for one in found)
    assert [exchange for exchange, _ in found[0]] == ["copies", "collectives", "collectives"]


def test_copies_that_were_asked_for_are_an_error_where_there_are_none() -> None:
    """And lanes that do not even end when they are given up are one for "auto" too."""
    for wanted, fault, kind, text in (
        ("copies", "bytes", "NoCopies", "got other bytes, on rank 1. Take exchange auto or collectives."),
        ("auto", "stuck", "EnvironmentProblem", "got some that wait. Start anew with exchange collectives."),
    ):
        zero, one = ranks.run(2, choices, 2, 1, [fault], 1, wanted)
        assert zero == one and zero[0][0] == kind and zero[0][1].endswith(text), zero
    assert issubclass(NoCopies, EnvironmentProblem)


def test_who_needs_no_copies_opens_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_memory, "open_copies", lambda *given: pytest.fail("opened"))
    two, gpu = Group(0, 2), torch.device("cuda", 0)
    for group, wanted, device in (
        (ALONE, "copies", gpu),
        (two, "collectives", gpu),
        (two, "auto", CPU),
    ):
        assert peer_memory.exchanging(group, ALONE, wanted, device) == (group, ())


def test_what_users_are_told() -> None:
    def told(**changes: Any) -> list[str]:
        found: list[str] = []
        mesh: Any = {
            "context": Group(0, 2),
            "device": torch.device("cuda"),
            "exchange": "copies",
            "notes": (),
        }
        tell_exchange(SimpleNamespace(**mesh | changes), found.append)  # type: ignore[arg-type]
        return found

    assert told() == ["exchange: by copies."]
    assert told(notes=("exchange: by collectives, why",)) == ["exchange: by collectives, why"]
    assert told(context=ALONE) == told(device=CPU) == []
    assert Mesh.alone("cpu").exchange == "none"
    shared, auto = Layout(1, 2, 1), {"exchange": "auto", "device": None}
    assert described(shared, auto).endswith(
        "exchange auto: copies if they prove themselves at the start, else collectives"
    )
    assert described(shared, auto | {"device": "cpu"}).endswith("cfg=1, exchange auto")
    assert described(shared, auto | {"exchange": "copies"}).endswith("cfg=1, exchange copies")
    assert described(Layout(2), auto) == str(Layout(2))
