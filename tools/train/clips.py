"""Training clips and their controls, as uint8 on the training device.

N clips of F frames, H rows, W columns.
"""

from __future__ import annotations

import colorsys
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_fast.controls import BILATERAL, BLUR_FACTORS, PRESETS, _bicubic, edge

THREADS = 16
# Presets whose bilateral pass works on a shrunken frame; the others cost four to sixteen times as much.
BLURS = ("medium", "medium", "medium", "low", "very_high")
MEDIUM_EDGES = 0.6
GREY = ("depth", "labels", "edges")


@dataclass
class Clips:
    """rgb (N, F, H, W, 3); depth, labels, edges (N, F, H, W); paint (N, 256, 3): colour of each label. All uint8."""

    rgb: Tensor
    depth: Tensor
    labels: Tensor
    edges: Tensor
    paint: Tensor
    captions: list[str]

    def __len__(self) -> int:
        return len(self.rgb)

    def frames(self, name: str, index: Tensor) -> Tensor:
        """(B, F, H, W, 3) uint8 of a signal: rgb, edge, depth or seg."""
        if name == "rgb":
            return self.rgb[index]
        if name == "seg":
            B = len(index)
            batch = torch.arange(B, device=self.rgb.device).view(B, 1, 1, 1)
            return self.paint[index][batch, self.labels[index].long()]
        grey = {"edge": self.edges, "depth": self.depth}[name][index]
        return grey[..., None].expand(*grey.shape, 3)

    def held_out(self, share: float = 0.02, least: int = 4) -> int:
        """How many clips at the end are for measuring, not for training."""
        return min(max(least, round(share * len(self))), len(self) // 2)


def load(folder: Path, device: str, limit: int | None = None, seed: int = 0) -> Clips:
    """Clips of the shards that tools/data/make_dataset.py wrote, edges drawn, on a device.

    A shard is `*.npz` with rgb, depth and labels of n clips and a line of JSON for each in `*.jsonl` beside it.
    """
    paths, told, count = [], [], 0
    for path in sorted(folder.glob("*.npz")):
        lines = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines() if line]
        paths.append((path, count, len(lines)))
        told += lines
        count += len(lines)
        if limit is not None and count >= limit:
            break
    if not paths:
        raise SystemExit(
            f"{folder}: must hold training clips, got none. Make them with tools/data/make_dataset.py."
        )
    with np.load(paths[0][0], allow_pickle=False) as file:
        shape = (count, *file["rgb"].shape[1:])
    put = {name: torch.empty(shape[:-1], dtype=torch.uint8, device=device) for name in GREY}
    put["rgb"] = torch.empty(shape, dtype=torch.uint8, device=device)
    rng = np.random.default_rng(seed)
    paint = np.stack([palette(rng, line.get("background", [])) for line in told])
    presets = ["medium" if rng.random() < MEDIUM_EDGES else PRESETS[rng.integers(len(PRESETS))] for _ in told]

    def bring(shard: tuple[Path, int, int]) -> None:
        path, start, n = shard
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("rgb", "depth", "labels")}
        if len(arrays["rgb"]) != n:
            raise SystemExit(f"{path}: must have a line per clip, got {n} for {len(arrays['rgb'])}.")
        drawn = [edge(clip, presets[start + i], threads=1)[..., 0] for i, clip in enumerate(arrays["rgb"])]
        arrays["edges"] = np.stack(drawn)
        for name, array in arrays.items():
            put[name][start : start + n].copy_(torch.from_numpy(array))

    cv2.setNumThreads(1)
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        list(pool.map(bring, paths))
    put["paint"] = torch.from_numpy(paint).to(device)
    kept = {name: tensor[:limit] for name, tensor in put.items()}
    return Clips(**kept, captions=[str(line["caption"]) for line in told][:limit])


def palette(rng: np.random.Generator, background: object) -> np.ndarray:
    """A colour for each label, (256, 3) uint8: random hue, saturation above 0.1, value above 0.2; background black."""
    draws = zip(rng.uniform(0, 1, 256), rng.uniform(0.1, 1, 256), rng.uniform(0.2, 1, 256))
    table = (np.array([colorsys.hsv_to_rgb(*hsv) for hsv in draws]) * 255).astype(np.uint8)
    table[list(background)] = 0  # type: ignore[call-overload]
    return table


def pixels(frames: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, F, H, W, 3) uint8 -> (B, 3, F, H, W) in [-1, 1], rounded as `ops.normalized` does."""
    half = torch.full((), 127.5, dtype=dtype, device=frames.device)
    return frames.to(dtype).div(half).sub(1).permute(0, 4, 1, 2, 3)


# ---------------------------------------------------------------------------------------- vis and style


def blurred(frames: Tensor, preset: str) -> Tensor:
    """`cosmos_fast.controls.vis` on the device of frames (M, H, W, 3) uint8; equal within rounding.

    The two resizes follow OpenCV, the bilateral filter its 8-bit form: colour distance is the sum over channels,
    the window a disc, borders mirrored.
    """
    before, after = BLUR_FACTORS[preset]
    M, H, W, _ = frames.shape
    x = frames.permute(0, 3, 1, 2).float()
    if H % before or W % before:
        raise SystemExit(f"blur: height and width must be multiples of {before}, got {H}x{W}.")
    x = F.avg_pool2d(x, before).round() if before > 1 else x
    x = bilateral(x, BILATERAL["d"], BILATERAL["sigmaColor"], BILATERAL["sigmaSpace"]).round()
    x = F.interpolate(x, size=(H, W), mode="bilinear", align_corners=False).round().to(torch.uint8)
    x = _bicubic(x, (H // after, W // after))
    return _bicubic(x, (H, W)).permute(0, 2, 3, 1)


def bilateral(x: Tensor, d: int, sigma_color: float, sigma_space: float) -> Tensor:
    """Bilateral filter of (M, 3, H, W) fp32 in 0..255."""
    radius = d // 2
    H, W = x.shape[-2:]
    if radius >= min(H, W):
        raise SystemExit(f"bilateral: pictures must be larger than {radius}, got {H}x{W}.")
    padded = F.pad(x, (radius,) * 4, mode="reflect")
    total = torch.zeros_like(x[:, :1])
    out = torch.zeros_like(x)
    for dy in range(-radius, radius + 1):
        reach = int((radius**2 - dy**2) ** 0.5)
        rows = padded[:, :, radius + dy : radius + dy + H]
        for dx in range(-reach, reach + 1):
            near = rows[..., radius + dx : radius + dx + W]
            space = -(dx * dx + dy * dy) / (2 * sigma_space**2)
            distance = (near - x).abs_().sum(1, keepdim=True)
            weight = distance.square_().mul_(-0.5 / sigma_color**2).add_(space).exp_()
            total += weight
            out.addcmul_(near, weight)
    return out / total


def style_features(image: Tensor, tokens: int) -> Tensor:
    """What the network sees of a style image: the mean colours of a grid of patches, in [-1, 1].

    image (..., H, W, 3) uint8 -> (..., tokens, 48): sqrt(tokens) by sqrt(tokens) patches of 4 by 4 colours.
    """
    side = round(tokens**0.5)
    if side * side != tokens:
        raise SystemExit(f"style: image_tokens must be a square, got {tokens}.")
    lead = image.shape[:-3]
    x = image.reshape(-1, *image.shape[-3:]).permute(0, 3, 1, 2).float() / 127.5 - 1
    x = F.adaptive_avg_pool2d(x, 4 * side)
    x = x.reshape(-1, 3, side, 4, side, 4).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(*lead, tokens, 48)
