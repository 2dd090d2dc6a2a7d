"""A rank of `generate --gpus` that fails on purpose. FAULTS="start:rank:pass:kind ...": in the start-th process of that
rank, at that guidance pass of its own. A pass may also be the name of a place outside the steps. STILL: seconds that a rank may do nothing.

Passes are counted over the life of a process. A rank that fails in one leaves the other waiting for its velocity. LOG: a file for stderr; beside it, when each fault happened.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

log = Path(os.environ["LOG"])
os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), 2)

import torch  # noqa: E402

from cosmos_fast import engine, media_files, parallel, reading, team, team_store, vae_split  # noqa: E402
from cosmos_fast.cli import main  # noqa: E402

# As in production, but for the tests' patience.
team.PATIENCE_S, team.STALLED_S = 2.0, 4.0
team.STILL_S = float(os.environ.get("STILL", team.STILL_S))
team_store.Pulse.__init__.__defaults__ = (4.0,)  # type: ignore[misc]


def fail(kind: str) -> None:
    log.with_name(f"{kind}.time").write_text(str(time.time()))
    if kind == "raise":
        raise RuntimeError("a fault made for a test")
    if kind == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")
    if kind == "sleep":
        time.sleep(1000)
    os.kill(os.getpid(), signal.SIGKILL)


def number_of_this_start() -> int:
    count = log.with_name(f"starts.{os.environ['RANK']}")
    number = int(count.read_text()) + 1 if count.exists() else 0
    count.write_text(str(number))
    return number


me = f"{number_of_this_start()}:{os.environ['RANK']}:"
faults = [fault.removeprefix(me).split(":") for fault in os.environ["FAULTS"].split() if fault.startswith(me)]
planned = {int(count): kind for count, kind in faults if count.isdigit()}
compute, passes = parallel.Halves.__call__, 0


def faulty(*args: Any) -> Any:
    global passes
    passes += 1
    if passes in planned:
        fail(planned[passes])
    return compute(*args)


PLACES = {
    "load": (engine.Engine, "_load_vae"), "decode": (vae_split.SharedVAEStage, "_frames"), "write": (media_files.Media, "write"),
    "read": (reading.Reading, "read"),
}  # fmt: skip
for place, kind in faults:
    if place in PLACES:
        setattr(*PLACES[place], lambda *_, kind=kind: fail(kind))
parallel.Halves.__call__ = faulty  # type: ignore[method-assign]
sys.argv[0] = "cosmos-fast"
main()
