"""Stage `base`: the denoiser without controls, and the text encoder with it."""

from __future__ import annotations

import numpy as np
import torch
from flow import (
    IMAGE_SHARE,
    Prompts,
    base_time,
    noised,
    pick,
    sampled,
    styles,
)
from forward import Forward, initialise, make_network
from latents_stage import Latents
from recording import Run, Trainer, record, sheet
from torch import Tensor, nn
from vae_stage import trained

from cosmos_fast.network import Network
from cosmos_fast.text import TinyText
from cosmos_fast.vae import VAE

STYLE_SHARE = 0.5
"""Share of steps with style images; without one the image path is left out, which is the same as zeros."""
MEASURED_SIGMAS = (0.25, 0.5, 0.75, 0.9)


def base_names(network: Network) -> dict[str, nn.Parameter]:
    """What the base stage trains. The image projection keeps its zero bias: no style image adds nothing."""
    return {
        f"net.{name}": weight
        for name, weight in network.named_parameters()
        if not name.startswith("control.") and name != "image_proj.bias"
    }


def build(run: Run) -> tuple[Network, TinyText]:
    network = make_network(run.sizes.network("single"), run.device)
    initialise(network, torch.Generator(run.device).manual_seed(run.seed))
    return network, run.sizes.text(run.seed).to(run.device)


def load(run: Run) -> tuple[Network, TinyText]:
    """Base network and text encoder from the averaged weights of stage `base`, frozen."""
    path = run.keep / "base.pt"
    if not path.exists():
        raise SystemExit(f"{path}: must exist, got no such file. Run --stage base first.")
    network, text = build(run)
    weights = torch.load(path, map_location=run.device, weights_only=True)["weights"]
    for prefix, module in (("net.", network), ("text.", text)):
        mine = {n[len(prefix) :]: w.float() for n, w in weights.items() if n.startswith(prefix)}
        module.load_state_dict(module.state_dict() | mine)
    return network.requires_grad_(False), text.requires_grad_(False)


def train(run: Run, latents: Latents) -> None:
    network, text = build(run)
    forward = Forward(network, run.is_compiled)
    prompts = Prompts(text, latents.captions, run.device)
    named = base_names(network) | {f"text.{n}": w for n, w in text.named_parameters()}
    trainer = Trainer(run, "base", named, lr=4e-3, lr_plain=4e-3, decay=0.01)
    trainer.resume()
    batch = run.batch or 64

    def loss_of(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        index = pick(latents, batch, generator)
        x0 = latents.signal("rgb", index)
        kind = np.random.default_rng((run.seed, step)).random(2)
        if kind[0] < IMAGE_SHARE:
            x0 = x0[:, :, :1]
        example = noised(x0, generator, run.dtype)
        image = styles(latents, index, generator) if kind[1] < STYLE_SHARE else None
        v = forward(
            example.z,
            base_time(example.sigma)[:, None],
            prompts(index, generator),
            example.mask,
            image,
            is_rare=x0.shape[2] == 1,
        )
        loss = example.loss(v)
        return {"loss": loss, "with_style" if image is not None else "without_style": loss}

    trainer.train(loss_of)
    network, text = load(run)
    measure(run, latents, network, text)


@torch.no_grad()
def measure(run: Run, latents: Latents, network: Network, text: TinyText) -> None:
    """Loss on held-out clips at fixed noise levels, and pictures."""
    forward, prompts = Forward(network), Prompts(text, latents.captions, run.device)
    index = torch.arange(latents.trained, len(latents.z), device=latents.z.device)[:16]
    losses = {}
    for sigma in MEASURED_SIGMAS:
        generator = run.generator("measure", 0)
        level = torch.full((len(index),), sigma, device=index.device)
        example = noised(latents.signal("rgb", index), generator, run.dtype, level)
        v = forward(example.z, base_time(level)[:, None], prompts(index), example.mask)
        losses[f"loss_{sigma}"] = float(example.loss(v))
    record(run.keep / "logs" / "base_held_out.jsonl", **losses)
    some = index[:4]
    x0 = latents.signal("rgb", some).float()
    noise = torch.randn(x0.shape, generator=run.generator("picture", 0), device=x0.device)
    vae, rows = trained(run), []
    for guidance in (0.0, 3.0):
        x = sampled(
            run, forward, noise, prompts(some), prompts.negative(len(some)), steps=20, guidance=guidance
        )
        rows.append(decoded(vae, x))
    sheet(run.keep / "samples" / "base.png", list(zip(decoded(vae, x0), *rows, strict=True)))


@torch.no_grad()
def decoded(vae: VAE, z: Tensor) -> list[np.ndarray]:
    """Clips (F, H, W, 3) uint8 of latents (B, C, T, H, W), one at a time."""
    clips = []
    for one in z:
        y = vae.decode(one[None].float(), window=None)[0].permute(1, 2, 3, 0)
        clips.append(((y + 1) * 127.5).clamp(0, 255).to(torch.uint8).cpu().numpy())
    return clips
