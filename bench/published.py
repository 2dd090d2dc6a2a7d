"""Random weights of the published sizes, made on the device, and our network and its inputs from them.

Letters as in `cosmos_fast.network`. Weights are scaled so that every path matters and the output stays of order one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cosmos_fast import sampler
from cosmos_fast.config import NetworkConfig, published_shapes
from cosmos_fast.network import Network, Pair, Single
from cosmos_fast.network_keys import to_ours, to_published

MODULATION_SCALE = 0.5
"""Keeps the share of every sub-layer in the residual stream moderate at any depth."""


def random_state(
    config: NetworkConfig,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Tensor]:
    """Published name (after `net.`) -> random weight."""
    generator = torch.Generator(device=device).manual_seed(seed)
    state = {}
    for name, shape in published_shapes(config).items():
        noise = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        if "_norm." in name:
            state[name] = noise.mul_(0.1).add_(1)
        elif name.endswith("bias"):
            state[name] = noise.mul_(0.1)
        else:
            state[name] = noise.mul_(shape[-1] ** -0.5 * (MODULATION_SCALE if "adaln" in name else 1))
    return state


def build(
    config: NetworkConfig, state: dict[str, Tensor], device: torch.device | str, dtype: torch.dtype
) -> Network:
    """Our network with copies of the weights of `state`."""
    with torch.device("meta"):
        network = Network(config)
    network.load_state_dict(to_ours(state, config, dtype, device), strict=True, assign=True)
    return network.eval().requires_grad_(False)


def published(network: Network) -> dict[str, Tensor]:
    """Published name -> view of our network's weight: a peer built from these shares our memory."""
    return to_published(network.state_dict(), network.config)


@dataclass(frozen=True)
class Inputs:
    """One chunk: latent and control (C, T, H, W), texts (S, E) of both prompts, times (steps, 1), mask (T,)."""

    z: Tensor
    control: Tensor
    text: Tensor
    negative: Tensor
    times: Tensor
    mask: Tensor

    @property
    def grid(self) -> tuple[int, int, int]:
        T, H, W = self.z.shape[1:]
        return T, H, W

    def to(self, dtype: torch.dtype) -> Inputs:
        z, control, text, negative, mask = (
            t.to(dtype) for t in (self.z, self.control, self.text, self.negative, self.mask)
        )
        return Inputs(z, control, text, negative, self.times, mask)


def inputs(
    config: NetworkConfig, grid: tuple[int, int, int], device: torch.device | str, dtype: torch.dtype,
    *, seed: int = 1, steps: int = 35,
) -> Inputs:  # fmt: skip
    """Normal random inputs without known frames, and the times of the base schedule."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    z, control = (draw(config.latent_channels, *grid) for _ in range(2))
    text, negative = (draw(config.text_tokens, config.text_width) for _ in range(2))
    times = sampler.base_times(sampler.base_schedule(steps))
    return Inputs(z, control, text, negative, times, torch.zeros(grid[0], device=device, dtype=dtype))


def bind(network: Network, given: Inputs, *, rounded_rope: bool = True) -> tuple[Single, Pair]:
    """Our denoiser of one prompt and of both, everything that is constant over the steps prepared."""
    prompts = [network.read_prompt(given.text), network.read_prompt(given.negative)]
    controls = network.read_controls([given.control], [1.0], given.grid, given.mask)
    contexts = network.prepare(
        prompts, controls, network.tabulate(given.times), given.grid, given.mask, rounded_rope=rounded_rope
    )
    return Single(network, contexts[0]), Pair(network, *contexts)


def relative_l2(got: Tensor, exact: Tensor) -> float:
    """||got - exact|| / ||exact||, in fp64. NaN stays NaN."""
    got, exact = got.double(), exact.double()
    return float((got - exact).norm() / exact.norm())


def gib(num_bytes: float) -> float:
    return num_bytes / 2**30


def weight_bytes(*modules: torch.nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(math.prod(p.shape) * p.element_size() for m in modules for p in m.parameters())
