"""Several ranks on one clip: who they are, what they exchange, which tokens are whose.

A rank is one process with one device. All ranks of a clip run the same program on the same request and hold the same
latents; they share out the tokens (`Mesh.context`) and the two guidance passes (`Mesh.cfg`). Alone, every call here
returns what it was given, and no process group exists.

Groups of ranks that make different clips are worlds of their own: start each with its own RANK, WORLD_SIZE and port.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import peer_memory
from .copies import Copies
from .dispatch import pick_device
from .formats import ClipError, EnvironmentProblem, GivenUp, told_by
from .recipe import Plan

T = TypeVar("T")

TIMEOUT_S = 1800.0
"""Longest wait for another rank. The longest honest one is for the first rank to read the prompts of a batch."""

_joined_s = TIMEOUT_S
"""That of the world this process has joined."""


# --- who ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """This process among those started together: its number, their count, its number on this machine."""

    rank: int = 0
    size: int = 1
    local: int = 0

    @classmethod
    def from_environment(cls) -> Ranks:
        """RANK, WORLD_SIZE and LOCAL_RANK as torchrun and `cosmos-fast generate --gpus` set them; alone without them."""
        given = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        if given["RANK"] is None or given["WORLD_SIZE"] is None:
            return cls()
        try:
            rank, size = int(given["RANK"]), int(given["WORLD_SIZE"])
            local = rank if given["LOCAL_RANK"] is None else int(given["LOCAL_RANK"])
        except ValueError:
            raise EnvironmentProblem(
                f"ranks: RANK, WORLD_SIZE and LOCAL_RANK must be integers, got {given}."
            ) from None
        if not 0 <= rank < size or local < 0:
            raise EnvironmentProblem(
                f"ranks: must have 0 <= RANK < WORLD_SIZE and 0 <= LOCAL_RANK, got {given}."
            )
        return cls(rank, size, local)

    def device(self, wanted: str | None) -> torch.device:
        """The device of this rank: the one asked for, "cuda" being a GPU of its own. Raises EnvironmentProblem."""
        device = pick_device(wanted)
        if self.size == 1 or device.type != "cuda":
            return device
        if device.index is not None:
            raise EnvironmentProblem(
                f"device: must be cuda or cpu where {self.size} ranks share a clip, got {wanted}. Leave the number out."
            )
        return pick_device(f"cuda:{self.local}")


# --- what they exchange ------------------------------------------------------------------------------


class Exchange:
    """Bytes on their way. `wait()` gives what arrived; until then the sent buffer must stay as it is."""

    def __init__(self, arrived: Tensor, sent: Tensor, work: Any | None) -> None:
        self._arrived, self._sent, self._work = arrived, sent, work

    def wait(self) -> Tensor:
        """On CUDA the current stream waits, not the host. Keep this until the stream of the start comes after all readers."""
        if self._work is not None:
            self._work.wait()
        return self._arrived


@dataclass(frozen=True)
class Group:
    """Ranks that exchange tensors, this one being number `rank` of `size`. Values travel as raw bytes, in any dtype.

    All members must make the same calls in the same order. A group of one returns what it is given.
    copies: what does `all_to_all` in place of a collective.
    """

    rank: int = 0
    size: int = 1
    handle: dist.ProcessGroup | None = None
    copies: Copies | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        """Itself: a copied network exchanges with the same ranks."""
        return self

    def all_to_all(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Exchange:
        """Send sent[i] leading rows in turn to rank i, receive received[i] rows from it, in order of rank.

        Shapes: rows (sum(sent), bytes) uint8, contiguous; arrives as (sum(received), bytes). Starts at once; `wait()`.
        """
        if self.size == 1:
            return Exchange(rows, rows, None)
        if self.copies is not None:
            arrived, work = self.copies.start(rows, sent, received)
            return Exchange(arrived, rows, work)
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        work = dist.all_to_all_single(
            arrived, rows, list(received), list(sent), group=self.handle, async_op=True
        )
        return Exchange(arrived, rows, work)

    def gather(self, x: Tensor, rows: Sequence[int] | None = None) -> list[Tensor]:
        """x of every rank, in order of rank. rows: the leading size of each, where they differ."""
        if self.size == 1:
            return [x]
        counts = [x.shape[0]] * self.size if rows is None else list(rows)
        mine = x.new_zeros(max(counts), *x.shape[1:])
        mine[: x.shape[0]] = x
        buffer = _bytes(mine)
        parts = [torch.empty_like(buffer) for _ in range(self.size)]
        dist.all_gather(parts, buffer, group=self.handle)
        return [part.view(x.dtype).view_as(mine)[:count] for part, count in zip(parts, counts, strict=True)]

    def broadcast(self, x: Tensor | None, source: int, device: torch.device) -> Tensor:
        """x of rank `source` on every rank, in its layout; the others pass None and get it on `device`."""
        if self.size == 1:
            assert x is not None, "broadcast: the source has nothing to send"
            return x
        if x is not None:
            x = x.to(device)
            x = x if torch.ops.aten.is_non_overlapping_and_dense(x) else x.contiguous()
        made = self.tell(None if x is None else (tuple(x.shape), x.stride(), x.dtype), source)
        assert made is not None, "broadcast: the source has nothing to send"
        shape, stride, dtype = made
        x = torch.empty_strided(shape, stride, dtype=dtype, device=device) if x is None else x
        dist.broadcast(_bytes(x), self._global(source), group=self.handle)
        return x

    def tell(self, value: T, source: int = 0) -> T:
        """A small picklable value of rank `source`, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, self._global(source), group=self.handle, device=torch.device("cpu"))
        return box[0]

    def hear(self, value: T) -> list[T]:
        """A small picklable value of every rank, in order of rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        for source in range(self.size):
            values[source] = self.tell(value, source)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank: how ranks decide together, e.g. to stop."""
        return any(self.hear(flag))

    def first(self, make: Callable[[], T]) -> T:
        """make() on the first rank, its picklable value (tensors on the CPU) on all; what it raises, all raise."""
        return self.tell(self.by_first(make, None))  # type: ignore[arg-type, return-value]

    def by_first(self, make: Callable[[], T], otherwise: T) -> T:
        """make() on the first rank, `otherwise` on the others; what it raises, all raise."""
        if self.size == 1:
            return make()
        value, error = otherwise, None
        if self.rank == 0:
            try:
                value = make()
            except Exception as caught:
                error = caught
        self._raise_together(error, 0)
        return value

    def spread(
        self, jobs: Sequence[Callable[[], Tensor] | None], device: torch.device
    ) -> list[Tensor | None]:
        """The result of every job, each computed by one rank and sent to all; None stays None.

        Which jobs are None must be the same on all ranks. What a job raises, all raise.
        """
        if self.size == 1:
            return [job and job() for job in jobs]
        wanted = [i for i, job in enumerate(jobs) if job is not None]
        mine: dict[int, Tensor] = {}
        error = None
        for turn, i in enumerate(wanted):
            if turn % self.size == self.rank and error is None:
                try:
                    mine[i] = jobs[i]()  # type: ignore[misc]
                except GivenUp:  # who would be told is not there
                    raise
                except Exception as caught:
                    error = caught
        for source in range(min(self.size, len(wanted))):
            self._raise_together(error, source)
        results: list[Tensor | None] = [None] * len(jobs)
        for turn, i in enumerate(wanted):
            results[i] = self.broadcast(mine.get(i), turn % self.size, device)
        return results

    def check_same(self, x: Tensor, what: str) -> None:
        """Raise ClipError unless x is the same on all ranks, bit for bit. Waits for the device."""
        if self.size == 1:
            return
        bits = _bytes(x.contiguous())
        words = bits[: len(bits) // 8 * 8].view(torch.int64)
        weights = torch.arange(
            1, len(words) + 1, device=x.device
        )  # a sum alone would not see two values swapped
        prints = self.hear((tuple(x.shape), int((words * weights).sum())))
        if len(set(prints)) > 1:
            raise ClipError(
                f"{what}: must be the same on all {self.size} ranks, got {len(set(prints))} different ones."
            )

    def _raise_together(self, error: Exception | None, source: int) -> None:
        """Raise on every rank what rank `source` caught, as itself there and as `told_by` says elsewhere."""
        told = self.tell(None if error is None else told_by(source, error), source)
        if told is not None:
            raise error if self.rank == source and error is not None else told

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self.handle, rank) if self.handle is not None else rank


ALONE = Group()
"""The group of one rank, on which every call is the identity."""


def _bytes(x: Tensor) -> Tensor:
    """The memory of a dense tensor, whatever its layout."""
    return x.as_strided((x.numel(),), (1,)).view(torch.uint8)


# --- how they share the work -------------------------------------------------------------------------


@dataclass(frozen=True)
class Mesh:
    """All ranks of a clip, and their two axes: neighbours share the tokens, halves of the world the guidance passes.

    Rank r is number r % context of its context group, and holds the tokens' pass r // context: 0 conditional.
    notes: why ranks that share tokens do not exchange them by copies, where that was left to find out.
    """

    ranks: Ranks
    device: torch.device
    world: Group
    context: Group
    cfg: Group
    notes: tuple[str, ...] = ()

    @classmethod
    def alone(cls, device: str | torch.device | None = None) -> Mesh:
        """One rank that does all."""
        return cls(Ranks(), pick_device(str(device) if device else None), Group(), Group(), Group())

    @classmethod
    def open(cls, plan: Plan, ranks: Ranks | None = None, *, timeout_s: float = TIMEOUT_S) -> Mesh:
        """The mesh of a plan, joined with the other ranks: NCCL between GPUs, gloo between CPUs. All must call it.

        A plan of one rank joins nobody, whatever was started beside it. Raises EnvironmentProblem unless context * cfg
        ranks were started.
        """
        wanted = plan.context * plan.cfg
        if wanted == 1:
            return cls.alone(plan.device)
        ranks = ranks or Ranks.from_environment()
        if wanted != ranks.size:
            raise EnvironmentProblem(
                f"ranks: context * cfg of the plan must be the number of ranks started, got {plan.context} * {plan.cfg} "
                f"and {ranks.size}. Start {wanted}: torchrun --nproc-per-node {wanted}, or generate --gpus {wanted}."
            )
        device = ranks.device(plan.device)
        if not dist.is_initialized():
            join(ranks, device, timeout_s=timeout_s)
        timeout = timedelta(seconds=_joined_s)  # a group does not take that of its world by itself
        rows = [list(range(c * plan.context, (c + 1) * plan.context)) for c in range(plan.cfg)]
        context = _axis(ranks.rank, rows, timeout)
        cfg = _axis(ranks.rank, [list(column) for column in zip(*rows)], timeout)
        world = Group(ranks.rank, ranks.size, dist.group.WORLD)
        context, notes = peer_memory.exchanging(context, world, plan.exchange, device)
        return cls(ranks, device, world, context, cfg, notes)

    @property
    def is_first(self) -> bool:
        """Whether this rank encodes prompts and writes results."""
        return self.ranks.rank == 0

    @property
    def exchange(self) -> str:
        """How ranks that share tokens exchange them: "copies" or "collectives"; "none" where nobody shares."""
        shared = "collectives" if self.context.copies is None else "copies"
        return "none" if self.context.size == 1 else shared

    def close(self) -> None:
        """Leave the other ranks. Harmless alone, and twice."""
        if self.context.copies is not None:
            self.context.copies.close()
        if self.world.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def join(
    ranks: Ranks, device: torch.device, *, timeout_s: float = TIMEOUT_S, store: dist.Store | None = None
) -> None:
    """Meet the other ranks, by default where MASTER_ADDR and MASTER_PORT say. store: what this world alone uses."""
    global _joined_s
    _joined_s = timeout_s
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # An exchange that starts together with an attention must get its few SMs before that one fills them all.
        os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
        # Multicast serves reductions, of which there are none here: its buffers cost memory and start-up.
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        backend = "cpu:gloo,cuda:nccl"  # small values go by the host and never wait for the device
    dist.init_process_group(
        backend, rank=ranks.rank, world_size=ranks.size, timeout=timedelta(seconds=timeout_s), store=store
    )


def _axis(rank: int, rows: list[list[int]], timeout: timedelta) -> Group:
    """This rank's row as a group. Every rank must make every row, in the same order."""
    handles = [dist.new_group(row, timeout=timeout) if len(row) > 1 else None for row in rows]
    row, handle = next((row, handle) for row, handle in zip(rows, handles, strict=True) if rank in row)
    return Group(row.index(rank), len(row), handle)


@dataclass(frozen=True)
class Shard:
    """The tokens of each rank of a group: consecutive, in order of rank, counts differing by at most one."""

    group: Group
    tokens: int

    def __post_init__(self) -> None:
        if self.tokens < self.group.size:
            raise ValueError(
                f"shard: there must be a token for every one of {self.group.size} ranks, got {self.tokens}. "
                "Use fewer ranks for so small a picture."
            )

    @property
    def sizes(self) -> list[int]:
        """Tokens of every rank; the first ones hold one more where they do not divide evenly."""
        each, more = divmod(self.tokens, self.group.size)
        return [each + (rank < more) for rank in range(self.group.size)]

    @property
    def start(self) -> int:
        """Number of this rank's first token."""
        return sum(self.sizes[: self.group.rank])

    def split(self, x: Tensor, dim: int = 0) -> Tensor:
        """This rank's part of x, which has all tokens along `dim`; x itself alone."""
        return x if self.group.size == 1 else x.narrow(dim, self.start, self.sizes[self.group.rank])

    def join(self, x: Tensor) -> Tensor:
        """All tokens (L, ...) from every rank's own (Lr, ...), on every rank; x itself alone."""
        return x if self.group.size == 1 else torch.cat(self.group.gather(x, self.sizes))


@dataclass(frozen=True)
class Halves:
    """The two velocities of guidance, one computed by each half of the ranks and sent to the other: a `sampler.Pair`.

    velocity: this half's own, conditional where cfg.rank is 0. Both come out as from one rank, bit for bit.
    """

    velocity: Callable[[Tensor, int], Tensor]
    cfg: Group

    def __call__(self, z_BCTHW: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        v_cond, v_uncond = self.cfg.gather(self.velocity(z_BCTHW, step).contiguous())
        return v_cond, v_uncond
