"""What tests and benchmarks share: inputs of every case of `cases`, and how close to the reference is close enough."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import reference
from .cases import CASES as CASES
from .cases import MAKERS as MAKERS
from .cases import Args, Random
from .cases import Case as Case


def kernels_from_checkout() -> None:
    """In a checkout, make `cosmos_fast.kernels` its own kernels/, installed or not; nothing elsewhere."""
    name, root = "cosmos_fast.kernels", Path(__file__).resolve().parents[1]
    file = root / "kernels" / "__init__.py"
    if name in sys.modules or not file.exists() or not (root / "pyproject.toml").exists():
        return
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(file.parent)])
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def inputs(op: str, case: Case, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> Args:
    """Arguments of `torch.ops.cosmos_fast.<op>` for one case; the same on every call."""
    device = torch.device(device)
    random = Random(device, dtype, torch.Generator(device).manual_seed(seed))
    return MAKERS[op](random, **case.sizes)


def nbytes(op: str, args: Args, outputs: Sequence[Tensor]) -> int:
    """Bytes the op must move: every operand read once, every result written once."""
    moved = sum(t.numel() * t.element_size() for t in (*_flat(args), *outputs))
    third = op in ("qk_norm_rope", "qkv_moments")  # one part of the packed projection is not read
    return moved - args[0].numel() * args[0].element_size() // 3 if third else moved


def _flat(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _flat(value)


# --- how close is close enough ---------------------------------------------------------------------

EQUAL = frozenset({"patchify", "unpatchify", "pixels", "normalized"})
"""Ops that move values or round them by a fixed rule: every bit must agree with the reference."""

RATIO, FLOOR = 2.0, 1e-6
"""An implementation may err twice as much against fp64 as the reference in the same dtype, plus FLOOR."""

EIGHT_BIT = {"attention_fp8": 0.04, "linear_fp8": 4e-3}
"""Relative error against fp64 of ops on 8-bit operands; the worst value may be off by as much of the largest.

Rounding softmax weights to e4m3 leaves 0.026 where values are independent. A product of codes errs by its rounding to
bf16, 1.7e-3, and by the tensor cores' sums of some 14 bits.
"""

CODES_OFF = {"cuda": (1e-3, 1), "cpu": (0.05, 8)}
"""Share of 8-bit codes that may be off, and by how many steps. Triton's interpreter, which runs on the CPU, forgets the
carry into the exponent where a mantissa rounds up to the next power of two: 2.5 % of the codes, 8 steps each."""


ROUNDED_TWICE = {"linear_gelu_fp8": 0.06}
"""The share on a GPU of ops that an implementation may compute through bf16: 1/16 of a code's width away or less."""


def codes_off(op: str, mine: Tensor, its: Tensor) -> str | None:
    """What is wrong with e4m3 codes that should be `its`; None if nothing."""
    a, b = (x.contiguous().view(torch.int8).int() for x in (mine, its))
    a, b = (torch.where(x < 0, -(x & 127), x) for x in (a, b))  # in order of value, both zeros alike
    gap = (a - b).abs()
    share = float((gap > 0).float().mean()) if gap.numel() else 0.0
    most, steps = CODES_OFF[mine.device.type]
    if share > max(most, ROUNDED_TWICE.get(op, 0.0)) or (gap.numel() and int(gap.max()) > steps):
        return f"{share:.2%} of the codes differ, by {int(gap.max())} steps at most"
    return None


def rel_error(out: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of `exact`; 0 for empty tensors."""
    return Error.between(out, exact).relative


@dataclass(frozen=True)
class Error:
    """Sums over any number of slices of one output."""

    squares: float = 0.0
    of_exact: float = 0.0
    worst: float = 0.0  # may hide a NaN; squares does not
    largest: float = 0.0

    @classmethod
    def between(cls, out: Tensor, exact: Tensor) -> Error:
        if out.numel() == 0:
            return cls()
        exact = exact.double()
        gap = (out.double() - exact).abs()
        return cls(
            gap.square().sum().item(), exact.square().sum().item(), gap.max().item(), exact.abs().max().item()
        )

    def __add__(self, other: Error) -> Error:
        sums = self.squares + other.squares, self.of_exact + other.of_exact
        return Error(*sums, max(self.worst, other.worst), max(self.largest, other.largest))

    @property
    def relative(self) -> float:
        return (self.squares / self.of_exact) ** 0.5 if self.of_exact else self.squares**0.5


class _Fp64(TorchFunctionMode):
    """Runs a reference in fp64: its `.float()` keeps doubles."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        return func(*args, **(kwargs or {}))


def _doubled(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, torch.dtype):
        return torch.float64
    return [_doubled(part) for part in value] if isinstance(value, list) else value


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """Outputs of an op, one or several, as a tuple."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def eager(op: str, args: Args) -> tuple[Tensor, ...]:
    """The reference in the dtypes of `args`."""
    return as_tuple(getattr(reference, op)(*args))


def fp64(op: str, args: Args) -> tuple[Tensor, ...]:
    """The reference with every floating-point step in fp64."""
    with _Fp64():
        return as_tuple(getattr(reference, op)(*(_doubled(value) for value in args)))


_ROWS = {
    "adaln": 1,
    "residual": 2,
    "residual_adaln": 2,
    "head_norm": 1,
    "qk_norm_rope": 1,
    "gelu": 1,
    "linear_gelu": 1,
    "linear_head_norm": 1,
    "attention": 1,
    "attention_fp8": 1,
    "values_restored": 1,
    "quantise": 1,
    "adaln_fp8": 1,
    "residual_adaln_fp8": 2,
    "gelu_fp8": 2,
    "linear_fp8": 2,
    "linear_gelu_fp8": 3,
}
"""Ops that work token by token: how many leading arguments are sliced with the tokens."""

_OFFSET = {"adaln": -3, "residual": -1, "residual_adaln": -3, "adaln_fp8": -2, "residual_adaln_fp8": -2}
"""Which argument is the token offset."""


def _windows(op: str, args: Args) -> Iterator[tuple[slice, Args]]:
    """Slices of the tokens with their arguments, so that fp64 needs little memory. Attention: both ends only."""
    if op not in _ROWS:
        yield slice(None), args
        return
    ends = op.startswith("attention")
    L, step = args[0].shape[0], 128 if ends else 8192
    starts = sorted({0, max(L - step, 0)}) if ends else range(0, max(L, 1), step)
    for start in starts:
        part = slice(start, start + step)
        cut = [value[part] if i < _ROWS[op] else value for i, value in enumerate(args)]
        if op == "qk_norm_rope":
            cut[3:5] = args[3][part], args[4][part]
        if op in _OFFSET:
            cut[_OFFSET[op]] += start
        if op.startswith("residual"):
            cut[3] = [hint[part] for hint in args[3]]
            cut[4] = args[4] if args[4] is None or args[4].shape[1] == 1 else args[4][:, part]
        yield part, tuple(cut)


def faults(op: str, outputs: Tensor | tuple[Tensor, ...], args: Args) -> list[str]:
    """What is wrong with these outputs of an implementation, measured against the reference; [] if nothing."""
    got, found = as_tuple(outputs), []
    ours, theirs = [Error()] * len(got), [Error()] * len(got)
    for part, cut in _windows(op, args):
        plain = eager(op, cut)
        exact = plain if op in EQUAL else fp64(op, cut)
        for i, (mine, its, true) in enumerate(zip(got, plain, exact, strict=True)):
            mine = mine if op in EQUAL else mine[part]
            if (mine.shape, mine.dtype) != (its.shape, its.dtype):
                return [f"{op}[{i}]: {tuple(mine.shape)} {mine.dtype}, not {tuple(its.shape)} {its.dtype}"]
            if its.dtype == torch.float8_e4m3fn:
                found += [f"{op}[{i}]: {fault}" for fault in [codes_off(op, mine, its)] if fault]
                continue
            if op in EQUAL and not torch.equal(mine, its):
                found.append(f"{op}[{i}]: {int((mine != its).sum())} of {its.numel()} values differ")
            ours[i] += Error.between(mine, true)
            theirs[i] += Error.between(its, true)
    for i, (error, base) in enumerate(zip(ours, theirs)):
        bounds = RATIO * base.relative + FLOOR, RATIO * base.worst + FLOOR * max(base.largest, 1.0)
        if op in EIGHT_BIT:
            bounds = EIGHT_BIT[op], EIGHT_BIT[op] * base.largest
        if not (error.relative <= bounds[0] and error.worst <= bounds[1]):
            found.append(
                f"{op}[{i}]: relative error {error.relative:.2e} (allowed {bounds[0]:.2e}), "
                f"worst {error.worst:.2e} (allowed {bounds[1]:.2e})"
            )
    return found
