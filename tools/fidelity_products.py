"""What 8 bits cost at every linear layer of a network, on the rows that really reach it.

Used by tools/fidelity.py. `watched` replaces the layers of a network by ones that compute the same and, while `active`,
note the error of their product in 8 bits: with a step per row, as it runs; with one step for the whole tensor, as
Transformer Engine's current scaling; of the rows alone and of the weights alone. And how far the largest value of the rows
is from their spread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_fast import quant, reference
from cosmos_fast.fp8_weights import quantised_rows
from cosmos_fast.linears import Linear, LinearGelu

Errors = dict[str, dict[str, list[float]]]


@dataclass
class Products:
    """Errors by way and layer, and by way and step."""

    active: bool = False
    step: int = -1
    found: Errors = field(default_factory=dict)
    steps: Errors = field(default_factory=dict)

    def note(self, layer: str, x: Tensor, weight: Tensor) -> None:
        """The product of rows x (L, D) with a matrix (M, D), every way."""
        if not self.active:
            return
        rows, matrix = x.float(), weight.float()
        true = rows @ matrix.T
        own_rows, own_matrix = _by_norm(rows), _scaled(*quantised_rows(matrix))
        ways = {
            "as it runs": (own_rows, own_matrix), "rows alone": (own_rows, matrix), "weights alone": (rows, own_matrix),
            "one step per tensor": (_by_peak(rows), _by_peak(matrix)),
        }  # fmt: skip
        for way, (a, b) in ways.items():
            self._add(way, layer, float((a @ b.T - true).norm() / true.norm().clamp_min(1e-30)))
        self._add(
            "largest value over rms",
            layer,
            float(rows.abs().amax() / rows.square().mean().sqrt().clamp_min(1e-30)),
        )

    def _add(self, way: str, layer: str, value: float) -> None:
        self.found.setdefault(way, {}).setdefault(layer, []).append(value)
        self.steps.setdefault(way, {}).setdefault(str(self.step), []).append(value)

    def summary(self) -> dict[str, Any]:
        return summary(self.found, self.steps)


def _scaled(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.float() * scale[:, None]


def _by_norm(rows: Tensor) -> Tensor:
    codes, steps = reference.quantise(rows)
    return _scaled(codes, steps)


def _by_peak(x: Tensor) -> Tensor:
    step = x.abs().amax().clamp_min(1e-30) / 448
    return (x / step).clamp(-448, 448).to(torch.float8_e4m3fn).float() * step


def summary(found: Errors, steps: Errors) -> dict[str, Any]:
    """For each way: mean over layers, the worst layer, each layer's mean, each step's."""
    table = {}
    for way, layers in found.items():
        by_layer = {name: fmean(values) for name, values in layers.items()}
        worst = max(by_layer, key=lambda name: by_layer[name])
        table[way] = {
            "mean": fmean(by_layer.values()), "worst": by_layer[worst], "worst_layer": worst, "by_layer": by_layer,
            "by_step": {step: fmean(values) for step, values in steps.get(way, {}).items()},
        }  # fmt: skip
    return table


Note = Callable[[Tensor, Tensor], None]


class _Plain(Linear):
    note: Note

    def forward(self, x: Tensor) -> Tensor:
        self.note(x, self.weight)
        return F.linear(x, self.weight, self.bias)

    def heads(self, x: Tensor, gain: Tensor) -> Tensor:
        self.note(x, self.weight)
        return super().heads(x, gain)

    def onto(self, x: Tensor, h: Tensor, gate: Tensor, *, keep: bool = False) -> Any:
        if not (keep or gate.shape[0] > 1):  # else `forward` is called, and notes it
            self.note(h, self.weight)
        return super().onto(x, h, gate, keep=keep)


class _Gelu(LinearGelu):
    note: Note

    def forward(self, x: Tensor) -> Tensor:
        self.note(x, self.weight)
        return super().forward(x)


def watched(network: nn.Module, names: Iterable[str] | None = None) -> Products:
    """The notes of a network whose layers, those named or all that are called, note what they meet from now on."""
    products, wanted = Products(), None if names is None else set(names)

    def make(name: str, linear: nn.Linear) -> nn.Module | None:
        if wanted is not None and name not in wanted:
            return None
        with torch.device("meta"):
            kind = _Gelu if isinstance(linear, LinearGelu) else _Plain
            new = kind(linear.in_features, linear.out_features, bias=linear.bias is not None)
        new.weight, new.bias = linear.weight, linear.bias
        new.note = lambda x, weight: products.note(name, x, weight)
        return new

    quant.replace(network, make)
    return products
