"""The denoiser: (noisy latent, step) -> velocity, with everything constant over the steps prepared first.

Letters: C latent channels, T H W latent frames, rows, columns; L tokens = T * H/2 * W/2; D width; N heads
of K; S text tokens, E text width; R modulation rows per step (1, or T with per-frame times); J control
branches. One clip at a time: no batch dimension inside.

`prepare` turns prompt, controls, conditioning mask and schedule into a Context; `Pair` evaluates the
conditional and unconditional velocity of one latent and computes what they share once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .config import NetworkConfig
from .context import FREQUENCIES, Context, Controls, Modulation, Prompt, Stem, Tables, rope
from .formats import PATCH, Rows
from .linears import LinearGelu, linear
from .ops import Pending
from .parallel import ALONE, Group, Shard
from .self_attention import SelfAttention, exact


@dataclass(frozen=True)
class TextKeys:
    """Keys and values (S, N, K) of one block's cross-attention.

    With no reference image all image tokens are equal, so the softmax over them is uniform and image attention is their
    value. Weights of the text sum to 1, so that value is part of v.
    """

    k: Tensor
    v: Tensor

    def attend(self, cross: CrossAttention, h: Tensor) -> Tensor:
        return ops.attention(cross.q.heads(h, cross.q_gain), self.k, self.v).flatten(1)


@dataclass(frozen=True)
class TextImageKeys(TextKeys):
    """Text keys plus those of a reference image, attended by queries of their own and added."""

    image_k: Tensor
    image_v: Tensor

    def attend(self, cross: CrossAttention, h: Tensor) -> Tensor:
        q = cross.image_q.heads(h, cross.image_q_gain)
        image = ops.attention(q, self.image_k, self.image_v).flatten(1)
        return super().attend(cross, h) + image


def gain(width: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(width))


class CrossAttention(nn.Module):
    """Attention from tokens to the prompt, and to a reference image where the network has one."""

    def __init__(self, c: NetworkConfig) -> None:
        super().__init__()
        self.q, self.out = linear(c.width, c.width), linear(c.width, c.width)
        self.kv = linear(c.text_dim, 2 * c.width)
        self.q_gain, self.k_gain = gain(c.head_width), gain(c.head_width)
        if c.image_width is not None:
            self.image_q, self.image_kv = linear(c.width, c.width), linear(c.width, 2 * c.width)
            self.image_q_gain, self.image_k_gain = gain(c.head_width), gain(c.head_width)

    def forward(self, h: Tensor, keys: TextKeys) -> Tensor:
        """h (L, D) -> attended values (L, D), which `out` adds to the residual stream."""
        return keys.attend(self, h)

    def read(self, text_SE: Tensor, image: Tensor | None) -> TextKeys:
        """Keys of projected text (S, text_dim) and projected image tokens (256, D), or (1, D) if all equal."""
        k, v = _keys(self.kv(text_SE), self.k_gain)
        if image is None:
            return TextKeys(k, v)
        if image.shape[0] == 1:
            constant = self.image_kv(image).chunk(2, dim=1)[1]
            return TextKeys(k, v + constant.unflatten(-1, v.shape[1:]))
        image_k, image_v = _keys(self.image_kv(image), self.image_k_gain)
        return TextImageKeys(k, v, image_k, image_v)


def _keys(kv: Tensor, k_gain: Tensor) -> tuple[Tensor, Tensor]:
    k, v = kv.chunk(2, dim=-1)
    return ops.head_norm(k.contiguous(), k_gain), v.unflatten(-1, (-1, k_gain.shape[0]))


class AdaLN(nn.Module):
    """Low-rank modulation of the three sub-layers of a block: up @ down @ silu(e) + a, in fp32."""

    def __init__(self, c: NetworkConfig) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(3, c.adaln_rank, c.width))
        self.up = nn.Parameter(torch.empty(3, 3 * c.width, c.adaln_rank))

    def forward(self, e: Tensor, a: Tensor) -> Modulation:
        """e silu'd embedding (steps, R, D) fp32, a (steps, R, 3D) fp32 -> table (steps, 9, R, D) in weight dtype."""
        low = torch.einsum("prd,std->pstr", self.down.float(), e)
        full = torch.einsum("por,pstr->spto", self.up.float(), low) + a[:, None]
        steps, _, R, _ = full.shape
        table = full.unflatten(-1, (3, -1)).permute(0, 1, 3, 2, 4).reshape(steps, 9, R, -1)
        return Modulation(table.to(self.up.dtype))


class Block(nn.Module):
    """Self-attention, cross-attention, MLP, each modulated and gated. Base and control blocks alike.

    The residual stream x (L, D) may be overwritten by every method.
    """

    def __init__(self, c: NetworkConfig, attend: SelfAttention) -> None:
        super().__init__()
        self.attend = attend
        self.qkv, self.attn_out = linear(c.width, 3 * c.width), linear(c.width, c.width)
        self.q_gain, self.k_gain = gain(c.head_width), gain(c.head_width)
        self.cross = CrossAttention(c)
        self.fc1, self.fc2 = LinearGelu(c.width, c.mlp_width, bias=False), linear(c.mlp_width, c.width)
        self.mod = AdaLN(c)

    def forward(
        self, x: Tensor, pending: Pending | None, keys: TextKeys, mod: Modulation, step: int, ctx: Context
    ) -> tuple[Tensor, Pending | None]:
        """x (L, D) and what it is still owed -> the same; the next block settles a debt as it normalises."""
        return self.after_attention(*self.self_attention(x, pending, mod, step, ctx), keys, mod, step, ctx)

    def self_attention(
        self, x: Tensor, pending: Pending | None, mod: Modulation, step: int, ctx: Context
    ) -> tuple[Tensor, Pending | None]:
        shift, scale, gate = mod.at(step, 0)
        x, h = self.qkv.normed(x, pending, shift, scale, ctx.rows)
        given = self.qkv(h), self.q_gain, self.k_gain, ctx.cos, ctx.sin, step
        attended = self.attn_out.attended(self.attend, *given)
        return self.attn_out.onto(x, attended, gate)

    def opening(self, x: Tensor, mod: Modulation, step: int, ctx: Context) -> Tensor:
        """x (L, D) after self-attention, its debt settled: one tensor, not two, to keep for the other prompt."""
        return ops.residual(*self.self_attention(x, None, mod, step, ctx), ctx.rows)

    def after_attention(
        self, x: Tensor, pending: Pending | None, keys: TextKeys, mod: Modulation, step: int, ctx: Context,
        *, keep: bool = False,
    ) -> tuple[Tensor, Pending | None]:  # fmt: skip
        """keep: leave what the MLP adds a debt, for control hints are to join it."""
        shift, scale, gate = mod.at(step, 1)
        x, h = self.cross.q.normed(x, pending, shift, scale, ctx.rows)
        x, pending = self.cross.out.onto(x, self.cross(h, keys), gate)
        shift, scale, gate = mod.at(step, 2)
        x, h = self.fc1.normed(x, pending, shift, scale, ctx.rows)
        h = self.fc1(h)  # one name: the hidden layer is the largest tensor of a call
        return self.fc2.onto(x, h, gate, keep=keep)


class ControlBranch(nn.Module):
    """One control: patch embedding, a chain of blocks, and a projection of each block's output to a hint."""

    def __init__(self, c: NetworkConfig, attend: SelfAttention) -> None:
        super().__init__()
        self.embed = linear(c.control_in, c.width)
        self.before_proj = linear(c.width, c.width, bias=True)
        self.blocks = nn.ModuleList(Block(c, attend) for _ in c.control_layers)
        self.after_proj = nn.ModuleList(linear(c.width, c.width, bias=True) for _ in c.control_layers)

    def tokens(self, latent_CTHW: Tensor, mask: Tensor) -> Tensor:
        """before_proj of the embedded control (L, D). Only the first modality slot and the masks are ever set."""
        used, masks = PATCH * PATCH * latent_CTHW.shape[0], 2 * PATCH * PATCH
        weight = torch.cat((self.embed.weight[:, :used], self.embed.weight[:, -masks:]), dim=1)
        return self.before_proj(F.linear(ops.patchify(latent_CTHW, mask), weight))


class TimeEmbedding(nn.Module):
    """Sinusoid -> (e, a): its RMS norm, and the shared low-rank stream. All fp32."""

    def __init__(self, c: NetworkConfig) -> None:
        super().__init__()
        self.scale = c.timestep_scale
        self.linear_1, self.linear_2 = linear(c.width, c.width), linear(c.width, 3 * c.width)
        self.gain = gain(c.width)

    def forward(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """times (steps, R), integers or bf16 -> silu(e) (steps, R, D), a (steps, R, 3D)."""
        tau = times * self.scale
        half = self.gain.shape[0] // 2
        frequency = torch.exp(-torch.log(torch.tensor(FREQUENCIES)) * torch.arange(half) / half).to(
            times.device
        )
        angle = tau.float()[..., None] * frequency
        s = torch.cat((angle.cos(), angle.sin()), dim=-1).to(tau.dtype).float()
        a = F.linear(F.silu(F.linear(s, self.linear_1.weight.float())), self.linear_2.weight.float())
        e = s * torch.rsqrt(s.square().mean(-1, keepdim=True) + ops.EPS) * self.gain.float()
        return F.silu(e), a


class Head(nn.Module):
    """Final norm, modulation and projection to latent patches, in fp32."""

    def __init__(self, c: NetworkConfig) -> None:
        super().__init__()
        self.mod_down = nn.Parameter(torch.empty(c.adaln_rank, c.width))
        self.mod_up = nn.Parameter(torch.empty(2 * c.width, c.adaln_rank))
        self.linear = linear(c.width, c.patch_out)

    def modulation(self, e: Tensor, a: Tensor) -> Tensor:
        full = (
            F.linear(F.linear(e, self.mod_down.float()), self.mod_up.float()) + a[..., : self.mod_up.shape[0]]
        )
        return full.unflatten(-1, (2, -1)).transpose(1, 2).contiguous()

    def forward(self, x: Tensor, pending: Pending | None, step: int, ctx: Context) -> Tensor:
        shift, scale = ctx.tables.head[step]
        _, h = ops.residual_adaln(x, pending, shift, scale, ctx.rows, out=torch.float32)
        return ops.unpatchify(ctx.shard.join(F.linear(h, self.linear.weight.float())), *ctx.grid)


class Network(nn.Module):
    """The base stack with its control branches. Build on the meta device, then load with assign=True.

    ranks: who shares the tokens, with an `attend` that exchanges them; every rank takes and returns whole latents.
    """

    def __init__(self, config: NetworkConfig, attend: SelfAttention = exact, ranks: Group = ALONE) -> None:
        super().__init__()
        self.config, self.ranks = config, ranks
        self.x_embed = linear(config.patch_in, config.width)
        self.time = TimeEmbedding(config)
        self.text_proj = linear(config.text_width, config.text_dim, bias=True)
        if config.image_width is not None:
            self.image_proj = linear(config.image_width, config.width, bias=True)
        self.blocks = nn.ModuleList(Block(config, attend) for _ in range(config.blocks))
        self.control = nn.ModuleList(ControlBranch(config, attend) for _ in range(config.branches))
        self.head = Head(config)

    # --- what does not depend on the latent ---

    def read_prompt(self, text_SE: Tensor, image: Tensor | None = None) -> Prompt:
        """Keys and values of every block for one prompt.

        Shapes: text_SE (S, E); image (image_tokens, image_width) features of a reference image, or None for
        none (the published network then sees zero features). Raises ValueError if the network has no image
        context but an image is given.
        """
        text = F.gelu(self.text_proj(text_SE))
        seen = None
        if self.config.image_width is not None:
            features = text.new_zeros(1, self.config.image_width) if image is None else image
            seen = F.gelu(self.image_proj(features))
        elif image is not None:
            raise ValueError(
                "image context: this network has none, got an image. Use a single-control base model."
            )
        return Prompt(
            tuple(block.cross.read(text, seen) for block in self.blocks),
            tuple(tuple(b.cross.read(text, seen) for b in branch.blocks) for branch in self.control),
        )

    def read_controls(
        self,
        latents: Sequence[Tensor | None],
        weights: Sequence[float] | Tensor,
        grid: tuple[int, int, int],
        mask: Tensor,
    ) -> Controls:
        """Control tokens of the branches that matter.

        latents: one (C, T, H, W) per branch, or None for a control that is absent or black; the multi-control
        network leaves such a branch out, the single-control network sees a zero latent. weights: one float per
        branch, or maps (branches, T, H/2, W/2). grid: (T, H, W). mask (T,): 1 on conditioning frames.
        """
        multi = self.config.branches > 1
        if len(latents) != self.config.branches or len(weights) != self.config.branches:
            raise ValueError(
                f"controls: the network has {self.config.branches} branches, got {len(latents)} latents "
                f"and {len(weights)} weights."
            )
        if isinstance(weights, Tensor):
            table = weights.flatten(1).float()
            active = [j for j, z in enumerate(latents) if z is not None or not multi]
        else:
            table = torch.tensor(weights, dtype=torch.float32)[:, None]
            table = table if multi else table.bfloat16().float()
            active = [j for j, z in enumerate(latents) if table[j].any() and (z is not None or not multi)]
        if not active:
            return Controls((), (), None)
        dtype, device = self.x_embed.weight.dtype, self.x_embed.weight.device
        zero = torch.zeros(self.config.latent_channels, *grid, dtype=dtype, device=device)
        chosen = [zero if (z := latents[j]) is None else z.to(device, dtype) for j in active]
        tokens = tuple(self.control[j].tokens(z, mask) for j, z in zip(active, chosen, strict=True))
        return Controls(tuple(active), tokens, table[active].to(device))

    def tabulate(self, times: Tensor) -> Tables:
        """Modulation of every block for the whole schedule. times (steps, R): integers, or bf16 per frame."""
        e, a = self.time(times.to(self.x_embed.weight.device))
        return Tables(
            tuple(block.mod(e, a) for block in self.blocks),
            tuple(tuple(block.mod(e, a) for block in branch.blocks) for branch in self.control),
            self.head.modulation(e, a),
        )

    def prepare(
        self,
        prompts: Sequence[Prompt],
        controls: Controls,
        tables: Tables,
        grid: tuple[int, int, int],
        mask: Tensor,
        *,
        rounded_rope: bool = True,
    ) -> list[Context]:
        """One Context per prompt for a chunk of latent size grid = (T, H, W); all else is shared.

        rounded_rope=False gives exact rotary exponents, which no published weights were trained with.
        """
        T, H, W = grid
        cos, sin = rope(self.config, grid, self.x_embed.weight.device, rounded=rounded_rope)
        R = tables.head.shape[2]
        tokens = T * (H // PATCH) * (W // PATCH)
        if R not in (1, T):
            raise ValueError(f"prepare: times per step must be 1 or {T}, got {R}.")
        shard = Shard(self.ranks, tokens)
        rows, held = Rows(tokens // R, shard.start), controls.of(shard)
        return [Context(p, held, tables, cos, sin, mask, rows, grid, shard) for p in prompts]

    # --- what does ---

    def stem(self, z_CTHW: Tensor, step: int, ctx: Context) -> Stem:
        """Embed, and run block 0 of the base and of each active control up to the end of self-attention."""
        x = self.x_embed(ctx.shard.split(ops.patchify(z_CTHW, ctx.mask)))
        control = tuple(
            self.control[j].blocks[0].opening(tokens + x, ctx.tables.control[j][0], step, ctx)
            for j, tokens in zip(ctx.controls.branches, ctx.controls.tokens, strict=True)
        )
        return Stem(self.blocks[0].opening(x, ctx.tables.blocks[0], step, ctx), control)

    def body(self, stem: Stem, step: int, ctx: Context) -> Tensor:
        """From the end of block 0's self-attention to the velocity (C, T, H, W) fp32."""
        # Blocks overwrite the residual stream, and the stem serves another prompt.
        x, pending, chains = stem.base.clone(), None, [x.clone() for x in stem.control]
        for i, block in enumerate(self.blocks):
            keys, mod = ctx.prompt.blocks[i], ctx.tables.blocks[i]
            if i > 0:
                x, pending = block.self_attention(x, pending, mod, step, ctx)
            hinted = i in self.config.control_layers and bool(ctx.controls.branches)
            x, pending = block.after_attention(x, pending, keys, mod, step, ctx, keep=hinted)
            if hinted:
                assert pending is not None
                hints = self._hints(self.config.control_layers.index(i), chains, step, ctx)
                pending = replace(pending, hints=hints, hint_weights=ctx.controls.weights)
        return self.head(x, pending, step, ctx)

    def _hints(self, n: int, chains: list[Tensor], step: int, ctx: Context) -> tuple[Tensor, ...]:
        """Advance every control chain by its block n (just before its hint is due); return the hints."""
        hints = []
        for slot, j in enumerate(ctx.controls.branches):
            branch, mod, keys = self.control[j], ctx.tables.control[j][n], ctx.prompt.control[j][n]
            x, pending = chains[slot], None
            if n > 0:
                x, pending = branch.blocks[n].self_attention(x, None, mod, step, ctx)
            x, pending = branch.blocks[n].after_attention(x, pending, keys, mod, step, ctx)
            chains[slot] = x = ops.residual(x, pending, ctx.rows)
            del pending
            hints.append(branch.after_proj[n](x))
        return tuple(hints)

    def forward(self, z_CTHW: Tensor, step: int, ctx: Context) -> Tensor:
        """Velocity (C, T, H, W) fp32 of the network input z (weight dtype) at a step of the schedule."""
        return self.body(self.stem(z_CTHW, step, ctx), step, ctx)


@dataclass(frozen=True)
class Pair:
    """Velocities of one latent under two prompts: block 0's self-attention is computed once for both.

    Without guidance there is no second prompt, and no second velocity.
    """

    network: Network
    cond: Context
    uncond: Context | None = None

    def __call__(self, z_BCTHW: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        stem = self.network.stem(z_BCTHW[0], step, self.cond)
        v_cond = self.network.body(stem, step, self.cond)[None]
        return v_cond, None if self.uncond is None else self.network.body(stem, step, self.uncond)[None]


@dataclass(frozen=True)
class Single:
    """Velocity of one latent under one prompt."""

    network: Network
    ctx: Context

    def __call__(self, z_BCTHW: Tensor, step: int) -> Tensor:
        return self.network(z_BCTHW[0], step, self.ctx)[None]
