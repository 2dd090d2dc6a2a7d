"""Stage `control`: four branches, edge, vis, depth and seg, over one frozen base.

Each sample takes one control, sometimes two or all four with weights of their own, so that the four branches
also work together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from base_stage import decoded, load
from flow import IMAGE_SHARE, Prompts, base_time, noised, pick, sampled, styles
from forward import Forward, Hint, branch_from_base
from latents_stage import Latents
from recording import Run, Trainer, record, sheet
from torch import Tensor, nn
from vae_stage import trained

from cosmos_fast.formats import CONTROLS
from cosmos_fast.network import ControlBranch, Network
from cosmos_fast.self_attention import exact

STYLE_SHARE = 0.15
TOGETHER = ((1, 0.80), (2, 0.12), (4, 0.08))
"""(controls per sample, share of steps)."""
WEIGHT_SHARE = 0.25
"""Share of samples with one control whose weight is not 1."""
LEAST_WEIGHT = 0.3
# Style images are the base's business: these weights stay the base's, for all branches.
FROZEN = ("image_q", "image_kv")


def build(run: Run, network: Network) -> nn.ModuleDict:
    """Four branches that start as copies of the base and add nothing yet."""
    with torch.device("meta"):
        branches = nn.ModuleDict({n: ControlBranch(network.config, exact) for n in CONTROLS})
    branches.to_empty(device=run.device)
    for branch in branches.values():
        branch_from_base(branch, network)  # type: ignore[arg-type]
    return branches


def trained_names(branches: nn.ModuleDict) -> dict[str, nn.Parameter]:
    return {
        name: weight
        for name, weight in branches.named_parameters()
        if not any(part in name for part in FROZEN)
    }


def load_branches(run: Run, network: Network) -> nn.ModuleDict:
    """The branches from the averaged weights of stage `control`, frozen."""
    path = run.keep / "control.pt"
    if not path.exists():
        raise SystemExit(f"{path}: must exist, got no such file. Run --stage control first.")
    branches = build(run, network)
    weights = torch.load(path, map_location=run.device, weights_only=True)["weights"]
    branches.load_state_dict(branches.state_dict() | {n: w.float() for n, w in weights.items()})
    return branches.requires_grad_(False)


def dealt(
    branches: nn.ModuleDict,
    names: Sequence[str],
    latents: Latents,
    index: Tensor,
    together: int,
    generator: torch.Generator,
) -> list[Hint]:
    """Hints of a batch: it falls into as many parts as give each control once, and each gets `together` of them."""
    parts = len(names) // together
    if len(index) % parts:
        raise SystemExit(f"control: the batch must be a multiple of {parts}, got {len(index)}.")
    order = torch.randperm(
        len(names), generator=torch.Generator().manual_seed(generator.initial_seed() % 2**63)
    )
    share, hints = len(index) // parts, []
    for k, n in enumerate(order.tolist()):
        rows = slice(k // together * share, (k // together + 1) * share)
        weight = torch.rand(2, share, generator=generator, device=index.device)
        value = LEAST_WEIGHT + (1 - LEAST_WEIGHT) * weight[0]
        if together == 1:
            value = torch.where(weight[1] < WEIGHT_SHARE, value, 1.0)
        hints.append(Hint(branches[names[n]], rows, latents.signal(names[n], index[rows]), value))  # type: ignore[arg-type]
    return hints


def train(run: Run, latents: Latents) -> None:
    network, text = load(run)
    branches = build(run, network).requires_grad_(True)
    forward = Forward(network, run.is_compiled)
    prompts = Prompts(text, latents.captions, run.device)
    named = trained_names(branches)
    for name, weight in branches.named_parameters():
        weight.requires_grad_(name in named)
    trainer = Trainer(run, "control", named, lr=2e-3, lr_plain=2e-3)
    trainer.resume()
    batch = run.batch or 64

    def loss_of(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        draws = np.random.default_rng((run.seed, step, 1)).random(3)
        together = int(np.searchsorted(np.cumsum([share for _, share in TOGETHER]), draws[0]))
        together = min(TOGETHER[min(together, len(TOGETHER) - 1)][0], len(run.controls))
        index = pick(latents, batch // together, generator)
        x0 = latents.signal("rgb", index)
        hints = dealt(branches, run.controls, latents, index, together, generator)
        if draws[1] < IMAGE_SHARE:
            x0 = x0[:, :, :1]
            hints = [Hint(h.branch, h.rows, h.latent[:, :, :1], h.weight) for h in hints]
        example = noised(x0, generator, run.dtype)
        image = styles(latents, index, generator) if draws[2] < STYLE_SHARE else None
        with torch.no_grad():
            embedded = prompts(index, generator)
        is_rare = together > 1 or image is not None or x0.shape[2] == 1
        v = forward(
            example.z,
            base_time(example.sigma)[:, None],
            embedded,
            example.mask,
            image,
            hints,
            is_rare=is_rare,
        )
        loss = example.loss(v)
        return {"loss": loss, f"of_{together}": loss}

    trainer.train(loss_of)
    measure(run, latents)


@torch.no_grad()
def measure(run: Run, latents: Latents) -> None:
    """Loss per control on held-out clips, and pictures of all four and of all together."""
    network, text = load(run)
    branches = load_branches(run, network)
    forward, prompts = Forward(network), Prompts(text, latents.captions, run.device)
    index = torch.arange(latents.trained, len(latents.z), device=latents.z.device)[:16]
    losses = {}
    for name in CONTROLS:
        generator = run.generator("measure", 0)
        level = torch.full((len(index),), 0.75, device=index.device)
        example = noised(latents.signal("rgb", index), generator, run.dtype, level)
        hints = one_control(branches, latents, name, index)
        v = forward(example.z, base_time(level)[:, None], prompts(index), example.mask, None, hints)
        losses[name] = float(example.loss(v))
    record(run.keep / "logs" / "control_held_out.jsonl", **losses)
    some = index[:2]
    x0 = latents.signal("rgb", some).float()
    noise = torch.randn(x0.shape, generator=run.generator("picture", 0), device=x0.device)
    vae, columns = trained(run), [[*decoded(trained(run), x0)]]
    for name in CONTROLS:
        control = latents.signal(name, some)
        hints = one_control(branches, latents, name, some)
        x = sampled(
            run, forward, noise, prompts(some), prompts.negative(len(some)), steps=20, guidance=3.0,
            hints=lambda _, hints=hints: hints,  # type: ignore[misc]
        )  # fmt: skip
        columns += [decoded(vae, control), decoded(vae, x)]
    rows = [[column[i] for column in columns[k : k + 2]] for i in range(len(some)) for k in (1, 3, 5, 7)]
    sheet(run.keep / "samples" / "control.png", [columns[0][:2], *rows])


def one_control(
    branches: nn.ModuleDict, latents: Latents, name: str, index: Tensor, weight: float = 1.0
) -> Sequence[Hint]:
    """The hint of one control on all rows of a batch."""
    ones = torch.full((len(index),), weight, device=index.device)
    branch: ControlBranch = branches[name]  # type: ignore[assignment]
    return [Hint(branch, slice(0, len(index)), latents.signal(name, index), ones)]
