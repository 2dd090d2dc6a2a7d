"""Sizes of the embedded model `tiny` and of the toy models of the tests."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from cosmos_fast.config import NetworkConfig
from cosmos_fast.formats import CONTROLS
from cosmos_fast.text import TinyText
from cosmos_fast.vae_keys import VAEConfig


@dataclass(frozen=True)
class Sizes:
    """Every number that settles the shape of a tensor; frames per chunk and latent channels included."""

    vae_base: int = 16
    width: int = 256
    heads: int = 2
    blocks: int = 6
    control_every: int = 3
    mlp_ratio: int = 2
    adaln_rank: int = 32
    text_dim: int = 128
    vocabulary: int = 1024
    text_width: int = 128
    text_tokens: int = 32
    text_layers: int = 1
    image_width: int = 48
    image_tokens: int = 256
    frames: int = 17

    @classmethod
    def toy(cls) -> Sizes:
        """A model that learns a step in milliseconds on one core."""
        return cls(
            vae_base=4, width=96, heads=1, blocks=2, control_every=1, adaln_rank=8, text_dim=16, vocabulary=64,
            text_width=16, text_tokens=8, image_tokens=4, frames=5,
        )  # fmt: skip

    @classmethod
    def named(cls, name: str) -> Sizes:
        return {"tiny": cls, "toy": cls.toy}[name]()

    def vae(self) -> VAEConfig:
        return VAEConfig(base=self.vae_base)

    def network(self, kind: str) -> NetworkConfig:
        """`single`: one branch and style images; `multi`: four branches; `distilled`: one, times unscaled.

        `training`: four branches and style images, which no file holds; the base and control stages use it.
        """
        single = NetworkConfig(
            width=self.width, heads=self.heads, blocks=self.blocks, mlp_ratio=self.mlp_ratio,
            adaln_rank=self.adaln_rank, text_width=self.text_width, text_dim=self.text_dim,
            text_tokens=self.text_tokens, image_width=self.image_width, image_tokens=self.image_tokens,
            control_every=self.control_every,
        )  # fmt: skip
        if kind == "multi":
            return replace(single, image_width=None, branches=len(CONTROLS))
        if kind == "distilled":
            return replace(single, image_width=None, timestep_scale=1.0)
        return single

    def text(self, seed: int = 0) -> TinyText:
        return TinyText(self.vocabulary, self.text_width, self.text_tokens, self.text_layers, seed=seed)

    def record(self) -> dict[str, Any]:
        return asdict(self)
