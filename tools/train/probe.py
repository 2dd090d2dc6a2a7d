"""A small network that reads depth and segments off a frame: how tools/evaluate_model.py sees what was generated.

    python tools/train/probe.py DATA tools/train/probe.safetensors [--steps 1500] [--device cuda]

DATA holds the shards of tools/data/make_dataset.py. The probe learns from simulator frames alone, blurred, noised and
recoloured so that it judges shape rather than finish. It is a measuring device: never part of the package, and its own
error on real held-out frames is reported beside everything measured with it. Weights are stored in 8 bits.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from cosmos_fast.lowbit import read_packed, write_packed  # noqa: E402
from tools.data.make_dataset import read_shards  # noqa: E402

WEIGHTS = Path(__file__).resolve().parent / "probe.safetensors"
CLASSES = ("background", "surface", "robot arm", "roadside", "thing")
"""What a pixel may show: what the segment painting leaves black, what things stand on, the arm, houses and trees,
and everything else: objects and vehicles."""

NAMES = {"table": "surface", "road": "surface", "pavement": "surface", "robot arm": "robot arm"}
ROADSIDE = ("building", "tree", "lamp", "rock", "hill", "cactus")
"""First words of the label names of what stands beside a road."""

WIDTHS = (24, 40, 64, 96)


def class_table(names: Sequence[str], background: Sequence[int]) -> np.ndarray:
    """Class of each label id, (256,) uint8."""
    table = np.zeros(256, np.uint8)
    for label, name in enumerate(names):
        kind = "roadside" if name.split()[0] in ROADSIDE else NAMES.get(name, "thing")
        table[label] = CLASSES.index(kind)
    table[list(background)] = 0
    return table


class Probe(nn.Module):
    """U-Net of four scales, 0.8 million parameters: (B, 3, H, W) in [-1, 1] -> depth (B, H, W), classes (B, 5, H, W).

    H and W are multiples of 16. Depth is inverse and of no fixed scale; compare it after a linear fit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Conv(3, WIDTHS[0], stride=2)
        self.down = nn.ModuleList(_Conv(a, b, stride=2) for a, b in zip(WIDTHS, WIDTHS[1:], strict=False))
        self.wide = nn.Sequential(_Conv(WIDTHS[-1], WIDTHS[-1]), _Conv(WIDTHS[-1], WIDTHS[-1]))
        pairs = list(zip(WIDTHS[::-1], WIDTHS[-2::-1], strict=False))
        self.up = nn.ModuleList(_Conv(a + b, b) for a, b in pairs)
        self.head = nn.Conv2d(WIDTHS[0], 1 + len(CLASSES), 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        levels = [self.stem(x)]
        for down in self.down:
            levels.append(down(levels[-1]))
        y = self.wide(levels.pop())
        for up in self.up:
            skip = levels.pop()
            y = up(torch.cat([F.interpolate(y, size=skip.shape[-2:], mode="bilinear"), skip], 1))
        y = F.interpolate(self.head(y), size=x.shape[-2:], mode="bilinear")
        return y[:, 0], y[:, 1:]

    @torch.inference_mode()
    def read(self, frames_FHW3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(F, H, W, 3) uint8 -> depth (F, H, W) float32 and classes (F, H, W) uint8."""
        device = self.head.weight.device
        depth, classes = [], []
        for start in range(0, len(frames_FHW3), 8):
            x = (
                torch.from_numpy(frames_FHW3[start : start + 8]).to(device).permute(0, 3, 1, 2).float()
                / 127.5
                - 1
            )
            one, scores = self(x)
            depth.append(one.cpu().numpy())
            classes.append(scores.argmax(1).to(torch.uint8).cpu().numpy())
        return np.concatenate(depth), np.concatenate(classes)

    @classmethod
    def load(cls, path: Path = WEIGHTS, device: torch.device | str = "cpu") -> Probe:
        if not path.is_file():
            raise SystemExit(
                f"{path}: must exist, got no such file. Run: python tools/train/probe.py DATA {path}"
            )
        probe = cls()
        probe.load_state_dict(read_packed(path))
        return probe.to(device).eval().requires_grad_(False)


class _Conv(nn.Module):
    """Two 3 x 3 convolutions with group norms."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride=stride, padding=1)
        self.second = nn.Conv2d(after, after, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(8, after) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norms[0](self.first(x)))
        return F.silu(self.norms[1](self.second(x)))


def worsened(x: Tensor, generator: torch.Generator) -> Tensor:
    """Frames (B, 3, H, W) as a small VAE might leave them: recoloured, softened, noisy."""
    draws = torch.rand(6, len(x), 1, 1, 1, generator=generator, device=x.device)
    gain = 0.7 + 0.6 * torch.rand(len(x), 3, 1, 1, generator=generator, device=x.device)
    x = x * gain + 0.3 * (draws[0] - 0.5)
    soft = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="bilinear")
    x = torch.where(draws[1] < 0.5, soft, x)
    x = torch.where(draws[2] < 0.2, F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, stride=1), x)
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    return (x + 0.08 * draws[3] * noise).clamp(-1, 1)


def loss_of(depth: Tensor, scores: Tensor, truth: Tensor, classes: Tensor) -> Tensor:
    """Depth after the best linear fit per frame, plus cross entropy."""
    p, t = depth.flatten(1), truth.flatten(1)
    p0, t0 = p - p.mean(1, keepdim=True), t - t.mean(1, keepdim=True)
    scale = ((p0 * t0).mean(1, keepdim=True) / (p0.square().mean(1, keepdim=True) + 1e-4)).detach()
    fitted = (scale * p0 - t0).abs().mean()
    # Plain distance as well: the fit alone would let the scale of the output drift.
    return fitted + (p - t).abs().mean() + 0.5 * F.cross_entropy(scores, classes)


def read(data: Path, limit: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """rgb (N, F, H, W, 3), depth and labels (N, F, H, W) of the first clips, and a class table (N, 256), all uint8."""
    shards, lines = [], []
    for arrays, told in read_shards(data):
        shards.append(arrays)
        lines += told
        if limit is not None and len(lines) >= limit:
            break
    rgb, depth, labels = (np.concatenate([s[n] for s in shards])[:limit] for n in ("rgb", "depth", "labels"))
    tables = np.stack([class_table(line["labels"], line["background"]) for line in lines[:limit]])
    return rgb, depth, labels, tables


def train(
    data: Path, steps: int, batch: int, device: str, limit: int | None, seed: int = 0
) -> tuple[Probe, dict[str, Any]]:
    """A probe trained on the shards of a folder, and its error on their last 2 %."""
    rgb, depth, labels, tables = read(data, limit)
    held = max(1, len(rgb) // 50)
    trained = len(rgb) - held
    torch.manual_seed(seed)
    probe = Probe().to(device)
    picker, generator = np.random.default_rng(seed), torch.Generator(device).manual_seed(seed)
    optimiser = torch.optim.AdamW(probe.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    for step in range(steps):
        n, f = picker.integers(max(trained, 1), size=batch), picker.integers(rgb.shape[1], size=batch)
        x = torch.from_numpy(rgb[n, f]).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        truth = torch.from_numpy(depth[n, f]).to(device).float() / 255
        kinds = (
            torch.from_numpy(np.stack([tables[i][labels[i, j]] for i, j in zip(n, f, strict=True)]))
            .to(device)
            .long()
        )
        if picker.random() < 0.5:
            x, truth, kinds = x.flip(-1), truth.flip(-1), kinds.flip(-1)
        loss = loss_of(*probe(worsened(x, generator)), truth, kinds)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5d} loss {float(loss):.4f}", flush=True)
    probe.eval()
    right = total = 0
    errors = []
    for i in range(trained, len(rgb)):
        seen, kinds = probe.read(rgb[i])
        errors.append(aligned_error(seen, depth[i].astype(np.float32) / 255))
        right += int((kinds == tables[i][labels[i]]).sum())
        total += kinds.size
    return probe, {
        "steps": steps,
        "clips": trained,
        "depth_si_rmse": float(np.mean(errors)),
        "pixels_right": right / total,
    }


def aligned_error(seen: np.ndarray, truth: np.ndarray) -> float:
    """Root mean square of truth - (a * seen + b) with the best a >= 0 and b for the clip: si-RMSE, truth in [0, 1]."""
    s, t = seen.ravel().astype(np.float64), truth.ravel().astype(np.float64)
    s, t = s - s.mean(), t - t.mean()
    a = max(float(s @ t) / (float(s @ s) + 1e-12), 0.0)
    return float(np.sqrt(np.mean((t - a * s) ** 2)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path, nargs="?", default=WEIGHTS)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=int, help="clips to read")
    args = parser.parse_args()
    probe, figures = train(args.data, args.steps, args.batch, args.device, args.limit)
    write_packed(
        args.out,
        {n: w.cpu() for n, w in probe.state_dict().items()},
        8,
        metadata={"probe": json.dumps(figures)},
    )
    print(json.dumps(figures), args.out, f"{args.out.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
