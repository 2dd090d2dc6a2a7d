"""Weights in few bits: integer codes with one scale per group, packed without gaps, read back as fp32.

A packed file is safetensors. A matrix `name` is two tensors there, `name` (uint8, the packed codes) and
`name:scale` (fp16, one per group, relative to the largest value of the tensor); its shape, bits, group and
largest value stand in the metadata. Small and one-dimensional tensors stay fp32. Codes are symmetric: with
b bits they run from -(2^(b-1) - 1) to 2^(b-1) - 1, so that zero is exact.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from cosmos_fast.formats import CheckpointError
from cosmos_fast.safetensors_file import open_safetensors, write_safetensors

FORMAT: Final = "cosmos-fast packed 1"
BITS: Final = (3, 4, 5, 6, 8)
_SMALL: Final = 1024
_SHRINKS: Final = tuple(1 - k / 40 for k in range(13))


@dataclass(frozen=True)
class Packed:
    """One tensor in few bits. codes: packed uint8; scales: fp16, one per group: times `top` the value of the code 2^(b-1) - 1.

    group: values that share a scale, counted along the flattened tensor; 0 gives each row (first axis) its own.
    """

    shape: tuple[int, ...]
    bits: int
    group: int
    top: float
    codes: Tensor
    scales: Tensor

    @property
    def bytes(self) -> int:
        return self.codes.numel() + 2 * self.scales.numel()


def pack(tensor: Tensor, bits: int, group: int = 0) -> Packed:
    """Quantise one tensor; with fewer than 8 bits each group's scale is the best of several clipped ones.

    Raises ValueError for an unknown number of bits and for values that are not finite.
    """
    if bits not in BITS:
        raise ValueError(f"pack: bits must be one of {', '.join(map(str, BITS))}, got {bits}.")
    if not bool(tensor.isfinite().all()):
        raise ValueError("pack: values must be finite, got infinities or NaN.")
    x_GN = _groups(tensor.detach().to("cpu", torch.float32), group)
    top, limit = float(x_GN.abs().max()), 2 ** (bits - 1) - 1
    peak = x_GN.abs().amax(1, keepdim=True) / (top or 1.0)
    best_scale, best_error = torch.zeros_like(peak), torch.full_like(peak, math.inf)
    for shrink in _SHRINKS if bits < 8 else (1.0,):
        # Rounded to what is stored before the codes are chosen, so that they fit the scale they will meet.
        scale = (peak * shrink).half().float()
        step = scale * (top / limit)
        error = (_round(x_GN, step, limit) * step - x_GN).square().sum(1, keepdim=True)
        better = error < best_error
        best_scale, best_error = (
            torch.where(better, scale, best_scale),
            torch.where(better, error, best_error),
        )
    codes = (_round(x_GN, best_scale * (top / limit), limit) + limit).to(torch.uint8).numpy().reshape(-1, 1)
    stream = np.packbits(np.unpackbits(codes, axis=1)[:, 8 - bits :])
    shape = tuple(tensor.shape)
    return Packed(shape, bits, group, top, torch.from_numpy(stream), best_scale[:, 0].half())


def unpack(packed: Packed) -> Tensor:
    """The tensor that `pack` stood for, fp32."""
    groups, bits = packed.scales.numel(), packed.bits
    count = math.prod(packed.shape)
    per_group = packed.group or count // groups
    stream = np.unpackbits(packed.codes.numpy())[: groups * per_group * bits].reshape(-1, bits)
    codes = np.packbits(np.pad(stream, ((0, 0), (8 - bits, 0))), axis=1)
    limit = 2 ** (bits - 1) - 1
    centred = torch.from_numpy(codes).view(groups, per_group).float() - limit
    values = centred * (packed.scales.float() * (packed.top / limit))[:, None]
    return values.view(-1)[:count].reshape(packed.shape)


def _groups(x: Tensor, group: int) -> Tensor:
    if not group:
        return x.reshape(x.shape[0], -1)
    return torch.nn.functional.pad(x.reshape(-1), (0, -x.numel() % group)).view(-1, group)


def _round(x: Tensor, scale: Tensor, limit: int) -> Tensor:
    return torch.where(scale > 0, x / scale, torch.zeros_like(x)).round_().clamp_(-limit, limit)


def write_packed(
    path: str | Path, tensors: Mapping[str, Tensor], bits: int, group: int = 0, metadata: Mapping[str, str] | None = None
) -> Path:  # fmt: skip
    """Write tensors as one packed file: matrices in `bits`, what is small or has one axis in fp32."""
    stored: dict[str, Tensor] = {}
    layout: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or tensor.numel() < _SMALL:
            stored[name] = tensor.detach().float()
            continue
        one = pack(tensor, bits, group)
        stored[name], stored[f"{name}:scale"] = one.codes, one.scales
        layout[name] = {"shape": list(one.shape), "bits": one.bits, "group": one.group, "top": one.top}
    # Wide types first: every tensor then starts at a multiple of its own size.
    ordered = dict(sorted(stored.items(), key=lambda item: -item[1].dtype.itemsize))
    return write_safetensors(
        path, ordered, {"format": FORMAT, "layout": json.dumps(layout), **(metadata or {})}
    )


def read_packed(path: str | Path) -> dict[str, Tensor]:
    """Name -> fp32 tensor of a packed file. Raises CheckpointError for anything else."""
    file = open_safetensors(Path(path))
    if file.metadata.get("format") != FORMAT:
        found = file.metadata.get("format", "no format")
        raise CheckpointError(f"{path}: must be {FORMAT!r}, got {found!r}.")
    try:
        layout = json.loads(file.metadata["layout"])
        return {
            name: _read(file.tensors, name, layout.get(name))
            for name in file.tensors
            if not name.endswith(":scale")
        }
    except (KeyError, TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: packed weights are damaged, got {error!r}.") from None


def _read(tensors: Mapping[str, Any], name: str, entry: Mapping[str, Any] | None) -> Tensor:
    if entry is None:
        return tensors[name].load().clone()
    codes, scales = tensors[name].load(), tensors[f"{name}:scale"].load()
    shape = tuple(entry["shape"])
    return unpack(Packed(shape, entry["bits"], entry["group"], entry["top"], codes, scales))
