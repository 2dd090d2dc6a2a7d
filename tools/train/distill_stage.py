"""Stage `distill`: a four-step student of the guided base with its edge branch.

The teacher's answer to a noise is where its guided trajectory ends. The student is trained on the inputs its own
sampler makes: the noise at first, then its own prediction mixed with that same noise again, at the four times of
the published schedule. Each step learns to name the teacher's end point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from base_stage import decoded
from base_stage import load as load_base
from control_stage import load_branches
from flow import Prompts, pick, sampled, sampled_distilled
from forward import Forward, Hint, make_network
from latents_stage import Latents
from recording import Clock, Run, Trainer, record, sheet
from torch import Tensor, nn
from vae_stage import trained

from cosmos_fast import sampler
from cosmos_fast.network import Network

TEACHER_STEPS = 12
GUIDANCE = 3.0
KNOWN_SHARE = 0.35
TEACHER_TIME = 0.4
"""Share of the stage's time that goes into the teacher's trajectories."""
HUBER = 0.03
"""Width of the quadratic part of the loss: beyond it large errors count by size, which keeps samples sharper."""


@dataclass
class Pairs:
    """noise and end, (N, C, T, H, W) bf16; index (N,) of the clip; is_known (N,): latent frame 0 was given."""

    noise: Tensor
    end: Tensor
    index: Tensor
    is_known: Tensor

    def __len__(self) -> int:
        return len(self.noise)


@torch.no_grad()
def teach(run: Run, latents: Latents, minutes: float | None, batches: int | None, salt: int) -> Pairs:
    """The teacher's end points for fresh noises, until the time or the number of batches is up."""
    network, text = load_base(run)
    branches = load_branches(run, network)
    forward = Forward(network, run.is_compiled)
    prompts = Prompts(text, latents.captions, run.device)
    clock = Clock(replace(run, minutes=minutes, steps=batches, stop=None), 0)
    batch = run.batch or 64
    parts: list[tuple[Tensor, ...]] = []
    ones = torch.ones(batch, device=run.device)
    while not clock.is_over(len(parts)) or not parts:
        n = len(parts)
        generator = run.generator("teacher", salt * 100_000 + n)
        index = pick(latents, batch, generator)
        z = latents.signal("rgb", index)
        noise = torch.randn(z.shape, generator=generator, device=z.device)
        hint = Hint(branches["edge"], slice(0, batch), latents.signal("edge", index), ones)  # type: ignore[arg-type]
        is_known = bool(np.random.default_rng((run.seed, salt, n)).random() < KNOWN_SHARE) and z.shape[2] > 1
        end = sampled(
            run, forward, noise, prompts(index), prompts.negative(batch), steps=TEACHER_STEPS, guidance=GUIDANCE,
            hints=lambda _, hint=hint: [hint], known=z[:, :, :1] if is_known else None,  # type: ignore[misc]
        )  # fmt: skip
        flags = torch.full((batch,), is_known, device=z.device)
        parts.append((noise.bfloat16(), end.bfloat16(), index, flags))
    pairs = Pairs(*(torch.cat(column) for column in zip(*parts, strict=True)))
    record(run.keep / "logs" / "teacher.jsonl", pairs=len(pairs), std=float(pairs.end.float().std()))
    return pairs


def student_names(network: Network) -> dict[str, nn.Parameter]:
    return dict(network.named_parameters())


@torch.no_grad()
def build(run: Run) -> Network:
    """The student before training: base and edge branch, without the image path."""
    base, _ = load_base(run)
    branches = load_branches(run, base)
    student = make_network(run.sizes.network("distilled"), run.device)
    edge = {f"control.0.{name}": weight for name, weight in branches["edge"].state_dict().items()}
    source = base.state_dict() | edge
    student.load_state_dict({name: source[name] for name in student.state_dict()})
    return student


def load(run: Run) -> Network:
    path = run.keep / "distill.pt"
    if not path.exists():
        raise SystemExit(f"{path}: must exist, got no such file. Run --stage distill first.")
    student = make_network(run.sizes.network("distilled"), run.device)
    weights = torch.load(path, map_location=run.device, weights_only=True)["weights"]
    student.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return student.requires_grad_(False)


def train(run: Run, latents: Latents) -> None:
    student = build(run).requires_grad_(True)
    trainer = Trainer(run, "distill", student_names(student), lr=1e-3, lr_plain=3e-4)
    trainer.resume()
    minutes = None if run.minutes is None else TEACHER_TIME * run.minutes
    batches = None if run.steps is None else max(1, run.steps // 8)
    pairs = teach(run, latents, minutes, batches, salt=trainer.step if run.steps is None else 0)
    trainer.run = run if run.minutes is None else replace(run, minutes=(1 - TEACHER_TIME) * run.minutes)
    _, text = load_base(run)
    forward = Forward(student, run.is_compiled)
    prompts = Prompts(text, latents.captions, run.device)
    batch = min(run.batch or 64, len(pairs))
    schedule = sampler.distilled_schedule(4)

    def loss_of(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        at = torch.randint(len(pairs), (batch,), generator=generator, device=pairs.index.device)
        index, known = pairs.index[at], pairs.is_known[at].float()
        end, noise = pairs.end[at].float(), pairs.noise[at].float()
        gt = latents.signal("rgb", index)[:, :, :1].float()
        mask = torch.zeros(batch, end.shape[2], device=end.device)
        mask[:, 0] = known
        given = mask[:, None, :, None, None]
        hint = Hint(
            student.control[0],
            slice(0, batch),
            latents.signal("edge", index),
            torch.ones(batch, device=end.device),  # type: ignore[arg-type]
        )
        with torch.no_grad():
            embedded = prompts(index)
        full_gt = torch.cat((gt, torch.zeros_like(end[:, :, 1:])), dim=2)
        goal = torch.where(given > 0, full_gt, end)

        def predicted(z: Tensor, i: int) -> Tensor:
            """x0 of the student at its step i, from the noisy latent z."""
            t = schedule.sigmas[i]
            times = torch.full((batch, end.shape[2]), schedule.timesteps[i], device=end.device)
            times = torch.where(mask > 0, CLEAN, times).bfloat16()
            seen = torch.where(given > 0, full_gt, z).to(run.dtype)
            v = forward(seen, times, embedded, mask, None, [hint])
            return torch.where(given > 0, full_gt, z - t * v)

        last = int(np.random.default_rng((run.seed, step, 2)).integers(schedule.steps))
        z = noise
        with torch.no_grad():
            for i in range(last):
                t = schedule.sigmas[i + 1]
                z = (1 - t) * predicted(z, i) + t * noise
        x0 = predicted(z, last)
        error = (x0 - goal) * (1 - given)
        square = (
            error.square().flatten(1).mean(1)
            * error[0].numel()
            / (1 - given).expand_as(error).flatten(1).sum(1)
        )
        loss = ((square + HUBER**2).sqrt() - HUBER).mean()
        return {"loss": loss, f"mse_step{last}": square.mean()}

    trainer.train(loss_of)
    measure(run, latents)


CLEAN = 1e-4 / (1 + 1e-4)
"""The time that known frames are told."""


@torch.no_grad()
def measure(run: Run, latents: Latents) -> None:
    """Distance between student and teacher on held-out clips, and pictures of both."""
    student = load(run)
    base, text = load_base(run)
    branches = load_branches(run, base)
    prompts = Prompts(text, latents.captions, run.device)
    some = torch.arange(latents.trained, len(latents.z), device=latents.z.device)[:4]
    x0, edge = latents.signal("rgb", some).float(), latents.signal("edge", some)
    noise = torch.randn(x0.shape, generator=run.generator("picture", 0), device=x0.device)
    rows, ones = slice(0, len(some)), torch.ones(len(some), device=x0.device)

    def hints(branch: nn.Module) -> list[Hint]:
        return [Hint(branch, rows, edge, ones)]  # type: ignore[arg-type]

    teacher = sampled(
        run, Forward(base), noise, prompts(some), prompts.negative(len(some)), steps=TEACHER_STEPS,
        guidance=GUIDANCE, hints=lambda _: hints(branches["edge"]),
    )  # fmt: skip
    own = sampled_distilled(run, Forward(student), noise, prompts(some), hints(student.control[0]))
    record(
        run.keep / "logs" / "distill_held_out.jsonl", rms=math.sqrt(float((own - teacher).square().mean())),
        teacher_std=float(teacher.std()), student_std=float(own.std()),
    )  # fmt: skip
    vae = trained(run)
    columns = [decoded(vae, z) for z in (edge, x0, teacher, own)]
    sheet(run.keep / "samples" / "distill.png", list(zip(*columns, strict=True)))
