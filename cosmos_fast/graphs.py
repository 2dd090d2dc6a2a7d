"""CUDA graphs over a bound network: the launches of a whole step recorded once, replayed with one call.

A step of the schedule reaches the network only through its row of the modulation tables. So one graph, captured over a
one-row copy of the tables, serves every step: before a replay the latent and this step's rows are copied in. The kernels
are those of an eager call on the same values, so the velocities are equal bit for bit.

Worth it where a call is so short that the host cannot keep ahead of the device; a call of seconds gains nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .context import Context, Modulation, Tables
from .formats import EnvironmentProblem
from .network import Pair, Single

WARMUPS = 2
"""Calls before capture: kernels are compiled and library workspaces allocated outside the graph."""

MOST_TOKENS, LEAST_STEPS = 8192, 12
"""Where graphs pay: a picture at 720p (3,520 tokens) takes 58 ms a guided step instead of 123, for 0.5 s of capture; a
clip at 480p (31,104) gains nothing. Records of commits 0a8c8b3 and 10de0e6, one H100."""

Velocities = Any
"""What the bound network returns: one velocity, or the (cond, uncond) of a Pair."""


@dataclass(frozen=True)
class Captured:
    """A recorded call: `outputs` are rewritten in place by every `replay()`."""

    outputs: Velocities
    replay: Callable[[], None]
    pool_bytes: int = 0


class Capture(Protocol):
    """Records one call; the tensors it reads must stay where they are."""

    def __call__(self, call: Callable[[], Velocities]) -> Captured: ...


def cuda_capture(call: Callable[[], Velocities]) -> Captured:
    """Warm up on a side stream, then record into a CUDA graph with a memory pool of its own."""
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUPS):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # what the warm-up left would hide the size of the pool
    before = torch.cuda.memory_reserved()
    graph = torch.cuda.CUDAGraph()
    # Other threads read inputs and screen frames meanwhile: what they ask of CUDA is no part of this.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = call()
    return Captured(outputs, graph.replay, torch.cuda.memory_reserved() - before)


class Graphed:
    """A Pair or Single that replays: same call, (z_BCTHW, step) -> new velocities, equal bit for bit.

    Owns the static latent, one row of every modulation table, the graph and its memory pool, for as long as it lives: one
    chunk. The first call captures; `capture_s` and `pool_bytes` then say what that cost, and `captures` counts (0 or 1).
    Raises EnvironmentProblem off CUDA and where ranks share tokens, ValueError for a latent of another shape, dtype or
    device than the first, or a step that the tables do not have.
    """

    def __init__(self, bound: Pair | Single, capture: Capture | None = None) -> None:
        tables = _context(bound).tables
        device = tables.head.device
        if (ranks := bound.network.ranks.size) > 1:
            raise EnvironmentProblem(
                f"graphs: ranks must not share tokens, got {ranks} that do. A replay would repeat exchanges that are counted."
            )
        if capture is None and device.type != "cuda":
            raise EnvironmentProblem(f"graphs: need a CUDA device, got {device}. Leave Plan.graphs off here.")
        self._capture = capture or cuda_capture
        self._sources = _flat(tables)
        self._steps = tables.head.shape[0]
        with torch.inference_mode():
            static = _one_row(tables)
        self._rows = _flat(static)
        self._bound = _with_tables(bound, static)
        self._z: Tensor | None = None
        self._captured: Captured | None = None
        self.captures = 0
        self.capture_s = 0.0

    @property
    def pool_bytes(self) -> int:
        """Device memory that the graph reserves for itself; 0 before the first call."""
        return 0 if self._captured is None else self._captured.pool_bytes

    @torch.inference_mode()
    def __call__(self, z_BCTHW: Tensor, step: int) -> Velocities:
        if not 0 <= step < self._steps:
            raise ValueError(f"graphs: step must be in 0..{self._steps - 1}, got {step}.")
        if self._z is None:
            self._z = z_BCTHW.clone(memory_format=torch.contiguous_format)
        if _kind(z_BCTHW) != _kind(self._z):
            raise ValueError(
                f"graphs: the latent must stay {_kind(self._z)}, got {_kind(z_BCTHW)}. Make a Graphed per chunk."
            )
        self._z.copy_(z_BCTHW)
        torch._foreach_copy_(self._rows, [table[step : step + 1] for table in self._sources])
        if self._captured is None:
            self._captured = self._record(self._z)
        self._captured.replay()
        return _copied(self._captured.outputs)

    def _record(self, z: Tensor) -> Captured:
        start = time.perf_counter()
        captured = self._capture(lambda: self._bound(z, 0))
        self.capture_s, self.captures = time.perf_counter() - start, self.captures + 1
        return captured


def pays(bound: Pair | Single) -> bool:
    """Whether steps are so short, and so many, that a graph is worth its capture. Never where ranks share the tokens."""
    ctx = _context(bound)
    steps, device = ctx.tables.head.shape[0], ctx.tables.head.device
    alone = bound.network.ranks.size == 1
    return device.type == "cuda" and alone and ctx.cos.shape[0] <= MOST_TOKENS and steps >= LEAST_STEPS


def _context(bound: Pair | Single) -> Context:
    return bound.cond if isinstance(bound, Pair) else bound.ctx


def _with_tables(bound: Pair | Single, tables: Tables) -> Pair | Single:
    if isinstance(bound, Single):
        return replace(bound, ctx=replace(bound.ctx, tables=tables))
    uncond = None if bound.uncond is None else replace(bound.uncond, tables=tables)
    return replace(bound, cond=replace(bound.cond, tables=tables), uncond=uncond)


def _flat(tables: Tables) -> list[Tensor]:
    """Every table, steps first, always in the same order."""
    mods = (*tables.blocks, *(mod for branch in tables.control for mod in branch))
    return [*(mod.table for mod in mods), tables.head]


def _one_row(tables: Tables) -> Tables:
    """The same tables with room for a single step, in memory of their own."""

    def first(mod: Modulation) -> Modulation:
        return Modulation(mod.table[:1].clone())

    return Tables(
        tuple(first(mod) for mod in tables.blocks),
        tuple(tuple(first(mod) for mod in branch) for branch in tables.control),
        tables.head[:1].clone(),
    )


def _kind(z: Tensor) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
    return tuple(z.shape), z.dtype, z.device


def _copied(outputs: Velocities) -> Velocities:
    """The caller may keep what it gets: the next replay rewrites the originals."""
    if isinstance(outputs, tuple):
        return tuple(None if v is None else v.clone() for v in outputs)
    return outputs.clone()
