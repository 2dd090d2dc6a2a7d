"""From a clip to chunks and their constants: plan, padding, seeds, weight maps, guided maps.

Shape letters: F video frames, H W pixels, T latent frames, h w latent rows and columns, M control branches.
Everything here is exact arithmetic on small inputs: no file but a label mask is opened, no global random
state is read or changed.
"""

from __future__ import annotations

import random
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .formats import CHUNK_FRAMES, PATCH, SPATIAL, TEMPORAL, MediaError, SpecError, latent_frames

SEED_LIMIT = 1_000_000
"""Chunk seeds are drawn uniformly from 0..SEED_LIMIT, both ends included."""

Frames = TypeVar("Frames", np.ndarray, Tensor)


# ---------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Chunk:
    """One generated piece of a clip.

    `start`, `stop`: the source frames it looks at. `length`: its frames once padded to the network's size.
    `drop`: leading frames that repeat the end of the chunk before. `keep`: frames it adds to the finished
    clip; they are `decoded[chunk.kept]`.
    """

    index: int
    start: int
    stop: int
    drop: int
    keep: int
    length: int

    @property
    def kept(self) -> slice:
        """The frames of this chunk that belong to the finished clip."""
        return slice(self.drop, self.drop + self.keep)


def chunk_plan(frames: int, chunk_frames: int = CHUNK_FRAMES, overlap: int = 1) -> list[Chunk]:
    """Cut `frames` source frames into chunks that each repeat `overlap` frames of the one before.

    Over the plan sum(keep) == frames, except in image mode: with chunk_frames == 1 there is exactly one chunk
    of one frame however long the source is, and `overlap` plays no part.
    Raises MediaError for an empty clip, SpecError for a chunk length or overlap that cannot work.
    """
    if frames < 1:
        raise MediaError(f"frames: a clip needs at least one frame, got {frames}.")
    if chunk_frames < 1 or chunk_frames % TEMPORAL != 1:
        raise SpecError(
            f"num_video_frames_per_chunk: must be 4k+1, got {chunk_frames}. "
            f"The published networks work with {CHUNK_FRAMES}, or 1 for an image."
        )
    if overlap < 0:
        raise SpecError(f"num_conditional_frames: must not be negative, got {overlap}.")
    if chunk_frames == 1:
        return [Chunk(index=0, start=0, stop=1, drop=0, keep=1, length=1)]
    if overlap >= chunk_frames:
        raise SpecError(f"num_conditional_frames: must be below the chunk's {chunk_frames}, got {overlap}.")

    stride = chunk_frames - overlap
    count = 1 if frames <= chunk_frames else 1 + -(-(frames - chunk_frames) // stride)
    plan = []
    for index in range(count):
        start, drop = index * stride, overlap if index else 0
        stop = min(start + chunk_frames, frames)
        plan.append(Chunk(index, start, stop, drop, stop - start - drop, chunk_frames))
    return plan


def conditional_latents(chunk_index: int, num_conditional_frames: int) -> int:
    """Latent frames at the head of a chunk that are given, not generated: none in the first chunk.

    One latent frame covers the first pixel frame alone, so 1 and 2 conditional frames both give 1.
    """
    return 0 if chunk_index == 0 else 1 + (num_conditional_frames - 1) // TEMPORAL


def mirror_index(n: int, length: int) -> list[int]:
    """Source frame for each frame of an n-frame clip extended to `length` frames.

    The clip grows by its own reversal without the last element, again and again: the last frame is shown
    twice in a row and frame 0 never returns (0 1 2 2 1 1 2 2 1 ...). Not numpy's or torch's "reflect".
    A single frame is repeated. A clip that is long enough already stays as it is.
    """
    if n < 1:
        raise MediaError(f"padding: a clip needs at least one frame to extend, got {n}.")
    index = list(range(n))
    if n == 1:
        return [0] * max(length, 1)
    while len(index) < length:
        index += index[:0:-1][: length - len(index)]
    return index


def pad(frames: Frames, length: int) -> Frames:
    """Extend a clip along its first axis (array or tensor) to `length` frames by `mirror_index`."""
    n = len(frames)
    index = mirror_index(n, length)
    return frames if len(index) == n else frames[index]


def seed_chain(seed: int, n: int) -> list[int]:
    """The sampling seeds of chunks 0..n-1; each link is drawn from a generator seeded with the link before.

    The user's seed is never used for sampling itself. A negative seed gives the chain of its absolute value.
    """
    seeds = []
    for _ in range(n):
        seed = random.Random(seed).randint(0, SEED_LIMIT)
        seeds.append(seed)
    return seeds


# -------------------------------------------------------------------------------------------- pixels


def is_black(control: np.ndarray | Tensor) -> bool:
    """True when every pixel of this chunk's control is black (uint8 0, or -1 in model range).

    The network gets a zero latent for such a control, not the encoding of black.
    """
    black = 0 if str(control.dtype).endswith("uint8") else -1
    return all(bool((frame == black).all()) for frame in control)  # most are known by their first frame


# ------------------------------------------------------------------------------------------- weights


def weight_vector(names: Sequence[str], weights: Mapping[str, float]) -> list[float]:
    """One weight per branch of a network whose branches are `names`; 0 where the request has no such control.

    Scalar weights are used as given: they are not scaled down when their sum passes 1.
    Raises SpecError if `weights` names a control that the network has no branch for.
    """
    _check_branches(names, weights)
    return [float(weights.get(name, 0.0)) for name in names]


def weight_maps(
    masks: Mapping[str, np.ndarray | Tensor | None],
    weights: Mapping[str, float],
    names: Sequence[str],
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor | None:
    """Weight of each control branch at each token, or None if every mask is absent or all true.

    map = weight * mask brought to the token grid, then scaled by 1 / max(1, sum over branches). A
    control without a mask has a constant map, a branch without a control has zeros. The cap applies only
    here: one real mask therefore also changes the weights of the unmasked controls when the sum passes 1.

    Shapes: masks bool (F, H, W), one chunk after padding, F = 4k+1, H W multiples of 16; returns
    (M, T, H/16, W/16) in `dtype`. Every step is rounded to `dtype`. CPU.
    """
    _check_branches(names, weights)
    shapes, active = set(), {}
    for name, mask in masks.items():
        if mask is None:
            continue
        if name not in weights:
            raise SpecError(f"{name}: a mask needs its control, got a mask for {name!r} without a weight.")
        mask = torch.as_tensor(mask)
        if mask.dtype != torch.bool or mask.ndim != 3:
            raise ValueError(
                f"weight_maps: masks must be bool (F, H, W), got {mask.dtype} {tuple(mask.shape)}."
            )
        shapes.add(tuple(mask.shape))
        if not mask.all():
            active[name] = mask
    if len(shapes) > 1:
        raise ValueError(f"weight_maps: masks must have one shape, got {sorted(shapes)}.")
    if not active:
        return None

    frames, height, width = shapes.pop()
    grid = latent_frames(frames), height // (SPATIAL * PATCH), width // (SPATIAL * PATCH)
    maps = torch.zeros(len(names), *grid, dtype=dtype)
    for row, weight in zip(maps, weight_vector(names, weights), strict=True):
        row.fill_(weight)
    for name, mask in active.items():
        m = names.index(name)
        # The rounded weight is averaged in fp32, as trilinear interpolation of bf16 does inside.
        maps[m] = _downsample(mask, SPATIAL * PATCH, scale=float(maps[m, 0, 0, 0])).to(dtype)
    # Times the rounded reciprocal, not a division: in bf16 the two differ, and the networks see the former.
    cap = 1 / maps.sum(0).clamp_(min=1)
    return maps * cap


def guided_map(mask: np.ndarray | Tensor) -> Tensor:
    """Strength of the guided region per latent element, the same for all latent channels.

    Shapes: mask (F, H, W) float in [0, 1], one chunk after padding, F = 4k+1, H W multiples of 8; returns
    (T, H/8, W/8) fp32.
    """
    mask = torch.as_tensor(mask)
    if mask.ndim != 3 or not (mask.is_floating_point() or mask.dtype == torch.bool):
        raise ValueError(f"guided_map: mask must be float (F, H, W), got {mask.dtype} {tuple(mask.shape)}.")
    return _downsample(mask, SPATIAL)


def _downsample(x_FHW: Tensor, block: int, scale: float = 1.0) -> Tensor:
    """Trilinear resize to (T, H/block, W/block), fp32: frame 0 alone, then every four frames to one.

    Half-pixel centres fall between the two middle elements, so each output is the mean of the middle 2x2 of a
    block in the middle two frames of a group. Those are gathered first: a few per cent of the clip.
    """
    frames, height, width = x_FHW.shape
    if height % block or width % block:
        raise ValueError(f"masks: height and width must be multiples of {block}, got {height}x{width}.")
    groups = latent_frames(frames) - 1
    rows, columns = _middle(height // block, block), _middle(width // block, block)

    def resize(time: list[int], to: int) -> Tensor:
        x = x_FHW[time][:, rows][:, :, columns].float() * scale
        size = (to, height // block, width // block)
        return interpolate(x[None, None], size=size, mode="trilinear", align_corners=False)[0, 0]

    parts = [resize([0], 1)]
    if groups:
        parts.append(resize([1 + i for i in _middle(groups, TEMPORAL)], groups))
    return torch.cat(parts)


def _middle(blocks: int, block: int) -> list[int]:
    return [i * block + offset for i in range(blocks) for offset in (block // 2 - 1, block // 2)]


def _check_branches(names: Sequence[str], weights: Mapping[str, float]) -> None:
    if unknown := [name for name in weights if name not in names]:
        raise SpecError(
            f"controls: the loaded network has branches {', '.join(names)}, got {', '.join(unknown)}. "
            "Load the network that has them."
        )


# --------------------------------------------------------------------------------------- label masks


def read_label_mask(path: str | Path, labels: Iterable[int] | None = None) -> np.ndarray:
    """Read an .npz label mask: uint8 (F, H, W), 255 in the guided region, at the file's own size.

    The file holds `arr_0` (F, H, W), boolean or numbers. Without `labels` everything but 0 counts; with
    `labels` only those values do. Raises MediaError, also if none of the labels occurs. Never unpickles.
    """
    path = Path(path)
    wanted = None if labels is None else sorted(set(labels))
    if wanted == []:
        raise SpecError(
            "guided_generation_foreground_labels: must name a label, got []. Leave it out for all."
        )
    try:
        archive = np.load(path, allow_pickle=False)
        names = [] if isinstance(archive, np.ndarray) else archive.files
        array = archive["arr_0"] if "arr_0" in names else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise MediaError(f"{path}: must be an .npz archive of plain numbers, got {error}.") from error
    if not isinstance(archive, np.ndarray):
        archive.close()
    if array is None:
        found = ", ".join(names) or "none"
        raise MediaError(
            f"{path}: must hold an array named arr_0, got {found}. Save it with numpy.savez(path, labels)."
        )
    if not isinstance(array, np.ndarray):  # numpy hands out a member that is no array as bytes
        raise MediaError(f"{path}: arr_0 must be an array of numbers, got {len(array)} bytes of other data.")
    if array.ndim != 3 or 0 in array.shape:
        raise MediaError(f"{path}: arr_0 must be (frames, height, width), got shape {array.shape}.")
    if array.dtype.kind not in "buif" or (array.dtype.kind == "f" and not np.isfinite(array).all()):
        raise MediaError(f"{path}: arr_0 must be boolean or finite numbers, got {array.dtype}.")
    region = array != 0
    if wanted is not None:
        region &= np.isin(array, wanted)
        if not region.any():
            present = ", ".join(f"{value:g}" for value in np.unique(array)[:16])
            raise MediaError(f"{path}: must contain one of the labels {wanted}, got only {present}.")
    return np.where(region, np.uint8(255), np.uint8(0))
