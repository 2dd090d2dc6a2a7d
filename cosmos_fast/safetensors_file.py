"""Lazy tensors over a memory map, and the safetensors files they are read from and written to."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosmos_fast.formats import CheckpointError

SAFETENSORS_DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


SCALE = "_scale"
"""What the name of an 8-bit matrix gets for the scales of its rows: value = code * scale."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor still on disk. `load` returns a view of the memory map: copy before writing or keeping.

    scale: of a matrix of e4m3 codes, the fp32 scales (rows,) beside it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor] = field(repr=False)
    scale: LazyTensor | None = field(default=None, repr=False)


@dataclass(frozen=True)
class TensorFile:
    """An opened weight file. `skipped` names entries that are not tensors, `metadata` is the file's own."""

    path: Path
    format: str
    tensors: dict[str, LazyTensor]
    skipped: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)


def map_file(path: Path) -> Tensor:
    return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)


def typed(raw: Tensor, start: int, length: int, dtype: torch.dtype) -> Tensor:
    part = raw[start : start + length]
    # A view as a wider type needs an aligned start, which some writers do not give.
    return (part.clone() if start % dtype.itemsize else part).view(dtype)


def open_safetensors(path: Path) -> TensorFile:
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
        if length > min(size - 8, 100_000_000):
            raise CheckpointError(
                f"{path}: is neither a torch file nor safetensors, or its safetensors header is damaged "
                f"(header of {length} bytes in a file of {size}). Download it again."
            )
        header = file.read(length)
    try:
        entries = json.loads(header)
        metadata = entries.pop("__metadata__", {})
        spans = sorted(_spans(path, entries), key=lambda span: span[3:])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: safetensors header damaged ({error}). Download it again.") from None
    at = 0
    for name, _, _, begin, end in spans:
        if begin != at:
            kind = "overlaps another" if begin < at else "leaves a gap"
            raise CheckpointError(f"{path}: safetensors header damaged: '{name}' {kind} at byte {begin}.")
        at = end
    if at != size - 8 - length:
        kind = "cut short" if at > size - 8 - length else "followed by extra bytes"
        raise CheckpointError(
            f"{path}: is {kind}: tensors need {at} bytes, got {size - 8 - length}. Download it again."
        )
    raw = map_file(path)
    tensors = {span[0]: _span_tensor(raw, 8 + length, *span[1:]) for span in spans}
    return TensorFile(path, "safetensors", tensors, (), dict(metadata))


def _spans(
    path: Path, entries: dict[str, Any]
) -> Iterator[tuple[str, torch.dtype, tuple[int, ...], int, int]]:
    for name, entry in entries.items():
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise CheckpointError(f"{path}: '{name}' has dtype {entry['dtype']!r}, which is not read.")
        dtype, shape = SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        if any(type(n) is not int or n < 0 for n in (*shape, begin, end)):
            raise ValueError(f"'{name}' has a malformed shape or offset")
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"'{name}' of shape {shape} does not fill its {end - begin} bytes")
        yield name, dtype, shape, begin, end


def _span_tensor(
    raw: Tensor, base: int, dtype: torch.dtype, shape: tuple[int, ...], begin: int, end: int
) -> LazyTensor:
    return LazyTensor(shape, dtype, lambda: typed(raw, base + begin, end - begin, dtype).view(shape))


def open_index(path: Path) -> TensorFile:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: is not a safetensors index ({error!r}). Download it again.") from None
    for shard in shards:
        if Path(shard).name != shard:
            raise CheckpointError(f"{path}: shards must lie beside the index, got {shard!r}.")
    missing = [shard for shard in shards if not (path.parent / shard).is_file()]
    if missing:
        raise CheckpointError(f"{path}: shards are missing: {', '.join(missing[:10])}. Download them too.")
    files = {shard: open_safetensors(path.parent / shard) for shard in shards}
    absent = [name for name, shard in weight_map.items() if name not in files[shard].tensors]
    if absent:
        raise CheckpointError(f"{path}: shards lack tensors of the index: {', '.join(absent[:10])}.")
    tensors = {name: files[shard].tensors[name] for name, shard in weight_map.items()}
    metadata = {k: v for file in files.values() for k, v in file.metadata.items()}
    return TensorFile(path, "safetensors", tensors, (), metadata)


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, LazyTensor | Tensor],
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a safetensors file tensor by tensor; those of 16 bits and more are cast to `dtype` when one is given.

    One tensor is in memory at a time. The file appears under its name only when complete.
    """
    path = Path(path)
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, tensor in tensors.items():
        is_kept = not tensor.dtype.is_floating_point or tensor.dtype.itemsize == 1 or name.endswith(SCALE)
        kind = tensor.dtype if dtype is None or is_kept else dtype
        end = at + math.prod(tensor.shape) * kind.itemsize
        header[name] = {"dtype": names[kind], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name, tensor in tensors.items():
                value = tensor.load() if isinstance(tensor, LazyTensor) else tensor
                kind = next(d for n, d in SAFETENSORS_DTYPES.items() if n == header[name]["dtype"])
                value = value.detach().to("cpu", kind).contiguous().reshape(-1)
                if value.numel():
                    file.write(value.view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path
