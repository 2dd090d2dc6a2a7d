"""What the network stages share: noise levels, known frames, prompts, and sampling with whole batches.

Rectified flow as in `cosmos_fast.sampler`: x = (1 - sigma) * x0 + sigma * noise, target noise - x0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from forward import Hint
from latents_stage import Latents
from recording import Run
from torch import Tensor

from cosmos_fast import sampler
from cosmos_fast.spec import NEGATIVE_PROMPT
from cosmos_fast.text import TinyText

SHIFT = 3.0
"""Half of the training noise levels lie above SHIFT / (1 + SHIFT). Sampling visits even higher ones (shift 5),
but a small model needs the low levels for its detail."""
UNIFORM_SHARE = 0.1
TEXT_DROPOUT = 0.1
KNOWN_SHARE = 0.35
KNOWN_NOISE = 0.1
"""Known frames come from decoded video: some noise in training makes the network forgive its errors."""
IMAGE_SHARE = 0.05
"""Steps on single frames, so that a chunk of one frame works."""


def sigmas(count: int, generator: torch.Generator) -> Tensor:
    """Noise levels (B,) fp32: a shifted logit-normal, and a tenth of them uniform."""
    device = generator.device
    s = torch.randn(count, generator=generator, device=device).sigmoid()
    s = SHIFT * s / (1 + (SHIFT - 1) * s)
    uniform = torch.rand(2, count, generator=generator, device=device)
    return torch.where(uniform[0] < UNIFORM_SHARE, uniform[1], s)


def base_time(sigma: Tensor) -> Tensor:
    """What the base network is told: trunc(1000 sigma), int64."""
    return (sigma.double() * 1000).long().clamp(max=999)


@dataclass(frozen=True)
class Noised:
    """A training example. z: network input; target: its velocity; mask (B, T): 1 on known frames; sigma (B,)."""

    z: Tensor
    target: Tensor
    mask: Tensor
    sigma: Tensor

    def loss(self, v: Tensor) -> Tensor:
        """Mean square error of the velocity over the frames that are not known."""
        weight = (1 - self.mask)[:, None, :, None, None].expand_as(v)
        return ((v - self.target).square() * weight).sum() / weight.sum()


def noised(x0: Tensor, generator: torch.Generator, dtype: torch.dtype, sigma: Tensor | None = None) -> Noised:
    """Noise clean latents (B, C, T, H, W); in some samples the first latent frame is known."""
    B, _, T = x0.shape[:3]
    device = x0.device
    x0 = x0.float()
    sigma = sigmas(B, generator) if sigma is None else sigma
    noise = torch.randn(x0.shape, generator=generator, device=device)
    level = sigma.view(-1, 1, 1, 1, 1)
    x = (1 - level) * x0 + level * noise
    mask = torch.zeros(B, T, device=device)
    if T > 1:
        draws = torch.rand(2, B, generator=generator, device=device)
        mask[:, 0] = (draws[0] < KNOWN_SHARE).float()
        blur = (KNOWN_NOISE * draws[1]).view(-1, 1, 1, 1, 1)
        gt = x0 + blur * torch.randn(x0.shape, generator=generator, device=device)
        x = torch.where(mask[:, None, :, None, None] > 0, gt, x)
    return Noised(x.to(dtype), noise - x0, mask, sigma)


class Prompts:
    """Captions as tokens on the device, and what stands for no caption: the default negative prompt, or nothing."""

    def __init__(self, text: TinyText, captions: Sequence[str], device: str) -> None:
        self.text = text
        self.tokens = torch.stack([text.tokenize(caption) for caption in captions]).to(device)
        self.none = torch.stack([text.tokenize(NEGATIVE_PROMPT), text.tokenize("")]).to(device)

    def __call__(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Embeddings (B, S, E); with a generator some captions are dropped, two thirds to the negative prompt."""
        tokens = self.tokens[index]
        if generator is not None:
            draws = torch.rand(2, len(index), generator=generator, device=tokens.device)
            other = self.none[(draws[1] < 1 / 3).long()]
            tokens = torch.where((draws[0] < TEXT_DROPOUT)[:, None], other, tokens)
        return self.text(tokens)

    def negative(self, count: int) -> Tensor:
        return self.text(self.none[:1]).expand(count, -1, -1)


def pick(latents: Latents, count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(latents.trained, (count,), generator=generator, device=latents.z.device)


def styles(latents: Latents, index: Tensor, generator: torch.Generator) -> Tensor:
    """One of the style images of each clip, (B, I, 48)."""
    which = torch.randint(latents.style.shape[1], (len(index),), generator=generator, device=index.device)
    return latents.style[index, which]


@torch.no_grad()
def sampled(
    run: Run,
    velocity: Callable[..., Tensor],
    noise: Tensor,
    text: Tensor,
    negative: Tensor,
    *,
    steps: int,
    guidance: float,
    hints: Callable[[int], Sequence[Hint]] = lambda count: (),
    image: Tensor | None = None,
    known: Tensor | None = None,
    schedule: sampler.Schedule | None = None,
) -> Tensor:
    """`cosmos_fast.sampler.sample` over a batch: latents (B, C, T, H, W) fp32.

    known (B, C, 1, H, W): the first latent frame of all samples. `hints(n)` gives the controls of n copies of
    the batch's rows.
    """
    schedule = schedule or sampler.base_schedule(steps)
    times = sampler.base_times(schedule).to(noise.device)
    B, _, T = noise.shape[:3]
    mask = torch.zeros(B, T, device=noise.device)
    if known is not None:
        mask[:, 0] = 1

    def pair(z: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        told = times[step].expand(B, 1)
        cond = velocity(z, told, text, mask, image, hints(B))
        if guidance == 0:
            return cond, None
        none = None if image is None else torch.zeros_like(image)
        return cond, velocity(z, told, negative, mask, none, hints(B))

    given = None if known is None else sampler.Known(known.float())
    return sampler.sample(pair, noise, schedule, guidance=guidance, known=given, dtype=run.dtype)


@torch.no_grad()
def sampled_distilled(
    run: Run, velocity: Callable[..., Tensor], noise: Tensor, text: Tensor, hints: Sequence[Hint],
    known: Tensor | None = None, steps: int = 4,
) -> Tensor:  # fmt: skip
    """`cosmos_fast.sampler.sample_distilled` over a batch."""
    schedule = sampler.distilled_schedule(steps)
    B, _, T = noise.shape[:3]
    times = sampler.distilled_times(schedule, T, 0 if known is None else 1).to(noise.device)
    mask = torch.zeros(B, T, device=noise.device)
    if known is not None:
        mask[:, 0] = 1
    given = None if known is None else sampler.Known(known.float())
    return sampler.sample_distilled(
        lambda z, i: velocity(z, times[i].expand(B, T), text, mask, None, hints),
        noise, schedule, known=given, dtype=run.dtype,
    )  # fmt: skip
