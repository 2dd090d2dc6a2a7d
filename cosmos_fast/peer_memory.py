"""`copies.Peers` on the GPUs of one host: mapped memory, copies by the copy engines, flags that streams set and await.

Memory: torch's symmetric memory, which maps every rank's allocation into every rank. A copy between mapped memories of
two GPUs is done by a copy engine; `cuStreamWriteValue32` and `cuStreamWaitValue32` of the CUDA driver are done by what
feeds the GPU with work. So no multiprocessor takes part, and an attention that fills them all runs beside it undisturbed.
The receiver reads, nobody writes data into another GPU: of such writes an order with the flag would have to be forced.
"""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import torch
from torch import Tensor

from .copies import Copies, Lane, Work, box
from .formats import CosmosFastError, EnvironmentProblem

if TYPE_CHECKING:
    from .parallel import Group

T = TypeVar("T")

SLOTS: Final = 2
ROOM: Final = 64 << 20
"""Bytes of one slot to all peers: one holds a quarter of a rank's q, k and v at 720p on two ranks. On two H200s 124 and 248 MiB took
0.47 and 0.89 ms so, 0.57 and 0.97 in four slots of half the size, 0.88 and 1.62 in eight of a quarter (2026-11-23-fb1d53a-copies.json)."""
FLAGS: Final = 4096
"""Bytes of the flags before the slots: room for 512 slots of all peers together."""
PROOF_S: Final = 10.0
"""How long the first exchange may take; with what giving up takes, less than a rank that hangs is given (`team.STILL_S`)."""


class NoCopies(EnvironmentProblem):
    """`why` ranks cannot copy out of each other's memory. Raised on all of them."""

    def __init__(self, why: str) -> None:
        super().__init__(f"exchange: {why}. Take exchange auto or collectives.")
        self.why = why


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
            raise NoCopies(f"copies need a CUDA driver with stream memory operations, got {error}") from None
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
            raise NoCopies(f"copies need streams that set and await flags, got CUDA error {code}")


class Done:
    """Events at the ends of lanes."""

    def __init__(self, events: list[torch.cuda.Event]) -> None:
        self.events = events

    def wait(self) -> None:
        stream = torch.cuda.current_stream()
        for event in self.events:
            stream.wait_event(event)

    def is_done(self) -> bool:
        return all(event.query() for event in self.events)


class PeerMemory:
    """Slots and flags of this rank, and, once all ranks of the group have met, those of its peers as it sees them.

    hinted: whether copies tell the driver to stay beside computation. Without that it is free to copy inside a device with
    a kernel, which would wait for the end of an attention. Changes no byte. Raises NoCopies.
    """

    def __init__(self, group: Group, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric

        assert group.handle is not None, "peer memory: alone there is nobody to exchange with"
        assert 8 * SLOTS * group.size <= FLAGS, "peer memory: flags must fit"
        self.rank, self.size = group.rank, group.size
        self.slots, self.slot_bytes = SLOTS, slot_bytes(group.size)
        self._driver, self._device, self.hinted = Driver(), device, True
        self._lanes: dict[Lane, torch.cuda.Stream] = {}
        self._given: dict[Lane, torch.cuda.Stream] = {}
        # Of another priority, so that no lane that waits can stand before it in a queue of the device.
        self._aside = torch.cuda.Stream(device, priority=-1)
        if symmetric.get_backend(device) != "CUDA":  # another may have been chosen by the environment
            symmetric.set_backend("CUDA")
        size = FLAGS + (group.size - 1) * SLOTS * self.slot_bytes
        self._memory = symmetric.empty(size, dtype=torch.uint8, device=device)
        self._memory[:FLAGS].zero_()
        torch.cuda.synchronize(device)

    def meet(self, group: Group) -> None:
        """Map the memory of all peers. All ranks must call it, and none may copy before all are back: flags must be zero."""
        import torch.distributed._symmetric_memory as symmetric

        assert group.handle is not None
        self._handle = symmetric.rendezvous(self._memory, group.handle)
        size = (self._memory.numel(),)
        self._all = [self._handle.get_buffer(rank, size, torch.uint8) for rank in range(self.size)]

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

    def copy(self, lane: Lane, target: Tensor, source: Tensor) -> None:
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

    def tell(self, lane: Lane, peer: int, flag: int, slot: int, value: int) -> None:
        self._driver.set(self._stream(lane).cuda_stream, self._flag(peer, self.rank, flag, slot), value)

    def await_(self, lane: Lane, peer: int, flag: int, slot: int, value: int) -> None:
        self._driver.await_(self._stream(lane).cuda_stream, self._flag(self.rank, peer, flag, slot), value)

    def is_idle(self) -> bool:
        return all(stream.query() for stream in self._lanes.values())

    def release(self, value: int) -> None:
        for number in range(2 * self.slots * self.size):
            self._driver.set(self._aside.cuda_stream, self._addresses[self.rank] + 4 * number, value)

    def _flag(self, owner: int, setter: int, flag: int, slot: int) -> int:
        """Address of the flag in the memory of `owner` that `setter` sets."""
        return self._addresses[owner] + 4 * ((flag * self.slots + slot) * self.size + setter)

    def _slot(self, owner: int, peer: int, slot: int) -> Tensor:
        start = FLAGS + (box(peer, owner) * self.slots + slot) * self.slot_bytes
        return self._all[owner][start : start + self.slot_bytes]

    def _stream(self, lane: Lane) -> torch.cuda.Stream:
        if lane not in self._lanes:
            self._lanes[lane] = torch.cuda.Stream(self._device)
        if lane not in self._given:
            self._given[lane] = self._lanes[lane]
            self._given[lane].wait_event(self._start)
        return self._given[lane]


def slot_bytes(size: int) -> int:
    """Of ROOM for all peers of a rank, what is left to one."""
    return ROOM // max(size - 1, 1) // 4096 * 4096


def exchanging(
    group: Group, world: Group, wanted: str, device: torch.device
) -> tuple[Group, tuple[str, ...]]:
    """The group with the exchange that `Plan.exchange` names, and what is to be told of it. All ranks of `world` must call it.

    "auto": by copies if every group of the world proves them, otherwise by collectives on all, with the reason; processes
    on a CPU have no other, and no reason to be told. Raises NoCopies for "copies" that cannot be had, on all.
    """
    if group.size == 1 or wanted == "collectives" or (wanted == "auto" and device.type == "cpu"):
        return group, ()
    why: str | None = None
    try:
        group = replace(group, copies=open_copies(group, device))
    except NoCopies as error:
        why = error.why
    refused = next((told for told in world.hear(why) if told is not None), None)
    if refused is None:
        return group, ()
    if wanted == "copies":
        raise NoCopies(refused)
    return replace(group, copies=None), (f"exchange: by collectives, not by copies: {refused}.",)


def open_copies(group: Group, device: torch.device) -> Copies:
    """The exchange by copies of this group, proven against its collectives. All ranks must call it.

    Raises NoCopies, on all of them, where it cannot be had; then nothing of it is left. EnvironmentProblem, and no way on,
    where lanes of a failed proof never come to an end.
    """
    everyone = group.hear((host_name(), device.type, device.index))
    _none_refuses(group, obstacle(group.rank, everyone))
    peers = _all_can(group, lambda: PeerMemory(group, device))
    _all_can(group, lambda: peers.meet(group))
    copies = Copies(peers)
    try:
        _all_can(group, lambda: _prove(copies, group, device))
    except NoCopies:
        # Where one rank fails, lanes of the others wait for it. Nothing is freed before all of them have come to an end.
        if not all(group.hear(copies.give_up(PROOF_S / 2))):
            raise EnvironmentProblem(
                "exchange: lanes must end when they are given up, got some that wait. Start anew with exchange collectives."
            ) from None
        raise
    return copies


def _all_can(group: Group, call: Callable[[], T]) -> T:
    """call() on every rank of the group; NoCopies on all, with the reasons, where one raised."""
    result, why = None, None
    try:
        result = call()
    except NoCopies as error:
        why = error.why
    except Exception as error:  # whatever it is, the others wait to hear of it
        text = str(error).strip().splitlines()[:1]
        why = ": ".join([*([] if isinstance(error, CosmosFastError) else [type(error).__name__]), *text])
    _none_refuses(group, why)
    return result  # type: ignore[return-value]


def _none_refuses(group: Group, why: str | None) -> None:
    """Raise NoCopies on all ranks where one of them has a reason, in the same words."""
    told = {reason: rank for rank, reason in reversed([*enumerate(group.hear(why))]) if reason is not None}
    if told:
        raise NoCopies("; ".join(f"{reason}, on rank {told[reason]}" for reason in reversed(told)))


def host_name() -> str:
    """Name of this host, and of its boot where the system tells: machines made of one image share their names."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} ({boot.read_text()[:8]})" if boot.exists() else socket.gethostname()


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

    width, least = 4096, (copies.peers.slots // 2 + 1) * copies.peers.slot_bytes // 4096
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
    # Not `wait`: after what never comes the caller's stream would never go on.
    if not copies.has_ended(PROOF_S):
        raise NoCopies(f"copies must bring what collectives bring, got nothing within {PROOF_S:.0f} s")
    for (arrived, work), (_, wanted) in zip(found, pairs, strict=True):
        work.wait()
        if not torch.equal(arrived, wanted):
            raise NoCopies("copies must bring what collectives bring, got other bytes")
