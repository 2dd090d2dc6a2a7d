"""8-bit linear layers: the pass that puts them in a network, and the proof that this machine computes them right.

Which layers is the rule of `fp8_weights`; how they multiply is the recipe's `linear`:
    fp8      codes and steps of `ops_linear8`, made by the kernel before: normalisation, GELU, self-attention in 8 bits; a kernel
             of its own for what other attention gives
    fp8_te   those of Transformer Engine, one scale per tensor: a peer, to compare with
Parameters keep their names; an 8-bit matrix has its scales beside it as `<name>_scale`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops_linear8, self_attention, te_linears
from .dispatch import required
from .formats import CheckpointError, EnvironmentProblem
from .fp8_weights import is_computed, is_stored, quantised_rows
from .linears import Apart, LinearGelu
from .ops_linear8 import Quantised

N = TypeVar("N", bound=nn.Module)


def _fixed(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


class _Matrix(nn.Module):
    """An 8-bit matrix: weight (out, in) e4m3, weight_scale (out,) fp32; the bias stays what it was."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        codes, scale = quantised_rows(linear.weight)
        self.weight, self.weight_scale, self.bias = _fixed(codes), _fixed(scale), linear.bias

    def settle(self) -> None:
        """Derive what depends on the weights, once they are there."""


class Fp8Linear(Apart, _Matrix):
    """y = x W^T + b from 8-bit rows, in the dtype that they stand for; other rows are quantised first."""

    normed = staticmethod(ops_linear8.residual_adaln)
    attended = staticmethod(self_attention.attended_in_8_bits)  # type: ignore[assignment]

    def forward(self, x: Tensor | Quantised) -> Tensor:
        """x (L, in) -> (L, out)."""
        x = ops_linear8.quantised(x)
        return ops_linear8.linear(x, self.weight, self.weight_scale, self.bias)


def reach(codes: Tensor, scale: Tensor) -> Tensor:
    """The largest norm of a row of a matrix, and 1/16 more: as far as rounding can lengthen the rows it meets."""
    return (codes.float().norm(dim=1) * scale).amax() * (17 / 16)


class Fp8LinearGelu(_Matrix):
    """gelu(x W^T) from 8-bit rows, as 8-bit rows."""

    normed = staticmethod(ops_linear8.residual_adaln)
    reach: Tensor

    def settle(self) -> None:
        self.reach = reach(self.weight, self.weight_scale)

    def forward(self, x: Quantised) -> Quantised:
        return ops_linear8.linear_gelu(x, self.weight, self.weight_scale, self.reach)


class StoredLinear(_Matrix):
    """y = x W^T + b in the dtype of x: 8 bits in memory only."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.weight.float() * self.weight_scale[:, None]).to(x.dtype), self.bias)


def replace(network: nn.Module, make: Callable[[str, nn.Linear], nn.Module | None]) -> None:
    """Put what `make` gives for a layer and its name in the layer's place; None leaves it."""
    # Names, not layers: a list of layers would hold every wide matrix until the last one is replaced.
    for name in [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]:
        layer = network.get_submodule(name)
        if isinstance(layer, nn.Linear) and (new := make(name, layer)) is not None:
            network.set_submodule(name, new)


def settle(network: nn.Module) -> None:
    """Derive what 8-bit layers keep beside their weights; after the weights are there, before the first call."""
    for module in network.modules():
        if isinstance(module, _Matrix):
            module.settle()


def native(name: str, linear: nn.Linear) -> nn.Module | None:
    """The 8-bit layer in a layer's place by the rule of `fp8_weights`, None where the rule leaves it."""
    if is_stored(name):
        return StoredLinear(linear)
    if is_computed(name):
        return Fp8LinearGelu(linear) if isinstance(linear, LinearGelu) else Fp8Linear(linear)
    return None


def loaded(network: N, state: dict[str, Tensor], linear: str = "bf16") -> N:
    """The network, built on the meta device, with these weights and its linear layers as the recipe's `linear` says.

    Weights of 16 bits are quantised one by one; those of an 8-bit checkpoint are taken as they are. `state` is emptied,
    so that the wide weights do not outlive that. Raises CheckpointError where the checkpoint's bits do not fit,
    EnvironmentProblem where this machine cannot multiply so.
    """
    has_codes = any(name.endswith(".weight_scale") for name in state)
    if has_codes and linear != "fp8":
        raise CheckpointError(
            f"checkpoint: its matrices are stored in 8 bits, for linear layers in fp8, got {linear!r}. "
            "Choose --recipe fp8, or the checkpoint it was converted from."
        )
    device = next(iter(state.values())).device
    if linear == "fp8":
        prove(device)
    if has_codes:
        replace(network, native)
    network.load_state_dict(state, strict=True, assign=True)
    state.clear()
    if linear == "fp8" and not has_codes:
        replace(network, native)
    if linear == "fp8_te":
        replace(network, te_linears.layers(device))
    settle(network)
    return network.eval().requires_grad_(False)


WORST = 0.01
"""Largest relative error of the proof. bf16 rounding gives 0.002, one code off in every product 0.04, noise 1."""


def prove(device: torch.device) -> None:
    """A small MLP through the implementations that will run, against fp64: what returns noise here is refused.

    Raises EnvironmentProblem, also where a GPU has no 8-bit product and the reference would take its place.
    """
    needs, e4m3 = "a GPU of compute capability 8.9 or later", torch.float8_e4m3fn
    chosen = {
        op: required(op, device, e4m3, needs, "Use the recipe exact.")
        for op in ("linear_fp8", "linear_gelu_fp8")
    }
    generator = torch.Generator().manual_seed(0)
    x, w1, w2 = (
        torch.randn(n, d, generator=generator).to(device) for n, d in ((200, 256), (512, 256), (128, 512))
    )
    h = ops_linear8.quantised(x.bfloat16())
    (w1_codes, w1_scale), (w2_codes, w2_scale) = quantised_rows(w1 / 16), quantised_rows(w2 / 22)
    hidden = ops_linear8.linear_gelu(h, w1_codes, w1_scale, reach(w1_codes, w1_scale))
    found = ops_linear8.linear(hidden, w2_codes, w2_scale)

    def wide(codes: Tensor, steps: Tensor) -> Tensor:
        return codes.double() * steps.double()[:, None]

    exact_hidden = F.gelu(wide(h.codes, h.steps) @ wide(w1_codes, w1_scale).T)
    # The hidden row is rounded to 8 bits, which is no error; the product of what it was rounded to must be right.
    errors = {
        "linear_fp8": (found.double(), wide(hidden.codes, hidden.steps) @ wide(w2_codes, w2_scale).T, WORST),
        "linear_gelu_fp8": (wide(hidden.codes, hidden.steps), exact_hidden, WORST + 0.03),
    }
    for op, (mine, exact, worst) in errors.items():
        error = float((mine - exact).norm() / exact.norm())
        if not error <= worst:
            raise EnvironmentProblem(
                f"{op}: {chosen[op]} must agree with fp64 within {worst} on this machine, got {error:.3g}. "
                f"Set COSMOS_FAST_OPS={op}=<another implementation>, or use the recipe exact."
            )
