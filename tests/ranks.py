"""Several ranks on this machine: processes that join over gloo, run one function, and send back what it returns."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

JOIN_S, TIMEOUT_S = 30, 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank(
    rank: int, size: int, port: int, call: Callable[..., Any], arguments: tuple[Any, ...], queue: Any
) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        queue.put((rank, call(*arguments), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))


def run(size: int, call: Callable[..., Any], *arguments: Any) -> list[Any]:
    """call(*arguments) on `size` ranks; what each returned, in order. Both must pickle.

    Raises AssertionError with the rank's own traceback if one fails, or none answers in time.
    """
    # Forked from a process that has imported all and computed nothing: a fork of this one would inherit the locks of
    # threads that are gone.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cosmos_fast.engine"])
    queue, port = context.SimpleQueue(), free_port()
    processes = [
        context.Process(target=_rank, args=(rank, size, port, call, arguments, queue)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        while len(results) < size:
            assert queue._reader.poll(TIMEOUT_S), f"{size} ranks: only {sorted(results)} answered"
            rank, value, fault = queue.get()
            assert fault is None, f"rank {rank} of {size}:\n{fault}"
            results[rank] = value
        for process in processes:
            process.join(JOIN_S)
    finally:
        for process in processes:
            process.kill()
    return [results[rank] for rank in range(size)]
