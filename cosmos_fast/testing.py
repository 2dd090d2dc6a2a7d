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
    third = op in ("qk_norm_rope", "qkv_moments", "qkv_sums")  # one part of the packed projection is not read
    return moved - args[0].numel() * args[0].element_size() // 3 if third else moved


def _flat(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _flat(value)


# --- how close is close enough ---------------------------------------------------------------------

EQUAL = frozenset({"patchify", "unpatchify", "pixels", "normalized", "values_packed", "attended_steps"})
"""Ops that move values or round them by a fixed rule: every bit must agree with the reference."""

RATIO, FLOOR = 2.0, 1e-6
"""An implementation may err twice as much against fp64 as the reference in the same dtype, plus FLOOR."""

EIGHT_BIT = {"attention_fp8": (0.04, 0.04), "attention_fp8_tiles": (0.04, 0.07), "linear_fp8": (4e-3, 8e-3), "linear_gelu_fp8": (1e-3, 8e-3),
             "conv3d_fp8": (4e-3, 8e-3)}  # fmt: skip
"""Ops that multiply codes: allowed relative error against fp64, and of the worst value as a share of the largest.

Rounding softmax weights to e4m3 leaves 0.026 where values are independent, 0.06 at worst where a list has few keys. A
product of codes errs by the tensor cores' sums of some 14 bits and by roundings to bf16, of the result and of the bias:
1.7e-3 each, 2**-8 at worst.
"""

ROUNDINGS = {("norm_silu", "composed"): 3, ("attention_fp8", "cudnn"): 2}
"""How often an implementation of a library rounds where the reference does once: it may err so many times as much."""

CODE_FLOOR = 2.0**-12
"""What any code may err: an eighth of the smallest distance between two. A fifth of a bit where codes are largest: fp32
arithmetic needs half of that, and the short GELU's 6e-6 a quarter at the smallest step of the cases, 0.1."""


class _Unrounded(TorchFunctionMode):
    """Runs a reference without its rounding to codes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to and len(args) == 2 and args[1] is reference.E4M3:
            return args[0]
        return func(*args, **(kwargs or {}))


def beyond(codes: Tensor, exact: Tensor) -> Tensor:
    """How far exact values lie outside of what rounds to these e4m3 codes: 0 for a right code, NaN for no number.

    Counting codes or steps would not do: an error that moves a large value by no step or one moves one next to zero by many.
    """
    values = torch.arange(128, dtype=torch.uint8).view(codes.dtype).float().double().to(codes.device)
    middle = (values[1:] + values[:-1]) / 2
    top, none = values.new_tensor([float("inf")]), values.new_tensor([float("nan")])
    low, high = torch.cat((-middle[:1], middle[:126], none)), torch.cat((middle[:126], top, none))
    bits = codes.contiguous().view(torch.uint8)
    place, exact = (bits & 127).int(), torch.where(bits > 127, -exact, exact).double()
    return (low[place] - exact).clamp_min(0) + (exact - high[place]).clamp_min(0)


def rel_error(out: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of `exact`; 0 for empty tensors."""
    return Error.between(out, exact).relative


@dataclass(frozen=True)
class Error:
    """Sums over any number of slices of one output; of codes, over how far they are `beyond` the exact values."""

    squares: float = 0.0
    of_exact: float = 0.0
    worst: float = 0.0  # may hide a NaN; squares does not
    largest: float = 0.0

    @classmethod
    def between(cls, out: Tensor, exact: Tensor) -> Error:
        if out.numel() == 0:
            return cls()
        exact = exact.double()
        gap = beyond(out, exact) if out.dtype == reference.E4M3 else (out.double() - exact).abs()
        infinite = exact.isinf() & (out.double() == exact)  # the least of no values, found as such
        gap, exact = gap.masked_fill(infinite, 0.0), exact.masked_fill(infinite, 0.0)
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


def written(op: str, args: Args) -> tuple[Tensor, ...]:
    """Those of the arguments that the op's schema lets it write to, in order."""
    return tuple(args[i] for i in _writes(op) if args[i] is not None)


def _writes(op: str) -> list[int]:
    given = getattr(torch.ops.cosmos_fast, op).default._schema.arguments
    return [i for i, argument in enumerate(given) if argument.alias_info and argument.alias_info.is_write]


def own_copies(op: str, args: Args) -> Args:
    """The arguments, with copies of those that the op writes to."""
    copied = [
        args[i].clone() if i in _writes(op) and args[i] is not None else args[i] for i in range(len(args))
    ]
    return tuple(copied)


def _reference(op: str, args: Args) -> tuple[Tensor, ...]:
    """Outputs of the reference and what it wrote to."""
    args = own_copies(op, args)
    return (*as_tuple(getattr(reference, op)(*args)), *written(op, args))


def eager(op: str, args: Args) -> tuple[Tensor, ...]:
    """The reference in the dtypes of `args`."""
    return as_tuple(getattr(reference, op)(*own_copies(op, args)))


def fp64(op: str, args: Args) -> tuple[Tensor, ...]:
    """The reference with every floating-point step in fp64 and codes not rounded; then what it wrote to."""
    with _Unrounded(), _Fp64():
        return _reference(op, tuple(_doubled(value) for value in args))


_ROWS = {
    "adaln": 1,
    "residual": 2,
    "residual_adaln": 2,
    "head_norm": 1,
    "qk_norm_rope": 1,
    "qkv_codes": 1,
    "gelu": 1,
    "linear_gelu": 1,
    "linear_head_norm": 1,
    "attention": 1,
    "attention_wide": 1,
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
        if op in ("qk_norm_rope", "qkv_codes"):
            cut[3:5] = args[3][part], args[4][part]
        if op in _OFFSET:
            cut[_OFFSET[op]] += start
        if op.startswith("residual"):
            cut[3] = [hint[part] for hint in args[3]]
            cut[4] = args[4] if args[4] is None or args[4].shape[1] == 1 else args[4][:, part]
        yield part, tuple(cut)


def _part(op: str, i: int, out: Tensor, tokens: slice, args: Args) -> Tensor:
    """Those tokens of output i. They are the last axis of packed values, whose groups of 16 no window splits."""
    if op in EQUAL:
        return out
    return out[..., tokens] if op == "qkv_codes" and i == 2 and args[10] else out[tokens]


def faults(
    op: str, outputs: Tensor | tuple[Tensor, ...], args: Args, candidate: str | None = None
) -> list[str]:
    """What is wrong with these outputs of an implementation, measured against the reference; [] if nothing.

    The arguments that it wrote to may follow its outputs; `args` must be from before. candidate: the implementation's
    name, for those of ROUNDINGS.
    """
    got, found = as_tuple(outputs), []
    ours, theirs = [Error()] * len(got), [Error()] * len(got)
    codes = [out.dtype == reference.E4M3 for out in got]
    for part, cut in _windows(op, args):
        plain = _reference(op, cut)
        exact = plain if op in EQUAL else fp64(op, cut)
        if len(got) not in (len(plain), len(plain) - len(written(op, cut))):
            return [f"{op}: {len(got)} results, not {len(plain)}"]
        for i, (mine, its) in enumerate(zip(got, plain)):
            shape = _part(op, i, mine, part, args).shape
            if (shape, mine.dtype) != (its.shape, its.dtype):
                return [f"{op}[{i}]: {tuple(shape)} {mine.dtype}, not {tuple(its.shape)} {its.dtype}"]
        if any(codes):
            with _Unrounded():
                plain = _reference(op, cut)
        for i, (mine, its, true) in enumerate(zip(got, plain, exact)):
            mine = _part(op, i, mine, part, args)
            if op in EQUAL and not torch.equal(mine, its):
                found.append(f"{op}[{i}]: {int((mine != its).sum())} of {its.numel()} values differ")
            ours[i] += Error.between(mine, true)
            theirs[i] += Error.between(its, true)
    times = RATIO * ROUNDINGS.get((op, candidate or ""), 1)
    for i, (error, base) in enumerate(zip(ours, theirs)):
        floor = FLOOR * max(base.largest, 1.0) + (CODE_FLOOR if codes[i] else 0.0)
        bounds = times * base.relative + FLOOR, times * base.worst + floor
        if op in EIGHT_BIT:
            relative, worst = (bound * times / RATIO for bound in EIGHT_BIT[op])
            bounds = relative, worst * base.largest + (CODE_FLOOR if codes[i] else 0.0)
        if not (error.relative <= bounds[0] and error.worst <= bounds[1]):
            what = ", in units of a step beyond what rounds to its codes" if codes[i] else ""
            found.append(
                f"{op}[{i}]: relative error {error.relative:.2e} (allowed {bounds[0]:.2e}), "
                f"worst {error.worst:.2e} (allowed {bounds[1]:.2e}){what}"
            )
    return found
