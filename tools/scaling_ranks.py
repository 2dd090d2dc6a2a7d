"""Two ranks for a measurement: started and ended, what they send, and the clocks of each one's GPU."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from cosmos_fast.parallel import Group


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

    def of(self, call: Callable[[], object]) -> int:
        before = self.sent
        call()
        return self.sent - before


def reader(index: int) -> Callable[[], tuple[float, float, float]] | None:
    """Clock, power and temperature of one GPU by its number; None without nvidia-smi's library."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    except Exception as error:  # a missing package or driver: the run goes on without clocks, and says so
        print(f"bench_scaling: no clocks: {type(error).__name__}: {error}", flush=True)
        return None
    return lambda: (
        float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
        pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        float(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
    )


def parent(arguments: list[str], deadline_s: float) -> int:
    """Start both ranks; end both when one fails or at the deadline."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, *arguments], start_new_session=True,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    until = time.monotonic() + deadline_s
    try:
        while time.monotonic() < until and all(rank.poll() in (None, 0) for rank in ranks):
            if all(rank.poll() == 0 for rank in ranks):
                return 0
            time.sleep(0.2)
        print(
            f"bench_scaling: ended at {'the deadline' if time.monotonic() >= until else 'a failed rank'}; the file has what was measured."
        )
        return 1
    finally:
        for rank in ranks:
            if rank.poll() is None:
                os.killpg(rank.pid, signal.SIGKILL)
