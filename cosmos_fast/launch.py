"""The process that starts ranks and watches them: no model, no device, only processes, a store and the output folder.

`supervise` starts one process of the same command per rank, as torchrun would, and ends when all have ended. A rank that
dies costs the clip its group was making: the rest of the group is killed, the clip recorded as failed, the group started
anew for the clips that are left. What concerns every clip, such as missing weights, ends the run at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.distributed import PrefixStore, TCPStore

from .clip_plan import ClipPlan
from .formats import CosmosFastError
from .guards import Claim, StopFlag
from .layout import Layout
from .outputs import OutputFolder, exit_code
from .team_store import Pulse, put, text

COMMAND = (sys.executable, "-m", "cosmos_fast.cli")
"""What a rank runs, its arguments those of this process."""

POLL_S = 0.1
START_S = 120.0
"""Time for a process to import torch and report for work."""
KILL_S = 10.0
"""How long to wait for a killed process to be gone, with its memory."""
MOST_LOSSES = 3
"""Groups in a row that may be lost without a clip done between, before the run ends."""


@dataclass
class Outcome:
    """How a run ended: what became of every clip, by name, and why it ended early, if it did."""

    status: dict[str, tuple[str, str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    exit_code: int = 0


@dataclass
class _Rank:
    process: subprocess.Popen[bytes]
    started: float


class Supervisor:
    """One run. `shared`: what rank 0 need not work out again, by key. report: one line for a person."""

    def __init__(
        self, arguments: Sequence[str], layout: Layout, clips: Sequence[ClipPlan], folder: OutputFolder, *,
        shared: dict[str, Any], report: Callable[[str], None], grace_s: float,
    ) -> None:  # fmt: skip
        self.arguments, self.layout, self.clips, self.folder = arguments, layout, clips, folder
        self.report, self.grace_s = report, grace_s
        self.hashes = {clip.name: clip.spec.hash() for clip in clips}
        # Bound to this host alone; the port is taken before anyone is told of it.
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        self._host = TCPStore(
            "127.0.0.1", self.port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        self.store = PrefixStore("cosmos-fast/0", self._host)
        self.store.set("supervisor", str(os.getpid()))
        for key, value in shared.items():
            put(self.store, f"shared/{key}", (value,))
        self.pulse = Pulse(self.store)
        self.ranks: dict[int, _Rank] = {}
        self.outcome = Outcome()
        self._generation = [0] * layout.groups
        self._losses = self._done_before = 0

    def run(self, stop: StopFlag) -> Outcome:
        """Start all, wait for all. Raises nothing for what happens to ranks; kills them if it is itself interrupted."""
        asked_at: float | None = None
        try:
            for group in range(self.layout.groups):
                self._start(group)
            while self.ranks:
                time.sleep(POLL_S)
                if stop.requested and asked_at is None:
                    asked_at = time.monotonic()
                    self.store.set("stop", str(int(stop.signal or signal.SIGTERM)))
                if asked_at is not None and time.monotonic() - asked_at > self.grace_s:
                    break
                self._look(is_stopping=asked_at is not None)
        finally:
            self._kill(list(self.ranks))
        if stop.requested:
            for group in range(self.layout.groups):
                if name := text(self.store, f"taken/{group}"):
                    self._clean(name, None)
            self.outcome.exit_code = stop.exit_code
        self._collect()
        return self.outcome

    def _look(self, is_stopping: bool) -> None:
        for rank in list(self.ranks):
            if rank not in self.ranks:
                continue  # its group went a moment ago
            code, reason = self.ranks[rank].process.poll(), None
            if code is not None:
                del self.ranks[rank]
                reason = None if code == 0 or is_stopping else _ending(rank, self.layout.ranks, code)
            elif (silent_s := self.pulse.silent_s(rank)) > self.pulse.limit_s:
                reason = (
                    f"rank {rank} gave no sign of life for {silent_s:.0f} s (at {self.pulse.place(rank)})"
                )
            elif (
                not self.store.check([f"beat/{rank}"])
                and time.monotonic() - self.ranks[rank].started > START_S
            ):
                reason = f"rank {rank} did not report for work within {START_S:.0f} s"
            if reason is not None:
                self._lost(rank // self.layout.size, reason)

    # --- processes ---

    def _start(self, group: int) -> None:
        self.store.set(f"generation/{group}", str(self._generation[group]))
        for rank in self.layout.members(group):
            self.pulse.forget(rank)
            self.store.delete_key(f"beat/{rank}")
            process = subprocess.Popen(
                [*COMMAND, *self.arguments], env=os.environ | self._environment(rank), stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            self.ranks[rank] = _Rank(process, time.monotonic())

    def _environment(self, rank: int) -> dict[str, str]:
        """What torchrun would set; ranks of one host talk over its loopback, and share out its cores."""
        own = {
            "RANK": str(rank), "WORLD_SIZE": str(self.layout.ranks), "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
        }  # fmt: skip
        defaults = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.layout.ranks))}
        if sys.platform == "linux":
            defaults |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        return {key: value for key, value in defaults.items() if key not in os.environ} | own

    def _kill(self, ranks: Sequence[int]) -> None:
        for rank in ranks:
            if (one := self.ranks.pop(rank, None)) is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(one.process.pid, signal.SIGKILL)  # with what it started: decoders, compilers
                # It may be in a call that a disk or a driver holds.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    one.process.wait(KILL_S)

    # --- losses ---

    def _lost(self, group: int, reason: str) -> None:
        """A rank of this group is gone: so is the group, and the clip it was making."""
        # A rank that ended itself has said why; one that was killed could not.
        reason = text(self.store, f"lost/{group}.{self._generation[group]}") or reason
        fatal = text(self.store, "fatal")
        self._kill(self.layout.members(group))
        name = text(self.store, f"taken/{group}")
        if fatal is None and name is not None:
            self._clean(name, reason)
            done = sum(self._status(clip.name)[0] == "done" for clip in self.clips)
            self._losses = self._losses + 1 if done == self._done_before else 1
            self._done_before = done
            left = len(self.clips) - self.store.add("queue", 0)
            if left <= 0:
                return
            if self._losses < MOST_LOSSES:
                self.report(
                    f"ranks {_span(self.layout.members(group))}: started anew for the clips that are left"
                )
                self._generation[group] += 1
                self._start(group)
                return
            self.outcome.problems = [
                f"ranks: {self._losses} clips in a row were lost with their ranks; {left} not made."
            ]
            self.outcome.exit_code = 1
        elif fatal is not None:
            told = json.loads(fatal)
            self.outcome.problems, self.outcome.exit_code = told["problems"], told["exit_code"]
        else:
            self.outcome.problems, self.outcome.exit_code = [reason], 1
        self._kill(list(self.ranks))
        for other in range(self.layout.groups):
            if left_over := text(self.store, f"taken/{other}"):
                self._clean(left_over, None)

    def _clean(self, name: str, reason: str | None) -> None:
        """Remove what a dead group left of a clip; with a reason, record it as failed."""
        outputs = self.folder.clip(name)
        if reason is not None:
            self.store.set(f"clip/{name}", f"failed {reason}")
            self.report(f"{name}: failed: {reason}")
        for group in range(self.layout.groups):
            if text(self.store, f"taken/{group}") == name:
                self.store.delete_key(f"taken/{group}")
        with contextlib.suppress(OSError, CosmosFastError):  # the next run cleans up as well
            if (claim := Claim.take(outputs.claim_path, self.folder.locked)) is not None:
                with claim:
                    outputs.remove_parts()
                    if reason is not None:
                        outputs.fail(reason, spec_hash=self.hashes[name])

    # --- the end ---

    def _status(self, name: str) -> tuple[str, str]:
        status, _, message = (text(self.store, f"clip/{name}") or "").partition(" ")
        return status, message

    def _collect(self) -> None:
        self.outcome.status = {clip.name: self._status(clip.name) for clip in self.clips}
        self.outcome.exit_code = self.outcome.exit_code or exit_code(
            s for s, _ in self.outcome.status.values()
        )


def _ending(rank: int, ranks: int, code: int) -> str:
    who = f"rank {rank} ({ranks} in all)"
    if code < 0:
        hint = " The kernel does that where memory runs out." if -code == signal.SIGKILL else ""
        return f"{who} was killed by {signal.Signals(-code).name}.{hint}"
    return f"{who} ended with exit code {code}"


def _span(ranks: range) -> str:
    return f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"


def die_with_parent(parent: int) -> None:
    """End with the process that started this one, however that one ends (Linux; elsewhere its store's end tells)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
