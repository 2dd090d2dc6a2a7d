"""How an implementation is chosen: once per op, device and dtype, with the reasons the others lost.

`COSMOS_FAST_OPS="adaln=reference,attention=cudnn"` or `with use(adaln="triton"):` force a choice; forced
and impossible is an error, automatic and impossible is the next candidate plus a reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from . import _native, reference
from .formats import EnvironmentProblem

LIBRARY = torch.library.Library("cosmos_fast", "FRAGMENT")


@dataclass(frozen=True)
class Candidate:
    """One implementation: what it needs (data), how to get it (`load`, lazy)."""

    name: str
    load: Callable[[], Callable[..., Any]]
    device: str = "any"
    capability: tuple[tuple[int, int], tuple[int, int]] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    packages: tuple[str, ...] = ()
    symbol: str | None = None

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this implementation cannot run here, or None."""
        if self.device not in ("any", device.type):
            return f"needs a {self.device} tensor"
        if self.dtypes and dtype not in self.dtypes:
            return f"needs {' or '.join(str(d).removeprefix('torch.') for d in self.dtypes)}, got {dtype}"
        if self.capability and device.type == "cuda":
            low, high = self.capability
            if not low <= torch.cuda.get_device_capability(device) <= high:
                return f"needs compute capability {low} to {high}, this GPU is {torch.cuda.get_device_capability(device)}"
        if self.packages and not any(find_spec(name) for name in self.packages):
            return f"package {' or '.join(self.packages)} is not installed"
        if self.symbol and not _native.available(self.symbol):
            return _native.reason(self.symbol)
        return None


@dataclass
class Op:
    """One row of the table."""

    name: str
    schema: str
    validate: Callable[..., None]
    fake: Callable[..., Any]
    candidates: tuple[Candidate, ...]
    chosen: dict[tuple[str, torch.dtype], tuple[str, Callable[..., Any]]] = field(default_factory=dict)
    reasons: dict[tuple[str, torch.dtype], dict[str, str]] = field(default_factory=dict)

    def resolve(self, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
        key = (device.type, dtype)
        if key not in self.chosen:
            self.chosen[key], self.reasons[key] = self._choose(device, dtype)
        return self.chosen[key][1]

    def _choose(
        self, device: torch.device, dtype: torch.dtype
    ) -> tuple[tuple[str, Callable[..., Any]], dict[str, str]]:
        _check_names("COSMOS_FAST_OPS", _FORCED)  # at the first call of any op: a typo must not pass unseen
        forced, reasons = _FORCED.get(self.name), {}
        for candidate in self.candidates:
            if forced is not None and candidate.name != forced:
                reasons[candidate.name] = f"{self.name}={forced} is forced"
                continue
            obstacle = candidate.obstacle(device, dtype)
            if obstacle is None:
                try:
                    return (candidate.name, candidate.load()), reasons
                except (ImportError, OSError, RuntimeError) as error:
                    obstacle = f"failed to load: {error}"
            if forced is not None:
                raise EnvironmentProblem(
                    f"{self.name}: implementation {forced!r} was asked for but {obstacle}."
                )
            reasons[candidate.name] = obstacle
        raise EnvironmentProblem(
            f"{self.name}: implementation must be one of {', '.join(c.name for c in self.candidates)}, got {forced!r}."
        )

    def __call__(self, *args: Any) -> Any:
        self.validate(*args)
        return self.resolve(args[0].device, args[0].dtype)(*args)


TABLE: dict[str, Op] = {}
_FORCED: dict[str, str] = {
    name.strip(): choice.strip()
    for name, _, choice in (pair.partition("=") for pair in os.environ.get("COSMOS_FAST_OPS", "").split(","))
    if name.strip()
}


def _check_names(where: str, names: Iterable[str]) -> None:
    if unknown := sorted(set(names) - set(TABLE)):
        raise EnvironmentProblem(f"{where}: no op named {', '.join(unknown)}. Known: {', '.join(TABLE)}.")


def define(
    signature: str,
    validate: Callable[..., None],
    fake: Callable[..., Any],
    *candidates: Candidate,
) -> Callable[..., Any]:
    name = signature.partition("(")[0]
    plain = Candidate("reference", lambda: getattr(reference, name))
    op = TABLE[name] = Op(name, signature, validate, fake, (*candidates, plain))

    def checked_fake(*args: Any) -> Any:
        validate(*args)
        return fake(*args)

    LIBRARY.define(signature)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, op, key)
    torch.library.register_fake(f"cosmos_fast::{name}", checked_fake, lib=LIBRARY)
    return getattr(torch.ops.cosmos_fast, name).default


def triton(
    module: str,
    function: str,
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32),
    capability: tuple[tuple[int, int], tuple[int, int]] = ((8, 0), (99, 0)),
) -> Candidate:
    def load() -> Callable[..., Any]:
        return getattr(import_module(f"cosmos_fast.kernels.{module}"), function)

    return Candidate("triton", load, "cuda", capability, dtypes, ("triton",))


def native(name: str, symbol: str, device: str, **needs: Any) -> Candidate:
    return Candidate(
        name, lambda: getattr(torch.ops.cosmos_fast, symbol).default, device, symbol=symbol, **needs
    )


@contextmanager
def use(**forced: str) -> Iterator[None]:
    """Force implementations by op name inside the block, e.g. `use(adaln="reference")`."""
    _check_names("ops", forced)
    before = dict(_FORCED)
    _FORCED.update(forced)
    _forget()
    try:
        yield
    finally:
        _FORCED.clear()
        _FORCED.update(before)
        _forget()


def _forget() -> None:
    for op in TABLE.values():
        op.chosen.clear()
        op.reasons.clear()


def required(name: str, device: torch.device, dtype: torch.dtype, needs: str, instead: str) -> str:
    """Which implementation of an op runs, where a recipe rests on a fast one.

    Raises EnvironmentProblem where a GPU has none and nobody forced its reference; the error says what the op needs, and what
    to use instead.
    """
    op = TABLE[name]
    op.resolve(device, dtype)
    chosen, why = op.chosen[device.type, dtype][0], op.reasons[device.type, dtype]
    if device.type == "cuda" and chosen == "reference" and f"{name}=reference is forced" not in why.values():
        raise EnvironmentProblem(f"{name}: needs {needs}, got {'; '.join(why.values())}. {instead}")
    return chosen


def explain(device: str | torch.device, dtype: torch.dtype) -> list[tuple[str, str, dict[str, str]]]:
    """For each op: its name, the implementation chosen for tensors like these, why each other lost."""
    rows = []
    for op in TABLE.values():
        # An op whose every implementation takes one dtype, the same one, is asked about that.
        kinds = {candidate.dtypes for candidate in op.candidates if candidate.dtypes}
        only = next(iter(kinds)) if len(kinds) == 1 else ()
        kind = only[0] if len(only) == 1 else dtype
        op.resolve(torch.device(device), kind)
        key = (torch.device(device).type, kind)
        rows.append((op.name, op.chosen[key][0], op.reasons[key]))
    return rows


def used() -> dict[str, list[str]]:
    """For each op called so far in this process: the implementations that ran."""
    return {op.name: sorted({name for name, _ in op.chosen.values()}) for op in TABLE.values() if op.chosen}


def pick_device(wanted: str | None = None) -> torch.device:
    """The device to run on: the one asked for, else the first CUDA device, else the CPU."""
    device = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EnvironmentProblem(
            f"device: {wanted!r} was asked for but torch {torch.__version__} sees no CUDA device. "
            "Check the driver with nvidia-smi and that torch is a CUDA build, or pass --device cpu."
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EnvironmentProblem(
            f"device: {wanted!r} does not exist; there are {torch.cuda.device_count()} CUDA devices."
        )
    return device
