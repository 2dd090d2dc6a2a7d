"""The ranks of one command: who leads, what they tell one another, and how each learns that another failed.

Groups of ranks take clips from one queue. The first rank of a group leads: it alone claims, screens, writes and
decides; the others follow its tasks and, after every step and every part, its word. All of it goes over a key-value
store, never over collectives, because a rank that waits in a collective for a dead one cannot be told anything. A thread
of every rank beats, watches the others, and ends its process when the main thread cannot: what waits in a collective is
beyond exceptions. Whoever started the ranks then kills the rest, so nothing waits longer than SILENT_S + PATIENCE_S.

Ranks trust whoever reaches the store's port, like everything built on torch.distributed: see docs/parallel.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch.distributed import PrefixStore, Store

from .clip_plan import ClipPlan
from .formats import ClipError, CosmosFastError, GivenUp
from .launch import die_with_parent
from .layout import Layout
from .motion import Motion, place
from .outputs import of_all
from .parallel import Ranks, join
from .solo import Solo
from .team_store import LEFT, Pulse, connect, put, take, text

T = TypeVar("T")

BEAT_S = 0.5
"""How often a rank gives a sign of life and looks for those of the others."""
PATIENCE_S = 5.0
"""How long a rank may take to come back from a clip that another gave up, or three of its steps if that is longer."""
STALLED_S, STALLED_STEPS = 25.0, 8.0
"""A step is stuck after so many seconds and so many times the slowest one before it."""
STILL_S = 25.0
"""A rank hangs that does nothing at all for so long and waits for no other process: loading, in the VAE, writing."""
COLLECTIVE_S = 600.0
"""Longest wait in an exchange while all others work. The longest honest one: for one rank to load an encoder."""


class Elsewhere(CosmosFastError):
    """The run ends for a reason that another rank tells; this one only takes its exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("the run was ended by another rank")
        self.exit_code = exit_code


class Halted(CosmosFastError):
    """The leader gave up the clip."""


def open_team() -> Solo:
    """The team of this process: of many ranks under torchrun or `generate --gpus`, else of one."""
    ranks = Ranks.from_environment()
    return Solo() if ranks.size == 1 else Team(connect(ranks), ranks)


class Team(Solo):
    """This rank among the others. `enter` a layout before making clips; `close` at the end."""

    def __init__(self, store: Store, ranks: Ranks) -> None:
        self.store, self.ranks, self.started = store, ranks, ranks.size
        self.is_first = ranks.rank == 0
        self.is_supervised = store.check(["supervisor"])
        self.group = self.generation = 0
        self.world = ""  # not in a layout yet
        self._motion, self._waits = Motion(), False
        self._main = threading.main_thread().ident
        self._pulse = Pulse(store)
        self._closed = threading.Event()
        self._deadline: float | None = None  # by when the main thread must be back from a clip given up
        self._since: float | None = None  # when the step under way began
        self._slowest_s = 0.0  # of the steps of this shape of clip; 0 before the second step
        self._shape: Any = None
        self._queued: torch.cuda.Event | None = None
        self._task = self._word = self._count = 0
        self._is_stopping = False
        self._abandon: Callable[[str], None] | None = None
        if self.is_supervised:
            die_with_parent(int(store.get("supervisor")))
        self._beat()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def enter(self, layout: Layout) -> None:
        """Take this rank's place: from here on RANK and WORLD_SIZE are those of its group, a world of its own."""
        rank = self.ranks.rank
        self.group, self.index = divmod(rank, layout.size)
        self.generation = int(text(self.store, f"generation/{self.group}") or 0)
        self.world = f"{self.group}.{self.generation}"
        self.layout, self.is_leader = layout, self.index == 0
        self.label = f"[rank {rank}] " if layout.size == 1 else f"[ranks {rank}-{rank + layout.size - 1}] "
        os.environ |= {"RANK": str(self.index), "WORLD_SIZE": str(layout.size)}

    def device(self, wanted: str | None) -> str | None:
        """The device for this rank's Plan, its world joined: a group of several finds its own by LOCAL_RANK."""
        found = self.ranks.device(wanted)
        if found.type == "cuda":
            torch.cuda.set_device(found)
        if self.layout.size == 1:
            return str(found)
        store = PrefixStore(f"world/{self.world}", connect(self.ranks, again=True))
        join(
            Ranks(self.index, self.layout.size, self.ranks.local), found, timeout_s=COLLECTIVE_S, store=store
        )
        return found.type

    # --- among all ranks ---

    def share(self, key: str, make: Callable[[], T]) -> T:
        if self.is_first and not self.store.check([f"shared/{key}"]):
            try:
                value = make()
            except CosmosFastError:
                put(self.store, f"shared/{key}", None)
                raise
            put(self.store, f"shared/{key}", (value,))
            return value
        found = take(self.store, self._await(f"shared/{key}"))
        if found is None:
            raise Elsewhere(1)
        return found[0]  # type: ignore[no-any-return]

    def fatal(self, problems: Sequence[str], exit_code: int) -> bool:
        """Say why the run cannot go on; True for the rank that said it first where no parent does the telling."""
        mine = json.dumps({"rank": self.ranks.rank, "problems": list(problems), "exit_code": exit_code})
        return self.store.compare_set("fatal", "", mine).decode() == mine and not self.is_supervised

    def order(self, clips: Sequence[ClipPlan]) -> Iterator[ClipPlan]:
        """From the queue of all groups; with several the longest first, so that none ends long after the others."""
        queue = list(super().order(clips))
        if self.layout.groups > 1:
            turn = {model: i for i, model in enumerate(dict.fromkeys(clip.model for clip in queue))}
            queue.sort(key=lambda clip: (turn[clip.model], -clip.tflop["total"]))
        while (i := self.store.add("queue", 1) - 1) < len(queue):
            self.store.set(f"taken/{self.group}", queue[i].name)
            yield queue[i]

    def told(self, clip: ClipPlan, status: str, message: str = "") -> None:
        self.store.set(f"clip/{clip.name}", f"{status} {message}")
        self.store.delete_key(f"taken/{self.group}")

    def split(self, items: Sequence[T]) -> Sequence[T]:
        return items[self.group :: self.layout.groups]

    def meet(self, what: str, check: Callable[[], None]) -> None:
        self.store.set(f"met/{what}/{self.group}", "1")
        groups = range(self.layout.groups)
        keys = [(f"met/{what}/{g}", f"ended/{g}") for g in groups]
        with self._waiting():
            while not all(self.store.check([met]) or self.store.check([ended]) for met, ended in keys):
                check()
                time.sleep(0.1)

    def close(self, exit_code: int) -> int:
        """Ends the followers' tasks; where nobody supervises, waits for the other groups, whom an early end would end."""
        if self.is_leader:
            self._tell(("end", exit_code))
            self.store.set(f"ended/{self.group}", str(exit_code))
        if not self.is_supervised:
            ends = (self.store.get(self._await(f"ended/{g}")) for g in range(self.layout.groups))
            exit_code = of_all(int(code) for code in ends)
        self._closed.set()
        self._thread.join()
        self.store.set(f"beat/{self.ranks.rank}", LEFT)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return 0 if self.is_supervised else exit_code

    # --- the leader ---

    def _tell(self, task: tuple[str, Any]) -> None:
        if self.layout.size > 1:
            self._task, self._word = self._task + 1, 0
            put(self.store, self._key("task"), task)

    def open(self, model: str) -> None:
        self._tell(("open", model))

    @contextlib.contextmanager
    def making(self, clip: ClipPlan, abandon: Callable[[str], None]) -> Iterator[None]:
        self._abandon = abandon
        if self.layout.size == 1:
            yield
            return
        self._tell(("clip", clip))
        self._begin(clip)
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:
            error = caught
            self._limit()
            self.store.set(self._key("word", self._word), "stop")
        self._settle()
        if fault := text(self.store, self._key("fault")):
            raise ClipError(fault) from error
        if error is not None:
            raise error

    def _settle(self) -> None:
        """All followers back and every device idle: then each exchange that one rank began, all have ended."""
        self._rest()
        _synchronize()
        for index in range(1, self.layout.size):
            self._await(self._key("back", index))
        self._deadline = None
        for word in range(self._word + 1):
            self.store.delete_key(self._key("word", word))

    def parts(self, parts: Iterator[T]) -> Iterator[T]:
        for part in parts:
            self._rest()  # writing takes as long as the disk likes
            yield part
            self._go()

    def step(self) -> None:
        self._rest()
        if fault := text(self.store, self._key("fault")):
            raise ClipError(fault)
        self._go()
        self._work()

    def _go(self) -> None:
        if self.layout.size > 1:
            self.store.set(self._key("word", self._word), "go")
            self._word += 1

    # --- the followers ---

    def tasks(self) -> Iterator[tuple[str, Any]]:
        """("open", model), ("clip", plan), ..., until the leader ends."""
        while True:
            self._task, self._word = self._task + 1, 0
            kind, value = take(self.store, self._await(self._key("task")))
            if kind == "end":
                return
            yield kind, value

    def heed(self, is_step: bool) -> None:
        """What a follower does after every step and every part: go on when the leader does. Raises Halted."""
        self._rest()
        word = self.store.get(self._await(self._key("word", self._word)))
        self._word += 1
        if word != b"go":
            raise Halted("the leader gave up the clip")
        if is_step:
            self._work()

    @contextlib.contextmanager
    def following(self, clip: ClipPlan, describe: Callable[[BaseException], str]) -> Iterator[None]:
        """While a follower helps with a clip: its failure is told to the others, not raised."""
        self._begin(clip)
        try:
            yield
        except (Halted, GivenUp):  # the leader tells why
            pass
        except (
            Exception
        ) as error:  # whatever it is, it is the leader's to tell, as the end of this clip alone
            self.fault(describe(error))
        self._rest()
        _synchronize()
        self._deadline = None
        self.store.set(self._key("back", self.index), "1")

    def fault(self, message: str) -> None:
        """Tell the group what happened to this rank, if it is the first to tell."""
        self._limit()
        where = f"rank {self.ranks.rank} ({self.ranks.size} in all)"
        self.store.compare_set(self._key("fault"), "", f"{where}: {message}")

    # --- time ---

    def _key(self, *parts: Any) -> str:
        return "/".join(map(str, (self.world, self._task, *parts)))

    def _begin(self, clip: ClipPlan) -> None:
        if (shape := (clip.model, clip.tokens)) != self._shape:
            self._shape, self._slowest_s = shape, 0.0
        self._since = self._queued = None

    def _work(self) -> None:
        """The clock of a step starts. The host runs at most one step ahead, or its clock would not be the device's."""
        if torch.cuda.is_initialized():
            before, self._queued = self._queued, torch.cuda.Event()
            self._queued.record()
            if before is not None:
                before.synchronize()
        self._since = time.monotonic()

    def _rest(self) -> None:
        """The clock stops: what follows may take long."""
        if self._since is not None:
            self._slowest_s = max(time.monotonic() - self._since, self._slowest_s)
        self._since = None

    def _limit(self) -> None:
        """From now on the main thread has a little time to come back."""
        self._deadline = self._deadline or time.monotonic() + max(PATIENCE_S, 3 * self._slowest_s)

    def _await(self, key: str) -> str:
        """The key, when it exists. Polls: a wait inside the store would keep the beating thread from it."""
        pause = 2e-4
        with self._waiting():
            while not self.store.check([key]):
                time.sleep(pause)
                pause = min(2 * pause, 0.02)
        return key

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """For other ranks, which are watched where they run."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    # --- the watching thread ---

    def _watch(self) -> None:
        while not self._closed.wait(BEAT_S):
            try:
                self._beat()
                self._look()
            except RuntimeError:  # the store is gone, and with it whoever started this run
                os._exit(1)

    def _beat(self) -> None:
        frame = sys._current_frames().get(self._main or 0)
        self._count += 1
        self.store.set(f"beat/{self.ranks.rank}", f"{self._count} {place(frame)}")

    def _look(self) -> None:
        if self.is_leader and not self._is_stopping and (number := text(self.store, "stop")):
            self._is_stopping = True
            os.kill(
                os.getpid(), int(number)
            )  # its handler runs in the main thread, which stops between two steps
        if self.world and (still_s := self._motion.still_s(self._waits)) > STILL_S:
            self._lose(
                f"rank {self.ranks.rank} ({self.ranks.size} in all) did nothing for {still_s:.0f} s (at {self._where()})"
            )
        if self.layout.size == 1:
            return
        if reason := text(self.store, f"lost/{self.world}"):
            self._die(reason)
        for rank in self.layout.members(self.group):
            if (silent_s := self._pulse.silent_s(rank)) > self._pulse.limit_s and rank != self.ranks.rank:
                self._lose(
                    f"rank {rank} gave no sign of life for {silent_s:.0f} s (at {self._pulse.place(rank)})"
                )
        fault, now, since = text(self.store, self._key("fault")), time.monotonic(), self._since
        if fault:
            self._limit()
        if self._deadline is not None and now > self._deadline:
            self._lose(
                fault or f"rank {self.ranks.rank} did not come back from a clip given up (at {self._where()})"
            )
        if since and self._slowest_s and now - since > max(STALLED_S, STALLED_STEPS * self._slowest_s):
            self._lose(f"no step ended for {now - since:.0f} s: {self._places()}")

    def _where(self) -> str:
        return place(sys._current_frames().get(self._main or 0))

    def _places(self) -> str:
        members = self.layout.members(self.group)
        return ", ".join(f"rank {rank} at {self._pulse.place(rank)}" for rank in members)

    def _lose(self, reason: str) -> None:
        """This group cannot go on: the first reason counts."""
        self._die(self.store.compare_set(f"lost/{self.world}", "", reason).decode())

    def _die(self, reason: str) -> None:
        if self._closed.is_set():
            return
        if self.is_leader and not self.is_supervised and self._abandon is not None:
            self._abandon(reason)
        os._exit(1)


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
