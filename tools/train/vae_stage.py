"""Stage `vae`: pixels to latents and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from clips import Clips, pixels
from recording import Run, Trainer, record, sheet
from torch import Tensor
from vae_forward import Passes, publish_, standardise_

from cosmos_fast.vae import VAE

# What a crop shows: mostly pictures; controls pass through the same encoder.
SIGNALS = ("rgb", "rgb", "rgb", "rgb", "rgb", "edge", "depth", "seg")
SCALES = (1, 2, 4)
KL_WEIGHT = 1e-4
"""A nat per latent element is worth this much mean absolute error: latents become smooth, pictures stay sharp."""


def build(run: Run) -> VAE:
    """A VAE of fresh weights, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        vae = VAE(run.sizes.vae())
    return vae.to(run.device).requires_grad_(True)


def trained(run: Run) -> VAE:
    """The VAE that stage `vae` finished, for inference; its latents have mean 0 and deviation 1."""
    path = run.keep / "vae.pt"
    saved = torch.load(path, map_location=run.device, weights_only=True) if path.exists() else {}
    if not saved.get("is_finished"):
        state = "no such file" if not saved else "one of a run that was interrupted"
        raise SystemExit(f"{path}: must be a finished VAE, got {state}. Run --stage vae to its end.")
    vae = VAE(run.sizes.vae()).to(run.device)
    vae.load_state_dict({name: weight.float() for name, weight in saved["weights"].items()})
    return publish_(vae).eval()


def crop(clips: Clips, name: str, count: int, frames: int, side: int, generator: torch.Generator) -> Tensor:
    """`count` random crops of one signal, (B, 3, frames, side, side) in [-1, 1] bf16 or fp32."""
    device = clips.rgb.device
    N, F_, H, W = clips.rgb.shape[:4]
    trained = N - clips.held_out()

    def draw(high: int) -> Tensor:
        return torch.randint(high, (count,), generator=generator, device=device)

    index, t = draw(trained), draw(F_ - frames + 1)
    y, x = draw(H - side + 1), draw(W - side + 1)
    rows = y[:, None] + torch.arange(side, device=device)
    columns = x[:, None] + torch.arange(side, device=device)
    times = t[:, None] + torch.arange(frames, device=device)
    at = (
        index[:, None, None, None],
        times[:, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    )
    if name == "rgb":
        out = clips.rgb[at]
    elif name == "seg":
        out = clips.paint[index[:, None, None, None], clips.labels[at].long()]
    else:
        out = {"edge": clips.edges, "depth": clips.depth}[name][at][..., None].expand(-1, -1, -1, -1, 3)
    flip = torch.rand(count, generator=generator, device=device) < 0.5
    return torch.where(flip.view(-1, 1, 1, 1, 1), out.flip(3), out)


def reconstruction_loss(y: Tensor, x: Tensor) -> Tensor:
    """Mean absolute error of pixels and of their differences along rows and columns, at three scales."""
    y, x = y.float().transpose(1, 2).flatten(0, 1), x.float().transpose(1, 2).flatten(0, 1)
    total = torch.zeros((), device=x.device)
    for scale in SCALES:
        a, b = (y, x) if scale == 1 else (F.avg_pool2d(y, scale), F.avg_pool2d(x, scale))
        error = a - b
        total = total + error.abs().mean()
        total = total + 0.5 * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())
    return total / len(SCALES)


def train(run: Run, clips: Clips) -> VAE:
    """Train until the time is up; returns the averaged VAE, latents normalised."""
    vae = build(run)
    passes = Passes(vae)
    trainer = Trainer(run, "vae", dict(vae.named_parameters()), lr=2e-3, lr_plain=1e-3)
    trainer.resume()
    longest, largest = clips.rgb.shape[1], min(clips.rgb.shape[2:4]) // 8 * 8
    # In turn: wide crops of half a chunk, and narrow ones of a whole chunk for what depends on long histories.
    shapes = ((min(9, longest), min(128, largest)), (longest, min(96, largest)))
    batch = run.batch or 16

    def loss_of(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        frames, side = shapes[step % 2]
        own = max(1, batch // len(SIGNALS))
        parts = [crop(clips, name, own, frames, side, generator) for name in SIGNALS]
        x = pixels(torch.cat(parts), run.dtype)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        mean, log_variance = passes.encode(x)
        mean, log_variance = mean.float(), log_variance.float().clamp(-20, 10)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        z = mean + torch.exp(0.5 * log_variance) * noise
        y = passes.decode(z.to(run.dtype))
        fidelity = reconstruction_loss(y, x)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        square = (y[: 5 * own].float() - x[: 5 * own].float()).square().mean().detach()
        return {"loss": fidelity + KL_WEIGHT * kl, "l1": fidelity, "kl": kl, "mse": square / 4}

    trainer.train(loss_of)
    return finish(run, clips, trainer)


@torch.no_grad()
def finish(run: Run, clips: Clips, trainer: Trainer) -> VAE:
    """Standardise the latents, keep the result, measure it on held-out clips and draw a picture."""
    vae = build(run).requires_grad_(False)
    vae.load_state_dict(trainer.average)
    passes = Passes(vae)
    first = len(clips) - clips.held_out()
    raw = []
    for start in range(0, min(first, 64), 4):
        index = torch.arange(start, min(start + 4, first), device=clips.rgb.device)
        raw.append(passes.encode(pixels(clips.rgb[index], run.dtype))[0].float().transpose(0, 1).flatten(1))
    flat = torch.cat(raw, dim=1)
    standardise_(vae, flat.mean(1), flat.std(1))
    trainer.save_kept(vae.state_dict(), is_finished=True)
    vae = trained(run)
    rows, errors = [], []
    index = torch.arange(first, len(clips), device=clips.rgb.device)[:16]
    for i in index.tolist():
        clip = clips.rgb[i : i + 1]
        z = vae.encode(pixels(clip, torch.float32), window=None)
        y = ((vae.decode(z, window=None) + 1) * 127.5).clamp(0, 255)[0].permute(1, 2, 3, 0)
        errors.append((y.float() - clip[0].float()).square().mean())
        if len(rows) < 4:
            rows.append([clip[0].cpu().numpy(), y.to(torch.uint8).cpu().numpy()])
    psnr = (10 * torch.log10(255**2 / torch.stack(errors))).mean()
    record(run.keep / "logs" / "vae_held_out.jsonl", clips=len(errors), psnr_db=float(psnr))
    sheet(run.keep / "samples" / "vae.png", rows)
    return vae
