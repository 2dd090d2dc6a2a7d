"""The optimiser of every stage: orthogonalised momentum for matrices, Adam for everything else.

An orthogonalised step moves all directions of a matrix alike, which in a run of a few thousand steps is worth
about twice the steps of Adam. Matrices of one shape are handled as one batch: a step costs tens of launches,
not thousands.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
# A quintic whose fixed points lie around 1: five rounds bring every singular value into 0.7..1.2.
QUINTIC = (3.4445, -4.7750, 2.0315)
ROUNDS = 5
# Makes the root mean square of a step that of Adam, so one learning rate serves both.
MATCH = 0.2

# Packed tensors hold several matrices; each is orthogonalised by itself.
PACKED = {"qkv.weight": 3, "kv.weight": 2, "image_kv.weight": 2, "to_qkv.weight": 3}
# First and last layers and tables: their rows are features of their own, not directions of one map.
PLAIN = ("embed.weight", "position", "x_embed.weight", "head.linear.weight", "encoder.conv1.weight")


def orthogonalised(g: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrices of a batch (n, rows, columns), approximately; bf16 on CUDA."""
    x = g.bfloat16() if g.is_cuda else g.float()
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = QUINTIC
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if is_tall else x).float()


def matrices(name: str, weight: Tensor) -> tuple[int, int, int] | None:
    """(n, rows, columns) of a weight that is n matrices, or None for what Adam takes."""
    if weight.ndim < 2 or name.endswith(PLAIN) or min(weight.shape[0], weight[0].numel()) < 2:
        return None
    if name.endswith(("mod.down", "mod.up")):
        return (weight.shape[0], weight.shape[1], weight.shape[2])
    parts = next((n for end, n in PACKED.items() if name.endswith("." + end)), 1)
    return parts, weight.shape[0] // parts, weight[0].numel()


class Optimiser:
    """Steps the given parameters from their gradients. `lr` is for matrices, `lr_plain` for the rest."""

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], lr: float, lr_plain: float, decay: float = 0.0
    ) -> None:
        self.lr, self.lr_plain, self.decay = lr, lr_plain, decay
        self.groups: dict[tuple[int, int], list[tuple[int, nn.Parameter]]] = {}
        plain: list[nn.Parameter] = []
        for name, weight in named:
            shape = matrices(name, weight)
            if shape is None:
                plain.append(weight)
            else:
                self.groups.setdefault(shape[1:], []).append((shape[0], weight))
        self.momentum = {
            shape: torch.zeros(sum(n for n, _ in group), *shape, device=group[0][1].device)
            for shape, group in self.groups.items()
        }
        self.adam = torch.optim.Adam(plain, lr=lr_plain, betas=(0.9, 0.99), eps=1e-10)
        self.plain = plain

    @property
    def weights(self) -> list[nn.Parameter]:
        return [*self.plain, *(weight for group in self.groups.values() for _, weight in group)]

    @torch.no_grad()
    def step(self, factor: float, clip: float = 1.0) -> Tensor:
        """One step at `factor` times the learning rates; returns the norm of the gradients before clipping."""
        grads = [weight.grad for weight in self.weights if weight.grad is not None]
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        # A gradient that is not finite makes a step of zeros instead of a broken model.
        scale = torch.where(torch.isfinite(norm), (clip / norm.clamp_min(1e-12)).clamp_max(1.0), 0.0)
        torch._foreach_mul_(grads, scale)
        for grad in grads:
            grad.nan_to_num_(0.0, 0.0, 0.0)
        for shape, group in self.groups.items():
            grad = torch.cat([_matrices_of(weight, n, shape) for n, weight in group])
            momentum = self.momentum[shape].lerp_(grad, 1 - MOMENTUM)
            update = orthogonalised(grad.lerp(momentum, MOMENTUM)) * (
                MATCH * max(shape) ** 0.5 * self.lr * factor
            )
            parts = update.split([n for n, _ in group])
            for (_, weight), part in zip(group, parts, strict=True):
                if self.decay:
                    weight.mul_(1 - self.lr * factor * self.decay)
                weight.sub_(part.reshape(weight.shape))
        for group in self.adam.param_groups:
            group["lr"] = self.lr_plain * factor
        self.adam.step()
        for weight in self.weights:
            weight.grad = None
        return norm

    def state(self) -> dict[str, Any]:
        return {"momentum": list(self.momentum.values()), "adam": self.adam.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        for mine, theirs in zip(self.momentum.values(), state["momentum"], strict=True):
            mine.copy_(theirs)
        self.adam.load_state_dict(state["adam"])


def _matrices_of(weight: nn.Parameter, n: int, shape: tuple[int, int]) -> Tensor:
    """The gradient as matrices; zeros for a weight that took no part in this step."""
    if weight.grad is None:
        return torch.zeros(n, *shape, device=weight.device)
    return weight.grad.float().reshape(n, *shape)
