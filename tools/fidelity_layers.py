"""Ways to turn the operands of self-attention into 8-bit codes, and what each costs on a layer's own activations.

Used by tools/fidelity.py. Shapes: q, k, v (L, N, K) fp32.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from fidelity_products import Errors, summary  # noqa: E402
from torch import Tensor  # noqa: E402

from cosmos_fast import ops, reference  # noqa: E402
from cosmos_fast.attention8 import WEIGHT_SCALE  # noqa: E402
from cosmos_fast.self_attention import exact  # noqa: E402


@dataclass(frozen=True)
class Way:
    """How operands become codes. steps: one power of two, or the largest value of a head, or of 128 tokens of it, to 448."""

    k_mean: bool = True
    v_mean: bool = True
    rotate: bool = True
    steps: str = "bound"
    weights: bool = True


WAYS = {
    "naive": Way(False, False, False),
    "naive, step per head": Way(False, False, False, "head"),
    "mean of k removed": Way(True, False, False),
    "both means removed": Way(True, True, False),
    "rotated alone": Way(False, False, True),
    "ours": Way(),
    "ours, step per head": Way(steps="head"),
    "ours, step per 128 tokens": Way(steps="tokens"),
    "ours, weights not rounded": Way(weights=False),
}


def rounded(x: Tensor, steps: str) -> Tensor:
    """What codes of x (L, N, K) stand for."""
    if steps == "tokens":
        pad = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -len(x) % 128)).unflatten(0, (-1, 128))
        return _rounded(pad, pad.abs().amax((1, 3), keepdim=True) / 448).flatten(0, 1)[: len(x)]
    peak = x.abs().amax((0, 2), keepdim=True) / 448
    return _rounded(x, peak if steps == "head" else reference.power_of_two(peak.amax()))


def _rounded(x: Tensor, step: Tensor) -> Tensor:
    step = torch.where(step == 0, 1.0, step)
    return (x / step).clamp(-448, 448).to(torch.float8_e4m3fn).float() * step


def attended(way: Way, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of (L, N, K) fp32 with operands and weights rounded that way."""
    shift = v.mean(0) if way.v_mean else v[0] * 0
    k = k - k.mean(0) if way.k_mean else k
    if way.rotate:
        H = reference.hadamard(q.shape[-1]).to(q)
        q, k = q @ H, k @ H
    q, k = rounded(q, way.steps), rounded(k, way.steps)
    v = rounded((v - shift).transpose(1, 2), "head" if way.steps != "bound" else "bound").transpose(1, 2)
    scores = q.transpose(0, 1) @ k.permute(1, 2, 0) * q.shape[-1] ** -0.5
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    total = weights.sum(-1, keepdim=True)
    if way.weights:
        weights = (weights * WEIGHT_SCALE).to(torch.float8_e4m3fn).float() / WEIGHT_SCALE
    return (weights @ v.transpose(0, 1) / total).transpose(0, 1) + shift


@dataclass
class Layers:
    """A `SelfAttention` that is exact and notes the error of every way, and of the recipe's own, by layer."""

    own: Any
    names: dict[int, str] = field(default_factory=dict)
    active: bool = False
    step: int = -1
    found: Errors = field(default_factory=dict)
    steps: Errors = field(default_factory=dict)

    def __call__(self, qkv: Tensor, q_gain: Tensor, *rest: Any) -> Tensor:
        out = exact(qkv, q_gain, *rest)
        if self.active:
            q, k, v = (x.float() for x in ops.qk_norm_rope(qkv, q_gain, *rest[:3]))
            true = reference.attention(q, k, v)
            name = self.names[q_gain.data_ptr()]
            self._note("bf16" if qkv.dtype == torch.bfloat16 else "fp32", name, out, true)
            self._note("as it runs", name, self.own(qkv, q_gain, *rest), true)
            for way, choice in WAYS.items():
                self._note(way, name, attended(choice, q, k, v), true)
        return out

    def _note(self, way: str, name: str, out: Tensor, true: Tensor) -> None:
        error = float((out.float().view_as(true) - true).norm() / true.norm())
        self.found.setdefault(way, {}).setdefault(name, []).append(error)
        self.steps.setdefault(way, {}).setdefault(str(self.step), []).append(error)

    def summary(self) -> dict[str, Any]:
        return summary(self.found, self.steps)
