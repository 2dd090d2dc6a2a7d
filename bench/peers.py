"""diffusers' Transformer and ControlNet as one denoiser call, eager or with every block compiled.

Built on the meta device around weights that already exist, so that nothing is copied. One control, no reference image:
the published pipeline then passes zero image features, and so does this.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cosmos_fast.config import NetworkConfig
from cosmos_fast.network_keys import diffusers_names

Backends = list[SDPBackend]
CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@contextmanager
def absent(package: str) -> Iterator[None]:
    """Imports inside do as if the package were not installed; what is loaded of it comes back afterwards.

    diffusers imports peft if it is there, which imports Transformer Engine if that is there: its libraries would join the
    peer's process for nothing, and a broken one would take the peer with it.
    """
    loaded = {
        name: sys.modules.pop(name) for name in list(sys.modules) if (name + ".").startswith(package + ".")
    }
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]
        sys.modules.update(loaded)


def without_torchvision() -> None:
    """diffusers resizes the (constant) padding mask with torchvision, its only use of it: do without."""
    from diffusers.models.controlnets import controlnet_cosmos
    from diffusers.models.transformers import transformer_cosmos

    nearest = types.SimpleNamespace(
        functional=types.SimpleNamespace(resize=lambda x, size, interpolation: F.interpolate(x, size)),
        InterpolationMode=types.SimpleNamespace(NEAREST="nearest"),
    )
    for module in (controlnet_cosmos, transformer_cosmos):
        module.transforms = nearest


def settings(config: NetworkConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constructor arguments of the Transformer and of the ControlNet."""
    shared: dict[str, Any] = dict(
        num_attention_heads=config.heads, attention_head_dim=config.head_width, mlp_ratio=float(config.mlp_ratio),
        text_embed_dim=config.text_dim, adaln_lora_dim=config.adaln_rank, rope_scale=(1.0, 3.0, 3.0),
        extra_pos_embed_type=None, use_crossattn_projection=True, crossattn_proj_in_channels=config.text_width,
        encoder_hidden_states_channels=config.text_dim, img_context_dim_in=config.image_width,
        img_context_dim_out=config.width,
    )  # fmt: skip
    transformer = shared | dict(
        in_channels=config.latent_channels + 1, out_channels=config.latent_channels, num_layers=config.blocks,
        concat_padding_mask=True, controlnet_block_every_n=config.control_every,
        img_context_num_tokens=config.image_tokens,
    )  # fmt: skip
    controlnet = shared | dict(
        n_controlnet_blocks=config.num_control_blocks, in_channels=config.control_in // 4,
        latent_channels=config.patch_in // 4, model_channels=config.width,
    )  # fmt: skip
    return transformer, controlnet


class Diffusers:
    """One denoiser call of the published pipeline: ControlNet, then Transformer.

    state: published names -> weights, used as they are. Raises ValueError for several control branches.
    """

    def __init__(self, config: NetworkConfig, state: dict[str, Tensor]) -> None:
        if config.branches != 1:
            raise ValueError(f"Diffusers: one control branch is supported, got {config.branches}.")
        with absent("transformer_engine"):
            from diffusers import CosmosControlNetModel, CosmosTransformer3DModel

            without_torchvision()
        named: dict[str, dict[str, Tensor]] = {"transformer": {}, "controlnet": {}}
        for published, tensor in state.items():
            for place, name in diffusers_names(published):
                named[place][name] = tensor
        transformer, controlnet = settings(config)
        with torch.device("meta"):
            self.transformer = CosmosTransformer3DModel(**transformer)
            self.controlnet = CosmosControlNetModel(**controlnet)
        self.config = config
        self.backends: Backends | None = None
        for net, weights in zip((self.transformer, self.controlnet), named.values(), strict=True):
            net.load_state_dict(weights, strict=True, assign=True)
            net.eval().requires_grad_(False)
            for name, module in net.named_modules():
                if name.endswith(("norm_q", "norm_k")):
                    module.eps = 1e-6  # as published; diffusers' default is 1e-5

    def compile(self, backend: str = "inductor") -> None:
        """Compile every block in place, static shapes; `eager()` runs without what was compiled."""
        for block in (*self.transformer.transformer_blocks, *self.controlnet.control_blocks):
            block.compile(backend=backend, dynamic=False)

    @contextmanager
    def eager(self) -> Iterator[None]:
        with torch.compiler.set_stance("force_eager"):
            yield

    def context(self, text_SE: Tensor) -> Any:
        if self.config.image_width is None:
            return text_SE[None]
        return text_SE[None], text_SE.new_zeros(1, self.config.image_tokens, self.config.image_width)

    @torch.no_grad()
    def __call__(self, z_CTHW: Tensor, control_CTHW: Tensor, text_SE: Tensor, tau: Tensor) -> Tensor:
        """Velocity (C, T, H, W). tau (1,): the time as the sinusoid sees it."""
        if self.backends is None:
            return self._call(z_CTHW, control_CTHW, text_SE, tau)
        with sdpa_kernel(self.backends, set_priority=True):
            return self._call(z_CTHW, control_CTHW, text_SE, tau)

    def _call(self, z_CTHW: Tensor, control_CTHW: Tensor, text_SE: Tensor, tau: Tensor) -> Tensor:
        _, T, H, W = z_CTHW.shape
        mask = z_CTHW.new_zeros(1, 1, T, H, W)
        padding = z_CTHW.new_zeros(1, 1, 8 * H, 8 * W)
        context = self.context(text_SE)
        hints = self.controlnet(
            controls_latents=control_CTHW[None], latents=z_CTHW[None], timestep=tau, encoder_hidden_states=context,
            condition_mask=mask, padding_mask=padding, return_dict=False,
        )[0]  # fmt: skip
        return self.transformer(
            hidden_states=z_CTHW[None], timestep=tau, encoder_hidden_states=context, condition_mask=mask,
            block_controlnet_hidden_states=hints, padding_mask=padding, return_dict=False,
        )[0][0]  # fmt: skip

    @torch.no_grad()
    def block(
        self, index: int, x_LD: Tensor, grid: tuple[int, int, int], text_SE: Tensor, tau: Tensor
    ) -> Tensor:
        """Output (L, D) of one block of the Transformer alone, no hint added."""
        net = self.transformer
        temb, embedded = net.time_embed(x_LD[None], tau)
        context = self.context(text_SE)
        if isinstance(context, tuple):
            context = (net.crossattn_proj(context[0]), net.img_context_proj(context[1]))
        else:
            context = net.crossattn_proj(context)
        rotary = net.rope(x_LD.new_empty(1, 1, *grid))
        return net.transformer_blocks[index](x_LD[None], context, embedded, temb, rotary)[0]


def faster_attention(
    L: int, N: int, K: int, device: torch.device
) -> tuple[Backends | None, dict[str, float | None]]:
    """Which of torch's own choice and cuDNN is faster at this size, so that the peer gets it; and both in ms."""
    if device.type != "cuda":
        return None, {}
    q, k, v = (torch.randn(1, N, L, K, dtype=torch.bfloat16, device=device) for _ in range(3))
    times: dict[str, float | None] = {}
    for name, backends in (("torch's choice", None), ("cudnn", CUDNN_FIRST)):
        try:
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
            for mark in marks:  # the first interval warms up
                mark.record()
                if backends is None:
                    F.scaled_dot_product_attention(q, k, v)
                else:
                    with sdpa_kernel(backends, set_priority=True):
                        F.scaled_dot_product_attention(q, k, v)
            torch.cuda.synchronize()
            times[name] = min(marks[1].elapsed_time(marks[2]), marks[2].elapsed_time(marks[3]))
        except RuntimeError as error:
            times[name] = None
            print(f"peer attention {name}: {error}")
    plain, cudnn = times["torch's choice"], times["cudnn"]
    return (CUDNN_FIRST if cudnn is not None and (plain is None or cudnn < 0.98 * plain) else None), times
