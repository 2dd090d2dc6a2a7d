"""NetworkConfig: the sizes of one denoiser network, and the tensors its published file must hold.

Imports the standard library alone, so readers of weights and the network itself share one description.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from cosmos_fast.formats import CONTROLS, LATENT_CHANNELS, PATCH

SUBLAYERS = ("self_attn", "cross_attn", "mlp")
"""Sub-layers of a block, in the order their modulation is stacked."""


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of one denoiser network; the defaults are the published 2B with image context.

    Widths are feature counts. `image_width` None means the network has no image context. `branches` is 1 for
    a single control, 4 for the multi-control network. `control_every` counts base blocks per control block.
    Raises ValueError when the sizes do not fit together.
    """

    width: int = 2048
    heads: int = 16
    blocks: int = 28
    mlp_ratio: int = 4
    adaln_rank: int = 256
    text_width: int = 100352
    text_dim: int = 1024
    text_tokens: int = 512
    image_width: int | None = 1152
    image_tokens: int = 256
    control_every: int = 7
    branches: int = 1
    timestep_scale: float = 0.001
    control_modalities: int = 8
    latent_channels: int = LATENT_CHANNELS

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "timestep_scale":
                is_scale = isinstance(value, (int, float)) and not isinstance(value, bool)
                if not (is_scale and 0 < value < float("inf")):
                    raise ValueError(
                        f"NetworkConfig: timestep_scale must be a positive number, got {value!r}."
                    )
            elif field.name == "image_width" and value is None:
                continue
            elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"NetworkConfig: {field.name} must be a positive integer, got {value!r}.")
        if self.width % self.heads:
            raise ValueError(
                f"NetworkConfig: width must be a multiple of heads, got {self.width} and {self.heads}."
            )
        # Half of a head is rotated against the other half, and each of height and width takes a sixth of
        # the angles, so narrower heads would leave an axis without a position.
        if self.head_width % 2 or self.head_width < 6:
            raise ValueError(
                f"NetworkConfig: width / heads must be even and at least 6, got {self.head_width}."
            )
        if self.branches not in (1, len(CONTROLS)):
            raise ValueError(f"NetworkConfig: branches must be 1 or {len(CONTROLS)}, got {self.branches}.")
        if self.branches > 1 and self.image_width is not None:
            raise ValueError(
                "NetworkConfig: the multi-control network has no image context, "
                f"got image_width={self.image_width}. Set image_width to None."
            )
        if self.control_every > self.blocks:
            raise ValueError(
                "NetworkConfig: control_every must not exceed blocks, "
                f"got {self.control_every} and {self.blocks}."
            )

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def mlp_width(self) -> int:
        return self.width * self.mlp_ratio

    @property
    def control_layers(self) -> tuple[int, ...]:
        """Base blocks after which a hint is added, one per control block."""
        return tuple(range(0, self.blocks, self.control_every))

    @property
    def num_control_blocks(self) -> int:
        return len(self.control_layers)

    @property
    def patch_in(self) -> int:
        """Features of one token before the x embedding: latent, condition mask, padding mask."""
        return (self.latent_channels + 2) * PATCH * PATCH

    @property
    def control_in(self) -> int:
        """Features of one token before the control embedding: modality slots and the two masks."""
        return (self.latent_channels * self.control_modalities + 2) * PATCH * PATCH

    @property
    def patch_out(self) -> int:
        """Features of one token after the head: the predicted latent patch."""
        return self.latent_channels * PATCH * PATCH

    @classmethod
    def single(cls) -> NetworkConfig:
        """One control with image context: the published edge, vis, depth and seg networks."""
        return cls()

    @classmethod
    def multi(cls) -> NetworkConfig:
        """Four control branches on one base, without image context."""
        return cls(image_width=None, branches=len(CONTROLS))

    @classmethod
    def distilled(cls) -> NetworkConfig:
        """The few-step edge network: no image context, times in [0, 1] unscaled."""
        return cls(image_width=None, timestep_scale=1.0)

    @classmethod
    def tiny(cls, **changes: Any) -> NetworkConfig:
        """A network of the same make that runs on a CPU in milliseconds; `changes` override any size."""
        sizes: dict[str, Any] = {
            "width": 256, "heads": 2, "blocks": 8, "control_every": 4, "adaln_rank": 32,
            "text_width": 256, "text_dim": 128, "text_tokens": 32, "image_width": 64, "image_tokens": 16,
        }  # fmt: skip
        return cls(**(sizes | changes))

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> NetworkConfig:
        """Read what `to_json` wrote. Raises ValueError on malformed text, unknown keys or unfit sizes."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"NetworkConfig: expected JSON, got {text[:60]!r} ({error}).") from None
        if not isinstance(values, dict):
            raise ValueError(f"NetworkConfig: expected a JSON object, got {text[:60]!r}.")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"NetworkConfig: unknown keys {', '.join(unknown)}.")
        return cls(**values)


def _block_shapes(prefix: str, config: NetworkConfig) -> dict[str, tuple[int, ...]]:
    d, k, e, m, r = (
        config.width, config.head_width, config.text_dim, config.mlp_width, config.adaln_rank,
    )  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {}
    for part, context in (("self_attn", d), ("cross_attn", e)):
        shapes[f"{part}.q_proj.weight"] = (d, d)
        shapes[f"{part}.k_proj.weight"] = (d, context)
        shapes[f"{part}.v_proj.weight"] = (d, context)
        shapes[f"{part}.output_proj.weight"] = (d, d)
        shapes[f"{part}.q_norm.weight"] = (k,)
        shapes[f"{part}.k_norm.weight"] = (k,)
    if config.image_width is not None:
        for name in ("q_img", "k_img", "v_img"):
            shapes[f"cross_attn.{name}.weight"] = (d, d)
        for name in ("q_img_norm", "k_img_norm"):
            shapes[f"cross_attn.{name}.weight"] = (k,)
    shapes["mlp.layer1.weight"] = (m, d)
    shapes["mlp.layer2.weight"] = (d, m)
    for part in SUBLAYERS:
        shapes[f"adaln_modulation_{part}.1.weight"] = (r, d)
        shapes[f"adaln_modulation_{part}.2.weight"] = (3 * d, r)
    return {f"{prefix}{name}": shape for name, shape in shapes.items()}


def published_shapes(config: NetworkConfig) -> dict[str, tuple[int, ...]]:
    """Name (after `net.`) and shape of every parameter in the published file of this network."""
    d, r = config.width, config.adaln_rank
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.1.weight": (d, config.patch_in),
        "t_embedder.1.linear_1.weight": (d, d),
        "t_embedder.1.linear_2.weight": (3 * d, d),
        "t_embedding_norm.weight": (d,),
        "crossattn_proj.0.weight": (config.text_dim, config.text_width),
        "crossattn_proj.0.bias": (config.text_dim,),
        "final_layer.linear.weight": (config.patch_out, d),
        "final_layer.adaln_modulation.1.weight": (r, d),
        "final_layer.adaln_modulation.2.weight": (2 * d, r),
    }
    if config.image_width is not None:
        shapes["img_context_proj.0.weight"] = (d, config.image_width)
        shapes["img_context_proj.0.bias"] = (d,)
    for i in range(config.blocks):
        shapes |= _block_shapes(f"blocks.{i}.", config)
    for j in range(config.branches):
        embedder, blocks = branch_prefixes(j, config.branches)
        shapes[f"{embedder}proj.1.weight"] = (d, config.control_in)
        for n in range(config.num_control_blocks):
            shapes |= _block_shapes(f"{blocks}{n}.", config)
            for name in ("before_proj", "after_proj") if n == 0 else ("after_proj",):
                shapes[f"{blocks}{n}.{name}.weight"] = (d, d)
                shapes[f"{blocks}{n}.{name}.bias"] = (d,)
    return shapes


def branch_prefixes(branch: int, branches: int) -> tuple[str, str]:
    """Published prefixes (control embedder, control blocks) of one branch; a lone branch is not numbered."""
    if branches == 1:
        return "control_embedder.", "control_blocks."
    return f"control_embedder.{branch}.", f"control_blocks_{branch}."
