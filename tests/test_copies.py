"""The exchange by copies: what lanes are given, in every order in which a device may do it. Over fake lanes, on the CPU."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from cosmos_fast import exchange, ops_exchange, peer_memory
from cosmos_fast.copies import READY, TAKEN, Copies, box
from cosmos_fast.exchange import Exchanged
from cosmos_fast.formats import EnvironmentProblem
from cosmos_fast.parallel import Group, Shard
from cosmos_fast.peer_memory import Driver, PeerMemory, obstacle
from cosmos_fast.self_attention import exact

Step = Callable[[], bool]
"""Does what the head of a lane says; False if it must wait."""


class Host:
    """All ranks in one process: their memory, their flags, and queues that a scheduler works off."""

    def __init__(self, size: int, *, slots: int, slot_bytes: int, one_queue: bool) -> None:
        self.size, self.one_queue = size, one_queue
        self.memory = torch.zeros(size, size, slots, slot_bytes, dtype=torch.uint8)
        self.flags: dict[tuple[int, int, int, int], int] = {}
        self.queues: dict[Any, deque[Step]] = {}
        self.ranks = [Lanes(self, rank, slots, slot_bytes) for rank in range(size)]

    def give(self, rank: int, lane: Any, step: Step) -> None:
        self.queues.setdefault((rank, "all" if self.one_queue else lane), deque()).append(step)

    def run(self, order: random.Random) -> int:
        """Until nothing moves; what is left then waits for ever."""
        moved = True
        while moved:
            moved = False
            for name in order.sample(sorted(self.queues, key=str), len(self.queues)):
                for _ in range(order.randint(1, 4)):
                    if self.queues[name] and self.queues[name][0]():
                        self.queues[name].popleft()
                        moved = True
        return sum(map(len, self.queues.values()))


class Lanes:
    """`copies.Peers` of one rank of a Host."""

    def __init__(self, host: Host, rank: int, slots: int, slot_bytes: int) -> None:
        self.host, self.rank, self.size, self.slots, self.slot_bytes = (
            host,
            rank,
            host.size,
            slots,
            slot_bytes,
        )
        self.used: set[Any] = set()
        self.start: list[bool] = []

    def begin(self) -> None:
        self.used, self.start = set(), []
        start = self.start
        self.host.give(self.rank, "main", lambda: start.append(True) or True)

    def end(self) -> Lanes.Ends:
        return Lanes.Ends(self)

    class Ends:
        def __init__(self, lanes: Lanes) -> None:
            self.lanes, self.done = lanes, []
            self.count = len(lanes.used)
            for lane in lanes.used:
                lanes.host.give(lanes.rank, lane, lambda: self.done.append(True) or True)

        def wait(self) -> None:
            self.lanes.host.give(self.lanes.rank, "main", self.is_done)

        def is_done(self) -> bool:
            return len(self.done) == self.count

    def outbox(self, peer: int, slot: int) -> Tensor:
        return self.host.memory[self.rank, peer, slot]

    def inbox(self, peer: int, slot: int) -> Tensor:
        return self.host.memory[peer, self.rank, slot]

    def copy(self, lane: Any, target: Tensor, source: Tensor) -> None:
        self._give(lane, lambda: target.copy_(source) is target)

    def tell(self, lane: Any, peer: int, flag: int, slot: int, value: int) -> None:
        self._give(lane, lambda: self.host.flags.update({(peer, flag, slot, self.rank): value}) is None)

    def await_(self, lane: Any, peer: int, flag: int, slot: int, value: int) -> None:
        self._give(lane, lambda: self.host.flags.get((self.rank, flag, slot, peer), 0) >= value)

    def is_idle(self) -> bool:
        return not any(queue for (rank, _), queue in self.host.queues.items() if rank == self.rank)

    def release(self, value: int) -> None:
        for flag, slot, peer in product((READY, TAKEN), range(self.slots), range(self.size)):
            self.host.flags[self.rank, flag, slot, peer] = value

    def _give(self, lane: Any, step: Step) -> None:
        if lane not in self.used:
            self.used.add(lane)
            start = self.start
            self.host.give(self.rank, lane, lambda: bool(start))
        self.host.give(self.rank, lane, step)


def messages(size: int, number: int, seed: int) -> list[list[list[int]]]:
    """counts[exchange][rank][peer]: rows, some of them none, some more than all slots hold."""
    draw = random.Random(seed)
    return [[[draw.choice((0, 1, 3, 17)) for _ in range(size)] for _ in range(size)] for _ in range(number)]


@pytest.mark.parametrize("one_queue", [False, True], ids=["lanes", "one queue"])
@pytest.mark.parametrize("size, slots", [(2, 2), (2, 3), (3, 2), (4, 4), (5, 2), (8, 1)])
def test_every_order_brings_what_an_all_to_all_brings(size: int, slots: int, one_queue: bool) -> None:
    """Even a device that does all lanes' work one after the other comes to the end."""
    for seed in range(8 if size < 8 else 3):
        host = Host(size, slots=slots, slot_bytes=20, one_queue=one_queue)
        ranks, counts = [Copies(lanes) for lanes in host.ranks], messages(size, 5, seed)
        results: list[tuple[Tensor, Tensor]] = []
        for count in counts:
            rows = [
                torch.randint(0, 256, (sum(count[r]), 7), dtype=torch.uint8) for r in range(size)
            ]  # 7 bytes a row: chunks end within rows
            for r, copies in enumerate(ranks):
                received = [count[peer][r] for peer in range(size)]
                arrived, work = copies.start(rows[r], count[r], received)
                work.wait()
                wanted = torch.cat([rows[peer].split(count[peer])[r] for peer in range(size)])
                results.append((arrived, wanted))
        assert host.run(random.Random(seed)) == 0, "lanes that wait for ever"
        assert all(torch.equal(found, wanted) for found, wanted in results)


def test_exchanges_under_way_at_once_keep_apart() -> None:
    """Two halves are sent before the first is awaited, as around an attention."""
    host = Host(2, slots=2, slot_bytes=8, one_queue=False)
    ranks = [Copies(lanes) for lanes in host.ranks]
    given = [[torch.full((6, 4), 10 * r + part, dtype=torch.uint8) for part in range(2)] for r in range(2)]
    works = [[copies.start(x, [3, 3], [3, 3]) for x in given[r]] for r, copies in enumerate(ranks)]
    for found in works:
        for _, work in found:
            work.wait()
    assert host.run(random.Random(0)) == 0
    for found in works:
        for part, (arrived, _) in enumerate(found):
            assert arrived[:, 0].tolist() == [part] * 3 + [10 + part] * 3


def test_a_slow_peer_holds_back_who_waits_for_it_alone() -> None:
    """Rank 2 never starts: 0 and 1 have all they sent each other all the same."""
    host = Host(3, slots=1, slot_bytes=4, one_queue=False)
    found = []
    for r in (0, 1):
        rows = torch.full((12, 4), r, dtype=torch.uint8)
        found.append(Copies(host.ranks[r]).start(rows, [4, 4, 4], [4, 4, 4])[0])
    assert host.run(random.Random(1)) > 0
    assert [x[4 * (1 - r), 0].item() for r, x in enumerate(found)] == [1, 0]


def test_giving_up_sets_flags_past_every_round() -> None:
    host = Host(2, slots=2, slot_bytes=4, one_queue=False)
    copies, told = Copies(host.ranks[0]), []
    copies.start(torch.zeros(14, 4, dtype=torch.uint8), [7, 7], [7, 7])  # rounds 1 to 4 of two slots
    host.ranks[0].release = lambda value: told.append(value) or host.queues.clear()  # type: ignore[method-assign, assignment]
    assert copies.give_up(5) and told == [4]
    assert copies.give_up(0) and told == [4], "released again though nothing waits"


class Careless(Lanes):
    """Like a stream: knows addresses, and keeps no tensor."""

    def _give(self, lane: Any, step: Step) -> None: ...

    def end(self) -> Any:
        done: list[bool] = []
        self.works.append(done)
        return SimpleNamespace(wait=lambda: None, is_done=lambda: bool(done))

    works: list[list[bool]]


def test_what_nobody_awaits_keeps_its_memory_until_it_is_done() -> None:
    host = Host(2, slots=2, slot_bytes=64, one_queue=False)
    lanes = Careless(host, 0, 2, 64)
    lanes.works, copies = [], Copies(lanes)

    def started(is_awaited: bool) -> Callable[[], list[bool]]:
        rows = torch.zeros(4, 8, dtype=torch.uint8)
        arrived, work = copies.start(rows, [2, 2], [2, 2])
        if is_awaited:
            work.wait()
        refs = weakref.ref(rows), weakref.ref(arrived)
        return lambda: [ref() is not None for ref in refs]

    dropped, awaited, other = started(False), started(True), started(False)
    gc.collect()
    assert dropped() == other() == [True, True] and awaited() == [False, False]
    lanes.works[0].append(True)  # done on the device
    started(True)
    gc.collect()
    assert dropped() == [False, False] and other() == [True, True]


@pytest.mark.parametrize("slots", [1, 2, 16])
def test_who_began_an_exchange_alone_does_not_come_to_an_end(slots: int) -> None:
    """So ranks whose devices are idle have begun the same: what `team` waits for before the next clip."""
    for alone in range(3):
        host = Host(3, slots=slots, slot_bytes=8, one_queue=False)
        ranks = [Copies(lanes) for lanes in host.ranks]
        for turn in range(3):
            for r, copies in enumerate(ranks):
                if turn < 2 or r == alone:
                    copies.start(torch.zeros(3, 8, dtype=torch.uint8), [1] * 3, [1] * 3)
            left = host.run(random.Random(turn))
            idle = [lanes.is_idle() for lanes in host.ranks]
            assert idle == [turn < 2 or r != alone for r in range(3)] and (left == 0) is (turn < 2)


def test_a_group_takes_the_copies_it_was_given() -> None:
    host = Host(2, slots=2, slot_bytes=64, one_queue=False)
    groups = [Group(r, 2, copies=Copies(lanes)) for r, lanes in enumerate(host.ranks)]
    found = [
        g.all_to_all(torch.full((5, 4), g.rank, dtype=torch.uint8), [2, 3], [2 + g.rank] * 2) for g in groups
    ]
    arrived = [exchange.wait() for exchange in found]
    assert host.run(random.Random(0)) == 0
    assert [x[:, 0].tolist() for x in arrived] == [[0, 0, 1, 1], [0, 0, 0, 1, 1, 1]]


class Threads(Lanes):
    """Lanes that are threads, under a caller that goes on at once, as a host beside its GPU."""

    def __init__(self, host: Host, rank: int, slots: int, slot_bytes: int, news: threading.Condition) -> None:
        super().__init__(host, rank, slots, slot_bytes)
        self.news, self.pools, self.given = news, defaultdict[Any, Any](lambda: ThreadPoolExecutor(1)), []

    def begin(self) -> None:
        self.given = []

    def end(self) -> Any:
        given = self.given

        class Work:
            def wait(self) -> None:
                for future in given:
                    future.result(timeout=20)

            def is_done(self) -> bool:
                return all(future.done() for future in given)

        return Work()

    def is_idle(self) -> bool:
        return all(future.done() for future in self.given)

    def release(self, value: int) -> None:
        with self.news:
            super().release(value)
            self.news.notify_all()

    def _give(self, lane: Any, step: Step) -> None:
        def work() -> None:
            with self.news:
                assert self.news.wait_for(step, timeout=20), f"rank {self.rank}: {lane} waits for ever"
                self.news.notify_all()

        self.given.append(self.pools[lane].submit(work))


@pytest.mark.parametrize("size, heads, parts", [(2, 4, 2), (2, 8, 4), (3, 6, 2), (4, 2, 2), (8, 8, 2)])
def test_attention_over_copies_is_that_of_one_rank(size: int, heads: int, parts: int) -> None:
    """Bit for bit what collectives are held to; (4, 2): more ranks than heads, keys to all, some messages empty."""
    tokens, K, generator = 37, 8, torch.Generator().manual_seed(heads)
    qkv = torch.randn(tokens, 3 * heads * K, generator=generator)
    angles = torch.randn(tokens, K // 2, generator=generator)
    rest = (*torch.randn(2, K, generator=generator), angles.cos(), angles.sin())
    host, news = Host(size, slots=2, slot_bytes=256, one_queue=False), threading.Condition()
    groups = [Group(r, size, copies=Copies(Threads(host, r, 2, 256, news))) for r in range(size)]

    def attend(group: Group) -> Tensor:
        own = Shard(group, tokens).split(qkv)
        return torch.stack([Exchanged(group, parts=parts)(own, *rest, step) for step in range(3)])

    with ThreadPoolExecutor(size) as pool:
        found = torch.cat(list(pool.map(attend, groups)), dim=1)
    wanted = exact(qkv, *rest, 0)
    bound = 0.0 if heads % size == 0 else 1e-6
    assert all((one - wanted).abs().max() <= bound for one in found)


def test_lanes_of_a_peer_that_never_comes_end_when_they_are_given_up() -> None:
    """Of both ranks that wait for the third, though each tells the other rounds that were long before."""
    host, news = Host(3, slots=2, slot_bytes=4, one_queue=False), threading.Condition()
    both = [Copies(Threads(host, r, 2, 4, news)) for r in (0, 1)]
    for copies in both:
        copies.start(torch.zeros(90, 4, dtype=torch.uint8), [30] * 3, [30] * 3)
    assert not any(copies.has_ended(0.05) for copies in both)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda copies: copies.give_up(10), both)) == [True, True]


# --- the lanes of a GPU, as far as there are none -----------------------------------------------------


def test_boxes_of_an_owner_do_not_overlap() -> None:
    for owner in range(4):
        assert [box(peer, owner) for peer in range(4) if peer != owner] == [0, 1, 2]


def test_what_keeps_ranks_from_reading_each_others_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    reached: set[tuple[int, int]] = {(0, 1)}
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: (one, other) in reached)
    two = [("h", "cuda", 0), ("h", "cuda", 1)]
    assert obstacle(0, two) is None
    assert "access from GPU to GPU, got none from 1 to 0" in str(obstacle(1, two))
    assert "one host" in str(obstacle(0, [("h", "cuda", 0), ("g", "cuda", 1)]))
    assert "of its own" in str(obstacle(0, [("h", "cuda", 0)] * 2))
    assert "need GPUs" in str(obstacle(0, [("h", "cpu", None)] * 2))


class Stream:
    """A stream that remembers what it was given."""

    def __init__(self, log: list[str], name: str = "") -> None:
        self.log, self.cuda_stream, self.name = log, len(log), name

    def wait_event(self, event: Any) -> None:
        self.log.append(f"{self.name} waits for {event.name}")


def test_flags_are_set_where_the_peer_looks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one rank sets lies where the other waits; slots behind the flags, a box for each peer."""
    size, slots, slot_bytes = 3, 5, 16
    memory = [torch.zeros(peer_memory.FLAGS + 2 * slots * slot_bytes, dtype=torch.uint8) for _ in range(size)]
    calls: list[tuple[str, int, int]] = []

    def rank(number: int) -> PeerMemory:
        made = object.__new__(PeerMemory)
        made.rank, made.size, made.slots, made.slot_bytes = number, size, slots, slot_bytes
        made._all, driver = memory, object.__new__(Driver)
        driver._set = lambda stream, address, value, flags: calls.append(("set", address, value)) or 0
        driver._await = lambda stream, address, value, flags: calls.append(("await", address, value)) or 0
        made._driver, made._stream = driver, lambda lane: Stream([])  # type: ignore[method-assign, assignment, return-value]
        return made

    for one in range(size):
        for other in set(range(size)) - {one}:
            for flag, slot in product((READY, TAKEN), range(slots)):
                rank(one).tell(("out", other), other, flag, slot, 7)
                rank(other).await_(("in", one), one, flag, slot, 7)
                (_, told, _), (_, awaited, _) = calls[-2:]
                base = memory[other].data_ptr()
                assert told == awaited and base <= told < base + peer_memory.FLAGS and told % 4 == 0
            for slot in range(slots):
                rank(one).outbox(other, slot).fill_(10 * one + other)
                assert (rank(other).inbox(one, slot) == 10 * one + other).all()
    told = {address for what, address, _ in calls if what == "set"}
    assert len(told) == size * (size - 1) * 2 * slots
    calls.clear()
    one = rank(1)
    one._aside = Stream([])  # type: ignore[assignment]
    one.release(9)
    assert {value for _, _, value in calls} == {9}
    base, found = memory[1].data_ptr(), {address for _, address, _ in calls}
    mine = {address for address in told if base <= address < base + peer_memory.FLAGS}
    assert mine < found and max(found) < base + peer_memory.FLAGS, (
        "every flag that a lane of this rank awaits"
    )
    for one in range(size):  # no box was written twice, no flag by a copy
        assert (memory[one][peer_memory.FLAGS :].view(2, -1).float().std(dim=1) == 0).all()
        assert not memory[one][: peer_memory.FLAGS].any()


def test_copies_ask_to_run_beside_computation() -> None:
    """One copy, in stream order, with the hint; a driver that does not take it leaves the copy to torch."""
    given: list[Any] = []
    driver = object.__new__(Driver)

    def batch(to: Any, of: Any, size: Any, count: int, how: Any, first: Any, kinds: int, stream: int) -> int:
        given.append(
            (to.value, of.value, size.value, count, how.order, how.flags, first.value, kinds, stream)
        )
        return 0

    driver._copy = batch
    assert driver.copy(5, 0x10, 0x20, 30) and given == [(0x10, 0x20, 30, 1, 1, 1, 0, 1, 5)]
    assert peer_memory.ctypes.sizeof(peer_memory.Attributes) == 24
    for refuses in (None, lambda *given: 801):
        driver._copy = refuses
        assert not driver.copy(5, 0x10, 0x20, 30)


def test_a_driver_that_refuses_is_an_environment_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = object.__new__(Driver)
    driver._set = lambda *given: 801
    with pytest.raises(EnvironmentProblem, match=r"^exchange: .*CUDA error 801"):
        driver.set(0, 0, 1)
    monkeypatch.setattr(peer_memory.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError("no driver")))
    with pytest.raises(EnvironmentProblem, match="no driver"):
        Driver()


@pytest.mark.parametrize("by_copies, tokens, parts", [(True, 9, 4), (True, 7, 1), (False, 9, 1)])
def test_copies_of_many_tokens_go_in_parts(
    by_copies: bool, tokens: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Collectives do not: on a GPU they wait for the attention that they would run beneath."""
    asked, pack = [], ops_exchange.qkv_packed
    monkeypatch.setattr(exchange, "LEAST_TOKENS", 8)
    monkeypatch.setattr(
        ops_exchange,
        "qkv_packed",
        lambda *given: asked.append(given[-1].stop - given[-1].start) or pack(*given),
    )
    alone = Group(copies=cast(Copies, object()) if by_copies else None)
    angles, gain = torch.randn(tokens, 4), torch.ones(8)
    Exchanged(alone)(torch.randn(tokens, 3 * 8 * 8), gain, gain, angles.cos(), angles.sin(), 0)
    assert asked == [8 // parts] * parts


def test_a_part_is_on_its_way_before_the_next_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what leaves first travels while the others are made."""
    seen, pack, send = [], ops_exchange.qkv_packed, exchange._send_packed
    monkeypatch.setattr(ops_exchange, "qkv_packed", lambda *given: seen.append("packed") or pack(*given))
    monkeypatch.setattr(exchange, "_send_packed", lambda *given: seen.append("sent") or send(*given))
    angles, gain = torch.randn(9, 4), torch.ones(8)
    Exchanged(Group(), parts=2)(torch.randn(9, 3 * 4 * 8), gain, gain, angles.cos(), angles.sin(), 0)
    assert seen == ["packed", "sent"] * 2
