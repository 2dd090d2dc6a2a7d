"""`copies.Peers` on the GPUs of one host: mapped memory, copies by the copy engines, flags that streams set and await.

Memory: torch's symmetric memory, which maps every rank's allocation into every rank. A copy between mapped memories of
two GPUs is done by a copy engine; `cuStreamWriteValue32` and `cuStreamWaitValue32` of the CUDA driver are done by what
feeds the GPU with work. So no multiprocessor takes part, and an attention that fills them all runs beside it undisturbed.
The receiver reads, nobody writes data into another GPU: of such writes an order with the flag would have to be forced.
"""

from __future__ import annotations

import ctypes
import socket
import time
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from .copies import Copies, Work, box
from .formats import EnvironmentProblem

if TYPE_CHECKING:
    from .parallel import Group

SLOTS: Final = 4
ROOM: Final = 32 << 20
"""Bytes of one slot to all peers: with four, 128 MiB hold a half of a rank's q, k and v at 720p on two ranks."""
FLAGS: Final = 4096
"""Bytes of the flags before the slots."""
PROOF_S: Final = 20.0
"""How long the first exchange may take."""
HINT: Final = "Use Plan(exchange='collectives')."


class Attributes(ctypes.Structure):
    """CUmemcpyAttributes: order of access to the source, hints of location (not for device memory), flags."""

    _fields_ = (
        ("order", ctypes.c_int),
        ("source", ctypes.c_int * 2),
        ("target", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )


class Driver:
    """The calls of the CUDA driver that torch has no name for.

    copy: None where the driver is older than 12.8's batches, the only copies that take a hint.
    """

    GEQ = 0  # until (int32)(flag - value) >= 0, so that numbers may wrap
    IN_STREAM_ORDER, BESIDE_COMPUTE = 1, 1

    def __init__(self) -> None:
        try:
            library = ctypes.CDLL("libcuda.so.1")
            self._set, self._await = library.cuStreamWriteValue32_v2, library.cuStreamWaitValue32_v2
        except (OSError, AttributeError) as error:
            raise EnvironmentProblem(
                f"exchange: copies need a CUDA driver with stream memory operations, got {error}. {HINT}"
            ) from None
        for call in (self._set, self._await):
            call.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
            call.restype = ctypes.c_int
        self._copy = getattr(library, "cuMemcpyBatchAsync_v2", None)
        if self._copy is not None:
            one = ctypes.POINTER(ctypes.c_uint64)
            self._copy.argtypes = [one, one, one, ctypes.c_size_t, ctypes.POINTER(Attributes), one,
                                   ctypes.c_size_t, ctypes.c_void_p]  # fmt: skip
            self._copy.restype = ctypes.c_int

    def copy(self, stream: int, target: int, source: int, count: int) -> bool:
        """Copy bytes where the hint to do so beside what the SMs compute is taken; False where it is not."""
        if self._copy is None:
            return False
        to, of, size, first = (ctypes.c_uint64(value) for value in (target, source, count, 0))
        how = Attributes(order=self.IN_STREAM_ORDER, flags=self.BESIDE_COMPUTE)
        return not self._copy(to, of, size, 1, how, first, 1, stream)

    def set(self, stream: int, address: int, value: int) -> None:
        """Preceded by a fence over the whole system, of what the stream did before."""
        self._check(self._set(stream, address, value & 0xFFFFFFFF, 0))

    def await_(self, stream: int, address: int, value: int) -> None:
        self._check(self._await(stream, address, value & 0xFFFFFFFF, self.GEQ))

    @staticmethod
    def _check(code: int) -> None:
        if code:
            raise EnvironmentProblem(
                f"exchange: a stream must set and await flags, got CUDA error {code}. {HINT}"
            )


class Done:
    """Events at the ends of lanes."""

    def __init__(self, events: list[torch.cuda.Event]) -> None:
        self.events = events

    def wait(self) -> None:
        stream = torch.cuda.current_stream()
        for event in self.events:
            stream.wait_event(event)


class PeerMemory:
    """Slots and flags of this rank, and those of its peers as it sees them. All ranks of the group must make one.

    hinted: whether copies tell the driver to stay beside computation. Without that it is free to copy inside a device with
    a kernel, which would wait for the end of an attention. Changes no byte.
    """

    def __init__(self, group: Group, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric

        assert group.handle is not None, "peer memory: alone there is nobody to exchange with"
        self.rank, self.size = group.rank, group.size
        self.slots, self.slot_bytes = SLOTS, _slot_bytes(group.size)
        self._driver, self._device, self.hinted = Driver(), device, True
        self._lanes: dict[tuple[str, int], torch.cuda.Stream] = {}
        self._given: dict[tuple[str, int], torch.cuda.Stream] = {}
        size = FLAGS + (group.size - 1) * SLOTS * self.slot_bytes
        if symmetric.get_backend(device) != "CUDA":  # another may have been chosen by the environment
            symmetric.set_backend("CUDA")
        self._memory = symmetric.empty(size, dtype=torch.uint8, device=device)
        self._memory[:FLAGS].zero_()
        torch.cuda.synchronize(device)
        handle = symmetric.rendezvous(self._memory, group.handle)
        self._all = [handle.get_buffer(rank, (size,), torch.uint8) for rank in range(group.size)]
        self._handle = handle
        group.hear(None)  # nobody may set a flag before it is zero

    @cached_property
    def _addresses(self) -> list[int]:
        return [memory.data_ptr() for memory in self._all]

    def begin(self) -> None:
        self._start = torch.cuda.Event()
        self._start.record()
        self._given = {}

    def end(self) -> Work:
        events = []
        for stream in self._given.values():
            events.append(torch.cuda.Event())
            events[-1].record(stream)
        return Done(events)

    def outbox(self, peer: int, slot: int) -> Tensor:
        return self._slot(self.rank, peer, slot)

    def inbox(self, peer: int, slot: int) -> Tensor:
        return self._slot(peer, self.rank, slot)

    def copy(self, lane: tuple[str, int], target: Tensor, source: Tensor) -> None:
        if target.numel() == 0:
            return
        stream = self._stream(lane)
        if self.hinted and self._driver.copy(
            stream.cuda_stream, target.data_ptr(), source.data_ptr(), len(target)
        ):
            return
        self.hinted = False
        with torch.cuda.stream(stream):
            target.copy_(source)

    def tell(self, lane: tuple[str, int], peer: int, flag: int, value: int) -> None:
        address = self._addresses[peer] + 4 * (flag * self.size + self.rank)
        self._driver.set(self._stream(lane).cuda_stream, address, value)

    def await_(self, lane: tuple[str, int], peer: int, flag: int, value: int) -> None:
        address = self._addresses[self.rank] + 4 * (flag * self.size + peer)
        self._driver.await_(self._stream(lane).cuda_stream, address, value)

    def _slot(self, owner: int, peer: int, slot: int) -> Tensor:
        start = FLAGS + (box(peer, owner) * SLOTS + slot) * self.slot_bytes
        return self._all[owner][start : start + self.slot_bytes]

    def _stream(self, lane: tuple[str, int]) -> torch.cuda.Stream:
        if lane not in self._lanes:
            self._lanes[lane] = torch.cuda.Stream(self._device)
        if lane not in self._given:
            self._given[lane] = self._lanes[lane]
            self._given[lane].wait_event(self._start)
        return self._given[lane]


def _slot_bytes(size: int) -> int:
    return ROOM // max(size - 1, 1) // 4096 * 4096


def open_copies(group: Group, device: torch.device) -> Copies:
    """The exchange by copies of this group, proven against its collectives. All ranks must call it.

    Raises EnvironmentProblem, on all of them, where it cannot be had.
    """
    here = (socket.gethostname(), device.type, device.index)
    everyone = group.hear(here)
    problem = obstacle(group.rank, everyone)
    for rank, found in enumerate(group.hear(problem)):
        if found is not None:
            raise EnvironmentProblem(f"exchange: {found}, on rank {rank}. {HINT}")
    copies = Copies(PeerMemory(group, device))
    _prove(copies, group, device)
    return copies


def obstacle(rank: int, everyone: Sequence[tuple[str, str, int | None]]) -> str | None:
    """Why these ranks (host, kind of device, its number) cannot read each other's memory, as far as this one sees."""
    host, kind, index = everyone[rank]
    if kind != "cuda":
        return f"copies need GPUs, got {kind}"
    if any(other != host for other, _, _ in everyone):
        return f"copies need all ranks on one host, got {sorted({other for other, _, _ in everyone})}"
    numbers = [number for _, _, number in everyone]
    if None in numbers or len(set(numbers)) < len(numbers):
        return f"copies need a GPU of its own for every rank, got numbers {numbers}"
    for number in numbers:
        if number != index and not torch.cuda.can_device_access_peer(index, number):
            return f"copies need access from GPU to GPU, got none from {index} to {number}"
    return None


def _prove(copies: Copies, group: Group, device: torch.device) -> None:
    """Messages of different lengths, two at once, together more chunks than there are slots: the bits of a collective."""
    import torch.distributed as dist

    width, least = 4096, (SLOTS // 2 + 1) * copies.peers.slot_bytes // 4096
    sent = [least + 17 * group.rank + 5 * peer for peer in range(group.size)]
    received = [least + 17 * peer + 5 * group.rank for peer in range(group.size)]
    generator = torch.Generator(device).manual_seed(group.rank)
    pairs = []
    for _ in range(2):
        rows = torch.randint(
            0, 256, (sum(sent), width), generator=generator, dtype=torch.uint8, device=device
        )
        wanted = rows.new_empty(sum(received), width)
        dist.all_to_all_single(wanted, rows, received, sent, group=group.handle)
        pairs.append((rows, wanted))
    found = [copies.start(rows, sent, received) for rows, _ in pairs]
    for _, work in found:
        work.wait()
    done, until = torch.cuda.Event(), time.monotonic() + PROOF_S
    done.record()
    while not done.query() and time.monotonic() < until:
        time.sleep(0.001)
    arrived = done.query()
    same = arrived and all(torch.equal(x, wanted) for (x, _), (_, wanted) in zip(found, pairs, strict=True))
    if not all(group.hear(same)):
        how = "other bytes" if arrived else f"nothing within {PROOF_S:.0f} s"
        raise EnvironmentProblem(f"exchange: copies must bring what collectives bring, got {how}. {HINT}")
