"""Two ranks for a measurement: started, watched and ended, what they send, and the clocks of each one's GPU.

The ranks write their record after every piece; the process that started them holds each section to its time. What goes
wrong in one section costs that section: its ranks are ended, since nobody can be called back from a collective, and new
ones do the sections that are left.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cosmos_fast.parallel import Group

START_S = 90.0
"""Longest from the start of ranks to their first section: imports, joining."""
POLL_S = 0.2


class Traffic:
    """Bytes this rank sends to others, counted where they leave."""

    def __init__(self) -> None:
        self.sent = 0
        to_all, gather = Group.all_to_all, Group.gather

        def counted_to_all(group: Group, rows: Tensor, sent: Any, received: Any) -> Any:
            away = sum(count for rank, count in enumerate(sent) if rank != group.rank)
            self.sent += away * rows[:1].numel() if group.size > 1 else 0
            return to_all(group, rows, sent, received)

        def counted_gather(group: Group, x: Tensor, rows: Any = None) -> Any:
            self.sent += (group.size - 1) * x.numel() * x.element_size()
            return gather(group, x, rows)

        Group.all_to_all, Group.gather = counted_to_all, counted_gather  # type: ignore[method-assign, assignment]


# --- the record, which both sides write in turn ------------------------------------------------------


def write(path: Path, record: dict[str, Any]) -> None:
    """All or nothing: whoever reads it meanwhile, or ends the writer, finds a whole record."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def fault_file(path: Path, rank: int) -> Path:
    """Where a rank says what it died of."""
    return path.with_name(f".{path.name}.fault{rank}")


def begun(record: dict[str, Any]) -> str | None:
    """The section under way."""
    return next((name for name, entry in record["sections"].items() if entry["status"] == "begun"), None)


# --- who a rank is ---


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def identity(rank: int, size: int, port: int) -> dict[str, str]:
    """What a rank of this host reads from its environment."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip


# --- the parent --------------------------------------------------------------------------------------


class Parent:
    """Runs `command` as two ranks. limits_s: seconds of every section, in the order they run; until: the end of all."""

    def __init__(self, command: Sequence[str], path: Path, limits_s: dict[str, float], until: float) -> None:
        self.command, self.path, self.limits_s, self.until = command, path, limits_s, until

    def run(self) -> int:
        """0 if every section went well. Sections that never began are recorded as skipped."""
        while (left := self._left()) and time.monotonic() < self.until - 10:
            reason = self._some(left)
            if reason is not None:
                self._fail(reason, left)
        record = read(self.path)
        for name in self._left():
            record["sections"][name] = {"status": "skipped", "error": "no time was left"}
        write(self.path, record)
        return int(any(entry["status"] != "ok" for entry in record["sections"].values()))

    def _left(self) -> list[str]:
        done = read(self.path)["sections"]
        return [name for name in self.limits_s if name not in done]

    def _fail(self, reason: str, left: list[str]) -> None:
        record = read(self.path)
        # Ranks that die before any section would do so again: what they died of is told of the first one.
        name = begun(record) or left[0]
        faults = [
            file.read_text(encoding="utf-8")
            for rank in range(2)
            if (file := fault_file(self.path, rank)).exists()
        ]
        entry = record["sections"].get(name, {})
        entry |= {"status": "failed", "error": "\n".join([reason, *faults])[:4000]}
        record["sections"][name] = entry
        write(self.path, record)
        print(f"bench_scaling: {name}: {reason}", flush=True)
        for rank in range(2):
            fault_file(self.path, rank).unlink(missing_ok=True)

    def _some(self, left: list[str]) -> str | None:
        """Ranks for these sections, until both have ended; what went wrong, once they are gone."""
        ranks = self._start(left)
        at, since = None, time.monotonic()
        try:
            while True:
                time.sleep(POLL_S)
                codes = [rank.poll() for rank in ranks]
                if all(code == 0 for code in codes):
                    return None
                if any(code not in (None, 0) for code in codes):
                    time.sleep(1)  # for the other to say what it died of
                    return f"ended with exit codes {[rank.poll() for rank in ranks]}"
                now, name = time.monotonic(), begun(read(self.path))
                if name != at:
                    at, since = name, now
                limit = START_S if at is None else self.limits_s[at]
                if now - since > limit:
                    return f"took longer than {limit:.0f} s"
                if now > self.until:
                    return "the deadline of the whole run"
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    os.killpg(rank.pid, signal.SIGKILL)
                rank.wait()

    def _start(self, left: list[str]) -> list[subprocess.Popen[bytes]]:
        port = free_port()
        # Both ranks are on this host: its loopback carries what is not for the links between GPUs.
        shared = {
            "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "NCCL_NVLS_ENABLE": "0",
            "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        command = [sys.executable, *self.command, "--only", ",".join(left)]
        return [
            subprocess.Popen(
                command, start_new_session=True, env=os.environ | shared | identity(rank, 2, port)
            )
            for rank in range(2)
        ]
