"""Stage `latents`: every clip and its controls through the trained VAE, once."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from clips import BLURS, Clips, blurred, pixels, style_features
from recording import Run, atomic, record
from torch import Tensor
from vae_forward import Passes
from vae_stage import trained

from cosmos_fast.formats import CONTROLS
from cosmos_fast.vae import latent_statistics

SIGNALS = ("rgb", *CONTROLS)
STYLES = 2
"""Style images kept per clip: random frames, every second one mirrored."""


@dataclass
class Latents:
    """On the training device. z (N, 5, C, T, H, W) bf16 in the order of SIGNALS, style (N, 2, I, 48) bf16.

    is_black (N, 5): the signal is black all over, which the networks see as a zero latent. `trained` clips come
    first, the rest is for measuring.
    """

    z: Tensor
    style: Tensor
    is_black: Tensor
    captions: list[str]
    trained: int

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.z.shape[3], self.z.shape[4], self.z.shape[5]

    def signal(self, name: str, index: Tensor) -> Tensor:
        """(B, C, T, H, W); zeros where a control is black."""
        n = SIGNALS.index(name)
        z = self.z[index, n]
        return z if name == "rgb" else z * ~self.is_black[index, n].view(-1, 1, 1, 1, 1)


@torch.no_grad()
def encode(run: Run, clips: Clips) -> Latents:
    """Encode until all is done or the time is up; writes `work/latents/`."""
    passes = Passes(trained(run))
    device, N = clips.rgb.device, len(clips)
    began = time.monotonic()
    size = run.batch or 8
    # Held-out clips first, so that they are there however early the time is up.
    order = [*range(N - clips.held_out(), N), *range(N - clips.held_out())]
    done: list[Tensor] = []
    styles: list[Tensor] = []
    black: list[Tensor] = []
    generator = run.generator("latents", 0)
    for start in range(0, N, size):
        if (
            run.minutes is not None
            and time.monotonic() - began > 60 * run.minutes
            and start >= clips.held_out()
        ):
            break
        index = torch.tensor(order[start : start + size], device=device)
        B = len(index)
        rgb = clips.frames("rgb", index)
        preset = BLURS[(start // size) % len(BLURS)]
        vis = blurred(rgb.flatten(0, 1), preset).unflatten(0, (B, -1))
        parts = []
        dark = [torch.zeros(B, dtype=torch.bool, device=device)]
        for name in SIGNALS:
            frames = {"rgb": rgb, "vis": vis}.get(name)
            frames = clips.frames(name, index) if frames is None else frames
            if name != "rgb":
                dark.append((frames == 0).flatten(1).all(1))
            x = pixels(frames, run.dtype).contiguous(memory_format=torch.channels_last_3d)
            parts.append(normalised(passes, x).bfloat16())
        done.append(torch.stack(parts, dim=1))
        black.append(torch.stack(dark, dim=1))
        pick = torch.randint(rgb.shape[1], (STYLES, B), generator=generator, device=device)
        rows = torch.arange(B, device=device)
        images = [rgb[rows, pick[k]].flip(2) if k % 2 else rgb[rows, pick[k]] for k in range(STYLES)]
        styles.append(style_features(torch.stack(images, dim=1), run.sizes.image_tokens).bfloat16())
    z, style, dark_all = torch.cat(done), torch.cat(styles), torch.cat(black)
    held = clips.held_out()
    turn = torch.cat((torch.arange(held, len(z)), torch.arange(held))).to(device)
    captions = [clips.captions[order[i]] for i in turn.tolist()]
    latents = Latents(z[turn], style[turn], dark_all[turn], captions, len(z) - held)
    write(run.work / "latents", latents)
    used = latents.z[:, 0].float()
    record(
        run.keep / "logs" / "latents.jsonl", clips=len(z), of=N, seconds=round(time.monotonic() - began, 1),
        mean=float(used.mean()), std=float(used.std()),
    )  # fmt: skip
    return latents


def normalised(passes: Passes, x: Tensor) -> Tensor:
    """What `VAE.encode` gives for the whole clip, through the fast pass."""
    shift, gain = latent_statistics(passes.vae.config, x)
    return (passes.encode(x)[0] - shift) * gain


def write(folder: Path, latents: Latents) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("z", "style"):
        raw = getattr(latents, name).contiguous().view(torch.int16).cpu().numpy()
        atomic(folder / f"{name}.npy", lambda path, raw=raw: _save(path, raw))  # type: ignore[misc]
    atomic(folder / "black.npy", lambda path: _save(path, latents.is_black.cpu().numpy()))
    card = {"captions": latents.captions, "trained": latents.trained}
    atomic(folder / "card.json", lambda path: path.write_text(json.dumps(card)))


def _save(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, array)


def read(run: Run) -> Latents:
    """The latents that `encode` wrote, on the training device."""
    folder = run.work / "latents"
    if not (folder / "card.json").exists():
        raise SystemExit(f"{folder}: must hold latents, got none. Run --stage latents first.")
    card = json.loads((folder / "card.json").read_text())
    z, style = (
        torch.from_numpy(np.load(folder / f"{name}.npy")).to(run.device).view(torch.bfloat16)
        for name in ("z", "style")
    )
    black = torch.from_numpy(np.load(folder / "black.npy")).to(run.device)
    return Latents(z, style, black, card["captions"], card["trained"])
