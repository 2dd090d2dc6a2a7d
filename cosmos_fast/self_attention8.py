"""Self-attention over e4m3 codes, and the schedule that keeps the first and last steps out of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import dispatch, ops_attention8, ops_tiles
from .formats import EnvironmentProblem
from .ops_attention8 import Codes
from .ops_linear8 import Quantised
from .ops_tiles import KeyTiles
from .recipe import Recipe
from .self_attention import SelfAttention

SLOW = ("emulated", "reference")
"""Implementations for tests: at the size of a clip they take minutes a call."""

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Fp8:
    """A `SelfAttention` whose operands are e4m3 codes. rotate: spread each head's outliers, see `ops_attention8.qkv_codes`."""

    rotate: bool = True

    def __call__(
        self, qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, step: int
    ) -> Tensor:
        codes = self._codes(qkv, q_gain, k_gain, cos, sin)
        return ops_attention8.attention_fp8(codes, qkv.dtype).flatten(1)

    def quantised(
        self, qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, step: int
    ) -> Quantised:
        return ops_attention8.attention_rows(self._codes(qkv, q_gain, k_gain, cos, sin), qkv.dtype)

    def _codes(self, qkv: Tensor, *given: Tensor) -> Codes:
        pack = ops_attention8.wants_packed(qkv.device)
        return ops_attention8.qkv_codes(qkv, *given, rotate=self.rotate, pack=pack)


@dataclass(frozen=True)
class SparseFp8:
    """`Fp8` over the key tiles that `ops_tiles.estimated_tiles` keeps of each layer's own codes.

    share, mass: of the tiles and of the estimated weight; see there. rotate: as in `Fp8`.
    """

    share: float = 1.0
    mass: float = 1.0
    rotate: bool = True

    def __call__(
        self, qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, step: int
    ) -> Tensor:
        listed = self._listed(qkv, q_gain, k_gain, cos, sin)
        return ops_tiles.attention_fp8_tiles(*listed, qkv.dtype)[0].flatten(1)

    def quantised(
        self, qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, step: int
    ) -> Quantised:
        return ops_tiles.attention_rows(*self._listed(qkv, q_gain, k_gain, cos, sin), qkv.dtype)

    def _listed(self, *given: Tensor) -> tuple[Codes, KeyTiles]:
        codes = ops_attention8.qkv_codes(*given, rotate=self.rotate, pack=True)
        return codes, ops_tiles.estimated_tiles(codes, self.share, self.mass)


def fp8(device: torch.device, share: float = 1.0, mass: float = 1.0) -> Fp8 | SparseFp8:
    """8-bit attention for this device. Raises EnvironmentProblem where only an emulation would run on a GPU.

    share, mass: of the key tiles that are kept (`SparseFp8`); 1 and 1 keep all.
    """
    is_sparse = min(share, mass) < 1
    name = "attention_fp8_tiles" if is_sparse else "attention_fp8"
    op, key = dispatch.TABLE[name], (device.type, torch.float8_e4m3fn)
    op.resolve(device, torch.float8_e4m3fn)
    chosen, reasons = op.chosen[key][0], op.reasons[key]
    if device.type == "cuda" and chosen in SLOW:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise EnvironmentProblem(
            f"recipe: attention 'fp8' needs a fast implementation on this GPU, got {chosen!r} ({why}). "
            "Install cosmos-fast[fa3] or cosmos-fast[cudnn], or take the recipe fp8_linear."
        )
    return SparseFp8(share, mass) if is_sparse else Fp8()


def precise(network: Module, recipe: Recipe, attend: SelfAttention) -> Module | None:
    """The network, its weights shared, that attends as given at the recipe's first and last steps; None if it has none."""
    if recipe.attention == "bf16" or recipe.attention_head + recipe.attention_tail == 0:
        return None
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    twin = copy.deepcopy(network, shared)
    for block in twin.modules():
        if hasattr(block, "attend"):
            block.attend = attend  # type: ignore[assignment]
    return twin


@dataclass(frozen=True)
class Scheduled:
    """A bound network, (z, step) -> velocities, that is `fast` from step `first` to `last` - 1 and `precise` elsewhere."""

    fast: Callable[[Tensor, int], Any]
    precise: Callable[[Tensor, int], Any]
    first: int
    last: int

    def __call__(self, z_BCTHW: Tensor, step: int) -> Any:
        return (self.fast if self.first <= step < self.last else self.precise)(z_BCTHW, step)


def scheduled(bound: Any, twin: nn.Module | None, recipe: Recipe, record: Callable[[Any], Any]) -> Any:
    """A bound network (`network.Pair` or `Single`), `twin` in its place at the recipe's first and last steps.

    record: what is done with each of the two before it is called, such as a CUDA graph; they never share one.
    """
    if twin is None:
        return record(bound)
    context = bound.ctx if hasattr(bound, "ctx") else bound.cond
    steps = context.tables.head.shape[0]
    first, last = round(recipe.attention_head * steps), steps - round(recipe.attention_tail * steps)
    return Scheduled(record(bound), record(replace(bound, network=twin)), first, last)
