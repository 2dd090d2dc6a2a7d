"""The denoiser for training: the same function as `cosmos_fast.network.Network`, for a batch, with gradients.

The production forward handles one clip, prepares everything that is constant over the steps first and runs on
kernels without gradients. This one computes everything in one go from the same parameters.

Letters as in `cosmos_fast.network`; B is the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_fast.config import NetworkConfig
from cosmos_fast.context import FREQUENCIES, rope
from cosmos_fast.network import Block, ControlBranch, Network
from cosmos_fast.ops import EPS

BlockStep = Callable[..., Tensor]


def mapped(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear map in the dtype of x; the stored weight keeps its own."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """ln(x) * (1 + scale) + shift; x (B, R, L/R, D), shift and scale (B, R, 1, D)."""
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=EPS)
    return (normed * (1 + scale.float()) + shift.float()).to(x.dtype)


def _heads(x: Tensor, gain: Tensor) -> Tensor:
    """RMS norm of each head: (B, L, N*K) -> (B, N, L, K)."""
    x = x.unflatten(-1, (-1, gain.shape[0]))
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * gain.float()
    return normed.to(x.dtype).transpose(1, 2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)


def _attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, N, L, K), (B, N, S, K) twice -> (B, L, N*K)."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def block_weights(block: Block) -> dict[str, Tensor]:
    """The parameters of a block by name: one compiled function then serves every block."""
    return dict(block.named_parameters())


def block_step(
    x: Tensor, e: Tensor, a: Tensor, text: Tensor, image: Tensor | None, cos: Tensor, sin: Tensor,
    p: dict[str, Tensor],
) -> Tensor:  # fmt: skip
    """One block: x (B, L, D), silu(e) (B, R, D), a (B, R, 3D), projected text (B, S, E), image (B, I, D)."""
    low = torch.einsum("prd,btd->pbtr", p["mod.down"].float(), e)
    table = torch.einsum("por,pbtr->pbto", p["mod.up"].float(), low) + a
    # Rounded as the tables of the production network are.
    mods = [part.to(x.dtype).unsqueeze(-2).chunk(3, dim=-1) for part in table]
    R = e.shape[1]

    def rows(x: Tensor) -> Tensor:
        return x.unflatten(1, (R, -1))

    def added(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
        return (rows(x).float() + gate.float() * rows(branch).float()).flatten(1, 2).to(x.dtype)

    shift, scale, gate = mods[0]
    h = modulated(rows(x), shift, scale).flatten(1, 2)
    q, k, v = mapped(h, p["qkv.weight"]).chunk(3, dim=-1)
    q, k = (_rotated(_heads(part, p[gain]), cos, sin) for part, gain in ((q, "q_gain"), (k, "k_gain")))
    v = v.unflatten(-1, (-1, p["q_gain"].shape[0])).transpose(1, 2)
    x = added(x, gate, mapped(_attended(q, k, v), p["attn_out.weight"]))

    shift, scale, gate = mods[1]
    h = modulated(rows(x), shift, scale).flatten(1, 2)
    seen = _cross(h, text, p, "cross.", "cross.q")
    if image is not None:
        seen = seen + _cross(h, image, p, "cross.image_", "cross.image_q")
    x = added(x, gate, mapped(seen, p["cross.out.weight"]))

    shift, scale, gate = mods[2]
    h = modulated(rows(x), shift, scale).flatten(1, 2)
    h = F.gelu(mapped(h, p["fc1.weight"]).float()).to(x.dtype)
    return added(x, gate, mapped(h, p["fc2.weight"]))


def _cross(h: Tensor, context: Tensor, p: dict[str, Tensor], prefix: str, query: str) -> Tensor:
    k, v = mapped(context, p[f"{prefix}kv.weight"]).chunk(2, dim=-1)
    v = v.unflatten(-1, (-1, p[f"{prefix}k_gain"].shape[0])).transpose(1, 2)
    q = _heads(mapped(h, p[f"{query}.weight"]), p[f"{prefix}q_gain"])
    return _attended(q, _heads(k, p[f"{prefix}k_gain"]), v)


def patches(z: Tensor, mask: Tensor) -> Tensor:
    """z (B, C, T, H, W), mask (B, T) -> (B, L, 4 * (C + 2))."""
    B, C, T, H, W = z.shape
    flags = mask.to(z.dtype)[:, None, :, None, None].expand(B, 1, T, H, W)
    full = torch.cat((z, flags, torch.zeros_like(flags)), dim=1)
    full = full.reshape(B, C + 2, T, H // 2, 2, W // 2, 2).permute(0, 2, 3, 5, 1, 4, 6)
    return full.reshape(B, T * (H // 2) * (W // 2), 4 * (C + 2))


def latents(y: Tensor, T: int, H: int, W: int) -> Tensor:
    """Head output (B, L, 4C) -> (B, C, T, H, W)."""
    y = y.reshape(y.shape[0], T, H // 2, W // 2, 2, 2, -1)
    return y.permute(0, 6, 1, 2, 4, 3, 5).reshape(y.shape[0], -1, T, H, W)


@dataclass(frozen=True)
class Hint:
    """One control branch on some samples of the batch.

    branch: the module. rows: the samples it acts on. latent: (len(rows), C, T, H, W). weight: (len(rows),).
    """

    branch: ControlBranch
    rows: slice
    latent: Tensor
    weight: Tensor


class Forward:
    """velocity(...) of one network. Holds rotary and time tables, and the compiled block."""

    def __init__(self, network: Network, is_compiled: bool = False) -> None:
        self.network, self.config = network, network.config
        self.block: BlockStep = block_step
        if is_compiled:
            self.block = torch.compile(block_step, dynamic=False)
        self.positions: dict[Any, tuple[Tensor, Tensor]] = {}
        half = self.config.width // 2
        device = network.x_embed.weight.device
        self.frequency = torch.exp(-math.log(FREQUENCIES) * torch.arange(half) / half).to(device)

    def embed_time(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """times (B, R), integers or bf16 -> silu(e) (B, R, D), a (B, R, 3D), fp32."""
        time = self.network.time
        tau = times * time.scale
        angle = tau.float()[..., None] * self.frequency
        s = torch.cat((angle.cos(), angle.sin()), dim=-1).to(tau.dtype).float()
        a = F.linear(F.silu(F.linear(s, time.linear_1.weight)), time.linear_2.weight)
        e = s * torch.rsqrt(s.square().mean(-1, keepdim=True) + EPS) * time.gain
        return F.silu(e), a

    def rope(self, grid: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        if grid not in self.positions:
            self.positions[grid] = rope(self.config, grid, device, rounded=True)
        return self.positions[grid]

    def __call__(
        self,
        z: Tensor,
        times: Tensor,
        text: Tensor,
        mask: Tensor,
        image: Tensor | None = None,
        hints: Sequence[Hint] = (),
        is_rare: bool = False,
    ) -> Tensor:
        """Velocity (B, C, T, H, W) fp32. `is_rare`: a shape not worth its own compilation.

        z (B, C, T, H, W) in the compute dtype, known frames in place; times (B, R): integers 0..999, or bf16
        for the distilled network; text (B, S, E) embeddings; mask (B, T), 1 on known frames; image (B, I, E')
        features.
        """
        net, grid = self.network, (z.shape[2], z.shape[3], z.shape[4])
        step = block_step if is_rare else self.block
        e, a = self.embed_time(times)
        cos, sin = self.rope(grid, z.device)
        text = F.gelu(mapped(text.to(z.dtype), net.text_proj.weight, net.text_proj.bias))
        if image is not None:
            image = F.gelu(mapped(image.to(z.dtype), net.image_proj.weight, net.image_proj.bias))
        x = mapped(patches(z, mask), net.x_embed.weight)

        due: dict[int, list[tuple[slice, Tensor]]] = {i: [] for i in self.config.control_layers}
        for hint in hints:
            at, branch = hint.rows, hint.branch
            own = (e[at], a[at], text[at], None if image is None else image[at], cos, sin)
            c = self.control_tokens(branch, hint.latent.to(z.dtype), mask[at]) + x[at]
            for n, i in enumerate(self.config.control_layers):
                c = step(c, *own, block_weights(branch.blocks[n]))
                out = mapped(c, branch.after_proj[n].weight, branch.after_proj[n].bias)
                due[i].append((at, hint.weight[:, None, None] * out.float()))
        for i, block in enumerate(net.blocks):
            # Before the first hint a frozen base needs no gradient: one block, not worth a graph of its own.
            is_odd = torch.is_grad_enabled() and not x.requires_grad
            now = block_step if is_odd else step
            x = now(x, e, a, text, image, cos, sin, block_weights(block))
            if due.get(i):
                x = (x.float() + self._summed(due[i], len(x))).to(x.dtype)

        full = F.linear(F.linear(e, net.head.mod_down), net.head.mod_up)
        shift, scale = (full + a[..., : full.shape[-1]]).unsqueeze(-2).chunk(2, dim=-1)
        h = modulated(x.float().unflatten(1, (e.shape[1], -1)), shift, scale).flatten(1, 2)
        return latents(F.linear(h, net.head.linear.weight), *grid)

    @staticmethod
    def _summed(parts: list[tuple[slice, Tensor]], batch: int) -> Tensor:
        """Hints of all branches as one (B, L, D) tensor; slices of parts tile the batch once or repeatedly."""
        stacks: dict[tuple[int, int], Tensor] = {}
        for at, out in parts:
            key = (at.start, at.stop)
            stacks[key] = stacks[key] + out if key in stacks else out
        keys = sorted(stacks)
        assert keys[0][0] == 0 and keys[-1][1] == batch, "hints cover the batch"
        assert all(one[1] == two[0] for one, two in zip(keys, keys[1:])), "hints tile the batch"
        return torch.cat([stacks[key] for key in keys])

    def control_tokens(self, branch: ControlBranch, latent: Tensor, mask: Tensor) -> Tensor:
        """before_proj of the embedded control; only the first modality slot and the masks are ever set."""
        used = 4 * latent.shape[1]
        weight = torch.cat((branch.embed.weight[:, :used], branch.embed.weight[:, -8:]), dim=1)
        h = mapped(patches(latent, mask), weight)
        return mapped(h, branch.before_proj.weight, branch.before_proj.bias)


# ------------------------------------------------------------------------------------- fresh weights


@torch.no_grad()
def initialise(network: Network, generator: torch.Generator) -> Network:
    """Weights of order 1/sqrt(inputs); every block begins as the identity, the head as zero.

    The image projection has no bias: then no style image adds exactly nothing, and networks without image
    context are the same function.
    """
    for name, weight in network.named_parameters():
        if weight.ndim == 1:
            weight.fill_(1.0 if name.endswith("gain") else 0.0)
        elif name.endswith(("mod.up", "mod_up", "linear_2.weight", "head.linear.weight")):
            weight.zero_()
        else:
            weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)
    return network


def make_network(config: NetworkConfig, device: str) -> Network:
    """A network with uninitialised weights on a device."""
    with torch.device("meta"):
        network = Network(config)
    return network.to_empty(device=device)


@torch.no_grad()
def branch_from_base(branch: ControlBranch, network: Network) -> ControlBranch:
    """A control branch that starts as a copy of the base blocks and adds nothing yet.

    The embedding reads the control latent as the base reads its latent: both come from one VAE.
    """
    for n, block in enumerate(branch.blocks):
        block.load_state_dict(network.blocks[n].state_dict())
        branch.after_proj[n].weight.zero_()
        branch.after_proj[n].bias.zero_()
    used = 4 * network.config.latent_channels
    branch.embed.weight.zero_()
    branch.embed.weight[:, :used].copy_(network.x_embed.weight[:, :used])
    nn.init.eye_(branch.before_proj.weight)
    branch.before_proj.bias.zero_()
    return branch
