"""The network of Video Depth Anything, under the names of its published state dict.

A DINOv2 vision transformer sees each frame alone; a DPT head merges four of its levels and, in four places, lets
every pixel attend to itself over the frames of one window. Sizes are read from the weights, so that the small
(vits) and the large (vitl) model load alike.

Shape letters: F frames of one window, H W pixels (multiples of 14), h w rows and columns of a feature map,
C channels, L tokens of one frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate, scaled_dot_product_attention

from .formats import CheckpointError

PATCH = 14
WINDOW = 32
"""Frames the temporal layers have position codes for."""

_TEMPORAL_HEADS = 8
_GROUPS = 32
_HEAD_WIDTH = 64
_LAST_WIDTH = 32
_AT_ONCE = 4
"""Frames the full-size layers of the head take at a time: all 32 would need 8 times the memory."""


@dataclass(frozen=True)
class DepthConfig:
    """Sizes of one model; the defaults are those of vits. grid: rows of the trained position table."""

    width: int = 384
    blocks: int = 12
    features: int = 64
    levels: tuple[int, int, int, int] = (48, 96, 192, 384)
    grid: int = 37

    @property
    def taps(self) -> tuple[int, ...]:
        """Blocks whose output the head reads."""
        if self.blocks == 24:  # vitl was trained with its first tap one block early
            return (4, 11, 17, 23)
        return tuple(self.blocks * k // 4 - 1 for k in (1, 2, 3, 4))

    @staticmethod
    def of(shapes: Mapping[str, tuple[int, ...]]) -> DepthConfig:
        """Sizes from the shapes of a state dict; CheckpointError if it is of another model."""
        try:
            positions, width = shapes["pretrained.pos_embed"][1:]
            config = DepthConfig(
                width=width,
                blocks=sum(
                    name.startswith("pretrained.blocks.") and name.endswith(".norm1.weight")
                    for name in shapes
                ),
                features=shapes["head.scratch.layer1_rn.weight"][0],
                levels=tuple(shapes[f"head.projects.{k}.weight"][0] for k in range(4)),  # type: ignore[arg-type]
                grid=round((positions - 1) ** 0.5),
            )
            _ = shapes["head.motion_modules.0.temporal_transformer.norm.weight"]
        except (KeyError, IndexError, ValueError):
            raise CheckpointError(
                f"depth: must be the weights of Video Depth Anything, got {len(shapes)} tensors of another model."
            ) from None
        if config.width % _HEAD_WIDTH or config.blocks % 4 or not config.blocks:
            raise CheckpointError(
                f"depth: width must be a multiple of {_HEAD_WIDTH} and blocks of 4, "
                f"got {config.width} and {config.blocks}."
            )
        return config


# ------------------------------------------------------------------------------------ each frame alone


class _Patches(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, PATCH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_FLC: Tensor) -> Tensor:
        q, k, v = self.qkv(x_FLC).unflatten(-1, (3, -1, _HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
        return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(width, eps=1e-6), _Attention(width), _Scale(width)
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(width, eps=1e-6), _MLP(width), _Scale(width)

    def forward(self, x_FLC: Tensor) -> Tensor:
        x_FLC = x_FLC + self.ls1(self.attn(self.norm1(x_FLC)))
        return x_FLC + self.ls2(self.mlp(self.norm2(x_FLC)))


class Backbone(nn.Module):
    """DINOv2 with patches of 14. Returns the normed patch tokens after the blocks of `taps`."""

    def __init__(self, config: DepthConfig) -> None:
        super().__init__()
        width = config.width
        self.grid, self.taps = config.grid, config.taps
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid**2 + 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # of the training; here so that weights fit
        self.patch_embed = _Patches(width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def positions(self, rows: int, columns: int) -> Tensor:
        """(1, 1 + rows * columns, C): the trained table, stretched bicubically.

        The factors are those of a grid 0.1 larger than asked for. That was once a guard against rounding; the
        weights were trained with it, and it moves every sample a little.
        """
        if rows == columns == self.grid:
            return self.pos_embed
        table = self.pos_embed[:, 1:].float().unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        factors = ((rows + 0.1) / self.grid, (columns + 0.1) / self.grid)
        table = interpolate(table, scale_factor=factors, mode="bicubic", align_corners=False)
        assert table.shape[2:] == (rows, columns), "floor(grid * factor) is the size asked for"
        return torch.cat([self.pos_embed[:, :1], table.flatten(2).transpose(1, 2)], 1)

    def forward(self, x_F3HW: Tensor) -> list[Tensor]:
        """(F, 3, H, W), normalised by ImageNet's mean and deviation -> four of (F, C, h, w)."""
        rows, columns = x_F3HW.shape[2] // PATCH, x_F3HW.shape[3] // PATCH
        x = self.patch_embed(x_F3HW)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.positions(rows, columns)
        levels = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.taps:
                tokens = self.norm(x)[:, 1:]
                levels.append(tokens.transpose(1, 2).unflatten(2, (rows, columns)).contiguous())
        return levels


# ---------------------------------------------------------------------------------- over the frames


class _Codes(nn.Module):
    """Sinusoidal position codes; the published weights carry their table."""

    def __init__(self, width: int) -> None:
        super().__init__()
        angle = torch.arange(WINDOW)[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
        self.register_buffer("pe", torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[None])


class _OverTime(nn.Module):
    """Self-attention of each spatial position over the frames."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.pos_encoder = _Codes(width)

    def forward(self, x_PFC: Tensor) -> Tensor:
        x_PFC = x_PFC + self.pos_encoder.pe[:, : x_PFC.shape[1]].to(x_PFC.dtype)
        q, k, v = (
            part(x_PFC).unflatten(-1, (_TEMPORAL_HEADS, -1)).transpose(1, 2)
            for part in (self.to_q, self.to_k, self.to_v)
        )
        return self.to_out[0](scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _GatedIn(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, -1)
        return value * gelu(gate)


class _Gated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        # Published with a dropout between the two.
        self.net = nn.Sequential(_GatedIn(width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class _TemporalBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_blocks = nn.ModuleList(_OverTime(width) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.ff, self.ff_norm = _Gated(width), nn.LayerNorm(width)

    def forward(self, x_PFC: Tensor) -> Tensor:
        for attention, norm in zip(self.attention_blocks, self.norms, strict=True):
            x_PFC = x_PFC + attention(norm(x_PFC))
        return x_PFC + self.ff(self.ff_norm(x_PFC))


class _TemporalTransformer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(_GROUPS, width, eps=1e-6)
        self.proj_in, self.proj_out = nn.Linear(width, width), nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList([_TemporalBlock(width)])

    def forward(self, x_FChw: Tensor) -> Tensor:
        rows = x_FChw.shape[2]
        y = self.proj_in(self.norm(x_FChw).flatten(2).permute(2, 0, 1))  # positions, frames, channels
        y = self.proj_out(self.transformer_blocks[0](y))
        return x_FChw + y.permute(1, 2, 0).unflatten(2, (rows, -1))


class _Temporal(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.temporal_transformer = _TemporalTransformer(width)

    def forward(self, x_FChw: Tensor) -> Tensor:
        return self.temporal_transformer(x_FChw)


# ------------------------------------------------------------------------------------ back to pixels


def _conv(inside: int, outside: int, size: int = 3, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, size, padding=size // 2, bias=bias)


def _bilinear(x: Tensor, size: tuple[int, int]) -> Tensor:
    return interpolate(x, size=size, mode="bilinear", align_corners=True)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = _conv(width, width), _conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x.relu()).relu())


class _Fusion(nn.Module):
    """Adds a finer level to what came from the coarser ones, and enlarges the sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.resConfUnit1, self.resConfUnit2 = _Residual(width), _Residual(width)
        self.out_conv = _conv(width, width, 1)

    def forward(self, x: Tensor, finer: Tensor | None, size: tuple[int, int]) -> Tensor:
        if finer is not None:
            x = x + self.resConfUnit1(finer)
        return self.out_conv(_bilinear(self.resConfUnit2(x), size))


class _Scratch(nn.Module):
    def __init__(self, config: DepthConfig) -> None:
        super().__init__()
        width = config.features
        for k, level in enumerate(config.levels, start=1):
            setattr(self, f"layer{k}_rn", _conv(level, width, bias=False))
            setattr(self, f"refinenet{k}", _Fusion(width))
        self.output_conv1 = _conv(width, width // 2)
        self.output_conv2 = nn.Sequential(
            _conv(width // 2, _LAST_WIDTH), nn.ReLU(), _conv(_LAST_WIDTH, 1, 1), nn.ReLU()
        )


class Head(nn.Module):
    """Four levels of one window -> depth of every pixel."""

    def __init__(self, config: DepthConfig) -> None:
        super().__init__()
        a, b, c, d = config.levels
        self.projects = nn.ModuleList(_conv(config.width, level, 1) for level in config.levels)
        self.resize_layers = nn.ModuleList(
            [nn.ConvTranspose2d(a, a, 4, 4), nn.ConvTranspose2d(b, b, 2, 2), nn.Identity(), nn.Conv2d(d, d, 3, 2, 1)]
        )  # fmt: skip
        self.scratch = _Scratch(config)
        self.motion_modules = nn.ModuleList(_Temporal(n) for n in (c, d, config.features, config.features))

    def forward(self, levels: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Levels (F, C, h, w) -> (F, H, W), not negative."""
        parts = zip(levels, self.projects, self.resize_layers, strict=True)
        one, two, three, four = (resize(project(level)) for level, project, resize in parts)
        over_3, over_4, over_path_4, over_path_3 = self.motion_modules
        s = self.scratch
        one, two = s.layer1_rn(one), s.layer2_rn(two)
        three, four = s.layer3_rn(over_3(three)), s.layer4_rn(over_4(four))
        path = over_path_4(s.refinenet4(four, None, three.shape[2:]))
        path = over_path_3(s.refinenet3(path, three, two.shape[2:]))
        groups = zip(path.split(_AT_ONCE), two.split(_AT_ONCE), one.split(_AT_ONCE), strict=True)
        return torch.cat([self._pixels(*group, size) for group in groups])

    def _pixels(self, path: Tensor, two: Tensor, one: Tensor, size: tuple[int, int]) -> Tensor:
        s, (rows, columns) = self.scratch, one.shape[2:]
        path = s.refinenet2(path, two, (rows, columns))
        path = s.refinenet1(path, one, (2 * rows, 2 * columns))
        out = _bilinear(s.output_conv1(path), size)
        with torch.autocast(
            out.device.type, enabled=False
        ):  # published so: depth has more range than fp16 likes
            return s.output_conv2(out.float())[:, 0]


class DepthNetwork(nn.Module):
    """Video Depth Anything: one window of frames -> relative inverse depth, near is large."""

    def __init__(self, config: DepthConfig | None = None) -> None:
        super().__init__()
        config = config or DepthConfig()
        self.pretrained = Backbone(config)
        self.head = Head(config)

    def forward(self, x_F3HW: Tensor) -> Tensor:
        """(F, 3, H, W), F at most WINDOW, H and W multiples of PATCH -> (F, H, W) fp32."""
        return self.head(self.pretrained(x_F3HW), tuple(x_F3HW.shape[2:]))
