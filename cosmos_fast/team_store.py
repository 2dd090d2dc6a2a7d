"""The key-value store that ranks share: values in and out, and who has gone silent."""

from __future__ import annotations

import os
import pickle
import time
import zlib
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore

from .formats import EnvironmentProblem
from .parallel import Ranks

SILENT_S = 15.0
"""A rank without a sign for so long is stopped or stuck. Longest silence of a healthy one: compiling kernels, seconds."""
LEFT = "left"
"""The last sign of a rank, which may then take its time to end: a file to hash, memory to give back."""
PIECE_BYTES = 4 << 20
"""Largest value given to the store at once; its server takes 8 MiB."""


def put(store: Store, key: str, value: Any) -> None:
    """Any picklable value, in pieces that the store takes."""
    data = zlib.compress(pickle.dumps(value), 1)
    count = -(-len(data) // PIECE_BYTES)
    for i in range(count):
        piece = data[i * PIECE_BYTES : (i + 1) * PIECE_BYTES]
        store.set(f"{key}/{i}", piece)  # type: ignore[arg-type]  # its stub says str, it takes bytes
    store.set(key, str(count))


def take(store: Store, key: str) -> Any:
    """What `put` stored under a key that exists."""
    count = int(store.get(key))
    return pickle.loads(zlib.decompress(b"".join(store.get(f"{key}/{i}") for i in range(count))))


def text(store: Store, key: str) -> str | None:
    """A short value, or None if there is none yet."""
    return store.get(key).decode() if store.check([key]) else None


class Pulse:
    """Which ranks have gone silent, by this process's own clock: a rank lives while its count goes up."""

    def __init__(self, store: Store, limit_s: float = SILENT_S) -> None:
        self.store, self.limit_s = store, limit_s
        self._seen: dict[int, tuple[str, float]] = {}

    def silent_s(self, rank: int) -> float:
        """Seconds since the last new sign of a rank; 0 before its first one and after it took its leave."""
        beat, now = text(self.store, f"beat/{rank}") or "", time.monotonic()
        if beat == LEFT:
            return 0.0
        if beat and self._seen.get(rank, ("",))[0] != beat:
            self._seen[rank] = (beat, now)
        return now - self._seen[rank][1] if rank in self._seen else 0.0

    def place(self, rank: int) -> str:
        """Where the rank's main thread was at its last sign."""
        return self._seen.get(rank, ("? nowhere yet", 0.0))[0].partition(" ")[2]

    def forget(self, rank: int) -> None:
        self._seen.pop(rank, None)


def connect(ranks: Ranks, *, again: bool = False) -> Store:
    """The store at MASTER_ADDR, MASTER_PORT: of torchrun or of `launch`, else kept by rank 0 from its first call on.

    again: one more connection of this process. A connection that waits for a key lets nobody else through.
    """
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if address is None or port is None or not port.isdigit():
        raise EnvironmentProblem(
            f"ranks: MASTER_ADDR and MASTER_PORT must be set beside RANK, got {address} and {port}. Use torchrun, or --gpus."
        )
    keeps = ranks.rank == 0 and not again and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = TCPStore(
        address, int(port), is_master=keeps, timeout=timedelta(seconds=120), wait_for_workers=False
    )
    return PrefixStore(f"cosmos-fast/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
