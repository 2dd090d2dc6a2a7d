"""The tables of tests and benchmarks: inputs of every op at the shapes that matter, and how close is close enough.

Letters: L tokens, D width, R modulation rows, J hints, N heads, K head width, S keys, C T H W latent axes,
F video frames. Groups: `production` shapes need a GPU; `small` ones run anywhere, also in Triton's interpreter;
`odd` ones break wrong assumptions; `empty` ones have no element.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import reference
from .ops import EPS
from .schedule import base_schedule, unipc_coefficients

Args = tuple[Any, ...]


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


# --- inputs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One row of the table: sizes for the op's maker, and why the row is there."""

    name: str
    group: str
    why: str
    sizes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Random:
    """Draws reproducible inputs on one device; floating-point ones in `dtype` unless told otherwise."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype or self.dtype)

    def codes(self, *shape: int) -> Tensor:
        return torch.randint(0, 256, shape, generator=self.generator, device=self.device, dtype=torch.uint8)


def _tables(r: Random, count: int, R: int, D: int) -> tuple[Tensor, ...]:
    # Rows of one bigger table, as the network passes them: the row stride is D, the start is not the storage's.
    return tuple(r.normal(count, R, D).unbind(0))


def _per_frame(L: int, R: int, offset: int) -> int:
    return max(-(-(offset + L) // R), 1)


def _adaln(r: Random, L: int, D: int, R: int = 1, offset: int = 0, fp32_out: int = 0) -> Args:
    shift, scale = _tables(r, 2, R, D)
    out = torch.float32 if fp32_out else r.dtype
    return r.normal(L, D), shift, scale, _per_frame(L, R, offset), offset, EPS, out


def _residual(r: Random, L: int, D: int, R: int = 1, offset: int = 0, J: int = 0, maps: int = 0) -> Args:
    (gate,) = _tables(r, 1, R, D)
    weights = r.normal(J, L if maps else 1, dtype=torch.float32) if J else None
    hints = [r.normal(L, D) for _ in range(J)]
    return r.normal(L, D), r.normal(L, D), gate, hints, weights, _per_frame(L, R, offset), offset


def _residual_adaln(
    r: Random, L: int, D: int, R: int = 1, offset: int = 0, fp32_out: int = 0, **hints: int
) -> Args:
    x, branch, gate, held, weights, *rows = _residual(r, L, D, R, offset, **hints)
    shift, scale = _tables(r, 2, R, D)
    return x, branch, gate, held, weights, shift, scale, *rows, EPS, torch.float32 if fp32_out else r.dtype


def _head_norm(r: Random, L: int, N: int, K: int, packed: int = 1) -> Args:
    x = r.normal(L, packed * N * K)
    return x[:, (packed - 1) * N * K :], r.normal(K), EPS


def _qk_norm_rope(r: Random, L: int, N: int, K: int) -> Args:
    angles = r.normal(L, K // 2, dtype=torch.float32) * 3
    return r.normal(L, 3 * N * K), r.normal(K), r.normal(K), angles.cos(), angles.sin(), EPS


def _patchify(r: Random, C: int, T: int, H: int, W: int, view: int = 0) -> Args:
    z = r.normal(T, C, H, W).transpose(0, 1) if view else r.normal(C, T, H, W)
    return z, (torch.arange(T, device=r.device) < 1).to(r.dtype)


def _unpatchify(r: Random, C: int, T: int, H: int, W: int) -> Args:
    return r.normal(T * (H // 2) * (W // 2), 4 * C), T, H, W


def _guided_unipc(r: Random, T: int, H: int, W: int, step: int = 5, alone: int = 0) -> Args:
    shape = (1, 16, T, H, W)
    x, m1, m2, last = (r.normal(*shape, dtype=torch.float32) for _ in range(4))
    uncond = None if alone else r.normal(*shape)
    coefficients = list(unipc_coefficients(base_schedule(35))[step])
    return x, r.normal(*shape), uncond, m1, m2, last, 3.0, coefficients


def _conv3d(r: Random, C: int, O: int, F: int, H: int, W: int, B: int = 1) -> Args:  # noqa: E741
    return r.normal(B, C, F + 2, H, W), r.normal(O, C, 3, 3, 3) * (27 * C) ** -0.5, r.normal(O)


MAKERS: dict[str, Callable[..., Args]] = {
    "adaln": _adaln, "residual": _residual, "residual_adaln": _residual_adaln, "head_norm": _head_norm,
    "qk_norm_rope": _qk_norm_rope, "patchify": _patchify, "unpatchify": _unpatchify,
    "gelu": lambda r, L, M: (r.normal(L, M) * 2,),
    "attention": lambda r, L, S, N, K: (r.normal(L, N, K), r.normal(S, N, K), r.normal(S, N, K)),
    "conv3d": _conv3d, "guided_unipc": _guided_unipc, "pixels": lambda r, F, H, W, last=0: (r.normal(1, F, H, W, 3).permute(0, 4, 1, 2, 3) if last else r.normal(1, 3, F, H, W),),
    "normalized": lambda r, F, H, W: (r.codes(F, H, W, 3), r.dtype),
}  # fmt: skip

# --- the cases -------------------------------------------------------------------------------------

_720P, _480P, _SLICE = 24 * 44 * 80, 24 * 30 * 52, 3 * 44 * 80


def _token_cases(
    production: dict[str, int], small: dict[str, int], odd: Sequence[Case] = ()
) -> tuple[Case, ...]:
    return (
        Case("720p", "production", "93 frames of 1280x704", {"L": _720P, **production}),
        Case("480p", "production", "93 frames of 832x480", {"L": _480P, **production}),
        Case("slice", "production", "one of eight context ranks at 720p", {"L": _SLICE, **production}),
        Case("small", "small", "a few whole tokens", {"L": 24, **small}),
        Case("one token", "odd", "L = 1", {"L": 1, **small}),
        Case("empty", "empty", "a rank without tokens", {"L": 0, **small}),
        *odd,
    )


def _row_cases(hints: bool) -> tuple[Case, ...]:
    wide, rows = {"D": 2048}, [
        Case("720p frames", "production", "per-frame times of the distilled model", {"L": _720P, "D": 2048, "R": 24}),
        Case("later rank", "production", "token_offset of a rank in the middle", {"L": _SLICE, "D": 2048, "R": 8, "offset": 3 * _SLICE}),
        Case("frames", "small", "rows change inside", {"L": 24, "D": 128, "R": 4}),
        Case("width 96", "odd", "D is no power of two", {"L": 7, "D": 96, "R": 3}),
        Case("width 2304", "odd", "D is no power of two and wide", {"L": 5, "D": 2304}),
        Case("offset", "odd", "starts inside a frame", {"L": 10, "D": 64, "R": 5, "offset": 9}),
        Case("one frame", "odd", "an image", {"L": 6, "D": 64, "R": 1}),
    ]  # fmt: skip
    if hints:
        rows += [
            Case("720p 1 hint", "production", "single control", {"L": _720P, "D": 2048, "J": 1}),
            Case("720p 4 hints", "production", "all controls with spatial weights", {"L": _720P, "D": 2048, "J": 4, "maps": 1}),
            *(Case(f"{j} hints", "small", "each count is its own kernel", {"L": 9, "D": 128, "J": j}) for j in (1, 2, 3, 4)),
            Case("maps", "odd", "weights per token", {"L": 9, "D": 96, "R": 3, "J": 4, "maps": 1}),
        ]  # fmt: skip
    return _token_cases(wide, {"D": 128}, rows)


_OUT32 = Case("head", "small", "the head normalises into fp32", {"L": 6, "D": 128, "fp32_out": 1})
_HEAD = Case("720p head", "production", "as the head does", {"L": _720P, "D": 2048, "fp32_out": 1})
_HEADS, _TINY = {"N": 16, "K": 128}, {"N": 2, "K": 64}
_ODD_HEADS = Case("3 heads of 96", "odd", "nothing is a power of two", {"L": 5, "N": 3, "K": 96})
_ONE_HEAD = Case("published head", "small", "the published heads", {"L": 3, **_HEADS})
_LATENT = {"T": 24, "H": 88, "W": 160}
_PICTURE = {"F": 93, "H": 704, "W": 1280}

CASES: dict[str, tuple[Case, ...]] = {
    "adaln": (*_row_cases(hints=False), _OUT32),
    "residual": _row_cases(hints=True),
    "residual_adaln": (*_row_cases(hints=True), _OUT32, _HEAD),
    "head_norm": _token_cases(_HEADS, _TINY, [
        _ODD_HEADS, _ONE_HEAD,
        Case("packed", "odd", "the last third of a packed projection: strided rows", {"L": 5, "N": 2, "K": 64, "packed": 3}),
        Case("720p packed", "production", "strided rows", {"L": _720P, **_HEADS, "packed": 2}),
    ]),
    "qk_norm_rope": _token_cases(_HEADS, _TINY, [_ODD_HEADS, _ONE_HEAD]),
    "gelu": _token_cases({"M": 8192}, {"M": 256}, [
        Case("tail", "odd", "last block partly full", {"L": 37, "M": 129}),
        Case("beyond 31 bits", "production", "more than 2**31 elements", {"L": 263_000, "M": 8192}),
    ]),
    "attention": _token_cases({"S": 512, **_HEADS}, {"S": 9, **_TINY}, [
        Case("one key", "odd", "softmax of one value", {"L": 3, "S": 1, **_TINY}),
        Case("self", "production", "self-attention of one rank", {"L": _SLICE, "S": _SLICE, **_HEADS}),
    ]),
    "patchify": (
        Case("720p", "production", "93 frames of 1280x704", {"C": 16, **_LATENT}),
        Case("small", "small", "two frames", {"C": 4, "T": 2, "H": 6, "W": 8}),
        Case("view", "odd", "a transposed latent", {"C": 3, "T": 3, "H": 4, "W": 10, "view": 1}),
        Case("one frame", "odd", "an image of one token", {"C": 1, "T": 1, "H": 2, "W": 2}),
        Case("empty", "empty", "no frame", {"C": 4, "T": 0, "H": 4, "W": 4}),
    ),
    "unpatchify": (
        Case("720p", "production", "93 frames of 1280x704", {"C": 16, **_LATENT}),
        Case("small", "small", "two frames", {"C": 4, "T": 2, "H": 6, "W": 8}),
        Case("odd", "odd", "channels no power of two, last block partly full", {"C": 3, "T": 3, "H": 4, "W": 10}),
        Case("one token", "odd", "an image of one token", {"C": 1, "T": 1, "H": 2, "W": 2}),
        Case("empty", "empty", "no frame", {"C": 4, "T": 0, "H": 4, "W": 4}),
    ),
    "conv3d": (
        Case("720p", "production", "four frames of the widest stage", {"C": 96, "O": 96, "F": 4, "H": 704, "W": 1280}),
        Case("small", "small", "a short window", {"C": 16, "O": 8, "F": 2, "H": 6, "W": 10}),
        Case("one frame", "odd", "frame 0 alone, one pixel", {"C": 3, "O": 5, "F": 1, "H": 1, "W": 1}),
        Case("empty", "empty", "no clip", {"C": 4, "O": 4, "F": 1, "H": 4, "W": 4, "B": 0}),
    ),
    "guided_unipc": (
        Case("720p", "production", "93 frames of 1280x704, guidance", _LATENT),
        Case("first", "small", "nothing to correct", {"T": 1, "H": 6, "W": 7, "step": 0}),
        Case("second", "small", "corrector of order 1", {"T": 1, "H": 6, "W": 7, "step": 1}),
        Case("middle", "small", "all terms", {"T": 2, "H": 6, "W": 10}),
        Case("last", "odd", "the result is m; last block partly full", {"T": 3, "H": 9, "W": 11, "step": 34}),
        Case("alone", "odd", "no guidance", {"T": 1, "H": 6, "W": 7, "alone": 1}),
        Case("empty", "empty", "no frame", {"T": 0, "H": 4, "W": 4}),
    ),
    "pixels": (
        Case("720p", "production", "93 frames", _PICTURE),
        Case("720p last", "production", "as the channels-last decoder leaves them", {**_PICTURE, "last": 1}),
        Case("small", "small", "channels first", {"F": 2, "H": 6, "W": 10}),
        Case("last", "odd", "channels last, last block partly full", {"F": 3, "H": 9, "W": 23, "last": 1}),
        Case("one pixel", "odd", "F = H = W = 1", {"F": 1, "H": 1, "W": 1}),
        Case("empty", "empty", "no frame", {"F": 0, "H": 4, "W": 4}),
    ),
    "normalized": (
        Case("720p", "production", "93 frames", _PICTURE),
        Case("small", "small", "all codes", {"F": 2, "H": 16, "W": 16}),
        Case("tail", "odd", "last block partly full", {"F": 1, "H": 7, "W": 11}),
        Case("empty", "empty", "no frame", {"F": 0, "H": 4, "W": 4}),
    ),
}  # fmt: skip


def inputs(op: str, case: Case, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> Args:
    """Arguments of `torch.ops.cosmos_fast.<op>` for one case; the same on every call."""
    device = torch.device(device)
    random = Random(device, dtype, torch.Generator(device).manual_seed(seed))
    return MAKERS[op](random, **case.sizes)


def nbytes(op: str, args: Args, outputs: Sequence[Tensor]) -> int:
    """Bytes the op must move: every operand read once, every result written once."""
    moved = sum(t.numel() * t.element_size() for t in (*_flat(args), *outputs))
    return moved - args[0].numel() * args[0].element_size() // 3 if op == "qk_norm_rope" else moved


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
    "attention": 1,
}
"""Ops that work token by token: how many leading arguments are sliced with the tokens."""


def _windows(op: str, args: Args) -> Iterator[tuple[slice, Args]]:
    """Slices of the tokens with their arguments, so that fp64 needs little memory. Attention: both ends only."""
    if op not in _ROWS:
        yield slice(None), args
        return
    L, step = args[0].shape[0], 128 if op == "attention" else 8192
    starts = range(0, max(L, 1), step) if op != "attention" else sorted({0, max(L - step, 0)})
    for start in starts:
        part = slice(start, start + step)
        cut = [value[part] if i < _ROWS[op] else value for i, value in enumerate(args)]
        if op == "qk_norm_rope":
            cut[3:5] = args[3][part], args[4][part]
        if op in ("adaln", "residual", "residual_adaln"):
            cut[-3 if op != "residual" else -1] += start
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
            if op in EQUAL and not torch.equal(mine, its):
                found.append(f"{op}[{i}]: {int((mine != its).sum())} of {its.numel()} values differ")
            ours[i] += Error.between(mine, true)
            theirs[i] += Error.between(its, true)
    for i, (error, base) in enumerate(zip(ours, theirs)):
        bounds = RATIO * base.relative + FLOOR, RATIO * base.worst + FLOOR * max(base.largest, 1.0)
        if not (error.relative <= bounds[0] and error.worst <= bounds[1]):
            found.append(
                f"{op}[{i}]: relative error {error.relative:.2e} (allowed {bounds[0]:.2e}), "
                f"worst {error.worst:.2e} (allowed {bounds[1]:.2e})"
            )
    return found
