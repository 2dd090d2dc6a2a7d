"""Random weights under published names, and the same weights inside diffusers' classes (fp32, CPU)."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.peers import absent, settings, without_torchvision
from cosmos_fast.config import NetworkConfig, published_shapes

RENAMES = (
    ("x_embedder.proj.1", "patch_embed.proj"), ("control_embedder.proj.1", "patch_embed.proj"),
    ("t_embedder.1.", "time_embed.t_embedder."), ("t_embedding_norm", "time_embed.norm"),
    ("self_attn", "attn1"), ("cross_attn", "attn2"), ("output_proj", "to_out.0"),
    ("q_norm", "norm_q"), ("k_norm", "norm_k"), ("mlp.layer1", "ff.net.0.proj"), ("mlp.layer2", "ff.net.2"),
    ("final_layer.adaln_modulation.", "norm_out.linear_"), ("final_layer.linear", "proj_out"),
)  # fmt: skip


def random_state(config: NetworkConfig, seed: int = 0) -> dict[str, Tensor]:
    """Published names -> fp32 weights, scaled so that every path matters and the output is of order 5."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in published_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name:
            state[name] = 1 + 0.1 * noise
        elif name.endswith("bias"):
            state[name] = 0.1 * noise
        else:
            state[name] = noise * shape[-1] ** -0.5 * (6.0 if name.startswith("final_layer.linear") else 1.0)
    return state


def _rename(name: str) -> str:
    name = "transformer_" + name if name.startswith("blocks.") else name
    for number, part in enumerate(("self_attn", "cross_attn", "mlp"), start=1):
        name = name.replace(f"adaln_modulation_{part}.", f"norm{number}.linear_")
    for old, new in RENAMES:
        name = name.replace(old, new)
    for letter in "qkv":
        name = name.replace(f".{letter}_proj.", f".to_{letter}.")
    return name


class Oracle:
    """diffusers' Transformer and one ControlNet per branch, with the published eps of the q/k norms."""

    def __init__(self, config: NetworkConfig, state: dict[str, Tensor]) -> None:
        with absent("transformer_engine"):
            from diffusers import CosmosControlNetModel, CosmosTransformer3DModel

        without_torchvision()
        transformer, controlnet = settings(config)
        self.config = config
        self.base = CosmosTransformer3DModel(**transformer)
        self.controls = []
        base = {_rename(k): v for k, v in state.items() if "control" not in k}
        self.base.load_state_dict(base, strict=True)
        for j in range(config.branches):
            net = CosmosControlNetModel(**controlnet)
            own = {
                k.replace(f"control_embedder.{j}.", "control_embedder.").replace(f"control_blocks_{j}.", "control_blocks."): v
                for k, v in state.items()
                if k.startswith(("control_embedder.", "control_blocks.") if config.branches == 1 else (f"control_embedder.{j}.", f"control_blocks_{j}."))
            }  # fmt: skip
            loaded = {_rename(k): v for k, v in own.items()}
            shared = {
                k: v
                for k, v in base.items()
                if k.startswith(("time_embed", "crossattn_proj", "img_context_proj"))
            }
            loaded |= shared | {"patch_embed_base.proj.weight": base["patch_embed.proj.weight"]}
            net.load_state_dict(loaded, strict=True)
            self.controls.append(net)
        for net in (self.base, *self.controls):
            net.eval()
            for name, module in net.named_modules():
                if name.endswith(("norm_q", "norm_k")):
                    module.eps = 1e-6

    @torch.no_grad()
    def __call__(
        self,
        z_CTHW: Tensor,
        tau: Tensor,
        text_SE: Tensor,
        image: Tensor | None,
        controls: list[Tensor | None],
        weights: list[float] | Tensor,
        mask_T: Tensor,
    ) -> Tensor:
        """Velocity (C, T, H, W). tau: (1,) or (T,) times as the sinusoid sees them; weights floats or maps."""
        _, T, H, W = z_CTHW.shape
        mask = mask_T.view(1, 1, T, 1, 1).expand(1, 1, T, H, W).float()
        padding = torch.zeros(1, 1, 8 * H, 8 * W)
        time = tau if tau.numel() == 1 else tau.view(1, 1, T, 1, 1)
        context = (text_SE[None], None if image is None else image[None])
        context = context if self.config.image_width is not None else context[0]
        hints: list[Tensor] = []
        for j, (net, control) in enumerate(zip(self.controls, controls, strict=True)):
            if control is None and self.config.branches > 1:
                continue
            control = torch.zeros_like(z_CTHW) if control is None else control
            samples = net(
                controls_latents=control[None], latents=z_CTHW[None], timestep=time, encoder_hidden_states=context,
                condition_mask=mask, padding_mask=padding,
            ).control_block_samples  # fmt: skip
            weight = weights[j].reshape(1, -1, 1) if isinstance(weights, Tensor) else weights[j]
            scaled = [weight * sample for sample in samples]
            hints = scaled if not hints else [a + b for a, b in zip(hints, scaled, strict=True)]
        return self.base(
            hidden_states=z_CTHW[None], timestep=time, encoder_hidden_states=context,
            block_controlnet_hidden_states=hints or None, condition_mask=mask, padding_mask=padding,
        ).sample[0]  # fmt: skip
