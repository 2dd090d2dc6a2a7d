"""Torch's own weight files as lazy tensors: zip files (.pt), old pickles, distributed checkpoints.

Pickled code never runs: see safe_pickle.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosmos_fast import safe_pickle
from cosmos_fast.formats import CheckpointError
from cosmos_fast.safe_pickle import Maker, Record, record
from cosmos_fast.safetensors_file import LazyTensor, TensorFile, map_file, typed


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies: element offset, size and stride inside a storage."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _rebuild(storage: Any, offset: Any, size: Any, stride: Any, *unused: Any) -> _Stored:
    numbers = [offset, *size, *stride]
    if not isinstance(storage, _Storage) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError("tensor with a malformed size")
    if len(size) != len(stride):
        raise ValueError("tensor whose size and stride differ in length")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and last >= storage.numel:
        raise ValueError("tensor that reaches past its storage")
    return _Stored(storage, offset, tuple(size), tuple(stride))


_DTYPES: dict[str, torch.dtype] = {
    f"torch.{name}": getattr(torch, name)
    for name in (
        "bfloat16", "float16", "float32", "float64", "int64", "int32", "int16", "int8", "uint8", "bool",
        "float8_e4m3fn", "float8_e5m2",
    )
}  # fmt: skip

_TORCH_TABLE: dict[str, Any] = {
    "collections.OrderedDict": Maker(OrderedDict),
    "torch._utils._rebuild_tensor_v2": Maker(_rebuild),
    "torch._utils._rebuild_parameter": Maker(lambda data, *unused: data),
    "torch.Size": Maker(tuple),
    "torch.device": record("device"),
    # Extra state of Transformer Engine modules: a byte stream, itself a pickle. Kept closed.
    "_io.BytesIO": record("BytesIO"),
    "io.BytesIO": record("BytesIO"),
    "_codecs.encode": record("bytes"),
    **_DTYPES,
    **{
        f"torch.{name}Storage": dtype
        for name, dtype in {
            "BFloat16": torch.bfloat16, "Half": torch.float16, "Float": torch.float32,
            "Double": torch.float64, "Long": torch.int64, "Int": torch.int32, "Short": torch.int16,
            "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
        }.items()
    },
    "torch.storage.UntypedStorage": torch.uint8,
}  # fmt: skip


class _Window(io.RawIOBase):
    """A byte range of a file as a file of its own, so that a zip inside a shard reads like one on disk."""

    def __init__(self, path: Path, start: int, length: int) -> None:
        self._file = path.open("rb")
        self._start, self._length, self._at = start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError("seek before the start")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        data = self._file.read(max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def _read_zip(path: Path, raw: Tensor, start: int, length: int) -> Any:
    """The object of a torch zip file that lies in bytes [start, start + length) of `path`.

    Tensors come back as LazyTensor. Raises CheckpointError naming the file.
    """
    try:
        with _Window(path, start, length) as window, zipfile.ZipFile(window) as archive:
            entries = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise CheckpointError(
                    f"{path}: is a zip archive but not a torch weight file. Name the .pt file."
                )
            root = pickles[0].removesuffix("data.pkl")
            data = archive.read(pickles[0])
            order = archive.read(f"{root}byteorder") if f"{root}byteorder" in entries else b"little"
            if order != b"little":
                raise CheckpointError(f"{path}: byte order must be little, got {order[:20]!r}.")
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is cut short or damaged ({error}). Download it again.") from None

    def storage(pid: Any) -> _Storage:
        match pid:
            case ("storage", torch.dtype() as dtype, str() as key, _, int() as numel) if numel >= 0:
                return _Storage(key, dtype, numel)
        raise ValueError(f"unexpected storage reference {str(pid)[:80]}")

    def lazy(stored: _Stored) -> LazyTensor:
        key, dtype, numel = stored.storage.key, stored.storage.dtype, stored.storage.numel
        nbytes = numel * dtype.itemsize
        if nbytes == 0 or 0 in stored.size:
            return LazyTensor(stored.size, dtype, lambda: torch.empty(stored.size, dtype=dtype))
        info = entries.get(f"{root}data/{key}")
        if info is None or info.file_size != nbytes or info.compress_type != zipfile.ZIP_STORED:
            got = "no entry" if info is None else f"{info.file_size} bytes"
            raise CheckpointError(
                f"{path}: data/{key} must hold {nbytes} plain bytes, got {got}. Download again."
            )
        header = start + info.header_offset
        if header + 30 > start + length:
            raise CheckpointError(f"{path}: data/{key} lies outside the file. Download again.")
        name_length, extra_length = struct.unpack("<HH", bytes(raw[header + 26 : header + 30].tolist()))
        begin = header + 30 + name_length + extra_length
        if begin + nbytes > start + length:
            raise CheckpointError(f"{path}: data/{key} is cut short. Download again.")

        def load() -> Tensor:
            flat = typed(raw, begin, nbytes, dtype)
            return flat.as_strided(stored.size, stored.stride, flat.storage_offset() + stored.offset)

        return LazyTensor(stored.size, dtype, load)

    def walk(value: Any, depth: int) -> Any:
        if isinstance(value, _Stored):
            return lazy(value)
        if isinstance(value, dict) and depth:  # depth: a hostile dictionary may hold itself
            return {k: walk(v, depth - 1) for k, v in value.items()}
        return value

    try:
        return walk(safe_pickle.load(data, _TORCH_TABLE, storage), 2)
    except safe_pickle.UnsafePickle as error:
        raise safe_pickle.UnsafePickle(error.name, path) from None
    except safe_pickle.DamagedPickle as error:
        raise CheckpointError(f"{path}: {error}") from None


def open_zip(path: Path) -> TensorFile:
    raw = map_file(path)
    return _from_state_dict(path, _read_zip(path, raw, 0, len(raw)))


def open_legacy(path: Path) -> TensorFile:
    """Files torch wrote before 1.6: no map, so torch's own tensors-only reader takes them into memory."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch reports unsafe globals, truncation and foreign pickles alike, by several exception types.
        reason = str(error).splitlines()[0][:200]
        raise CheckpointError(
            f"{path}: cannot be read as tensors only ({reason}). It was not opened."
        ) from None
    if isinstance(state, dict):
        state = {k: _in_memory(v) if isinstance(v, Tensor) else v for k, v in state.items()}
    return _from_state_dict(path, state)


def _in_memory(tensor: Tensor) -> LazyTensor:
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def _from_state_dict(path: Path, state: Any) -> TensorFile:
    if isinstance(state, dict) and not any(isinstance(v, LazyTensor) for v in state.values()):
        inner = [state[k] for k in ("state_dict", "model", "module", "ema") if isinstance(state.get(k), dict)]
        state = inner[0] if len(inner) == 1 else state
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: must hold a state dict, got {type(state).__name__}.")
    tensors = {str(k): v for k, v in state.items() if isinstance(v, LazyTensor)}
    metadata = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, str)}
    skipped = tuple(str(k) for k in state if k not in tensors and k not in metadata)
    return TensorFile(path, "pt", tensors, skipped, metadata)


# ---------------------------------------------------------------------------------- distributed checkpoints

_METADATA = "torch.distributed.checkpoint.metadata"
_DCP_TABLE: dict[str, Any] = {
    **_TORCH_TABLE,
    **{
        f"{_METADATA}.{name}": record(name)
        for name in (
            *("Metadata", "StorageMeta", "MetadataIndex", "TensorStorageMetadata", "TensorProperties"),
            *("BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
        )
    },
    "torch.distributed.checkpoint.filesystem._StorageInfo": record("_StorageInfo"),
    "torch.distributed.checkpoint.filesystem._StoragePrefix": record("_StoragePrefix"),
    "torch.serialization._get_layout": record("layout"),
    **{
        f"{module}.{name}": record("path")
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "Path")
    },
}


def open_dcp(folder: Path) -> TensorFile:
    """Open a distributed checkpoint folder: `.metadata` and the shards it names."""
    try:
        root = safe_pickle.load((folder / ".metadata").read_bytes(), _DCP_TABLE)
        described, stored = _fields(root, "Metadata", "state_dict_metadata", "storage_data")
        places: dict[tuple[str, tuple[int, ...]], tuple[str, int, int]] = {}
        for index, info in stored.items():
            (name,) = _fields(index, "MetadataIndex", "fqn")
            offset = index.state.get("offset")  # absent for what is not a tensor
            file, begin, length = _fields(info, "_StorageInfo", "relative_path", "offset", "length")
            if info.state.get("transform_descriptors"):
                raise ValueError(f"'{name}' is stored through a transform")
            if Path(file).name != file:
                raise ValueError(f"shard {file!r} is not beside .metadata")
            places[name, tuple(offset or ())] = (file, begin, length)
        tensors: dict[str, LazyTensor] = {}
        skipped = []
        for name, meta in described.items():
            if not isinstance(meta, Record) or meta.name != "TensorStorageMetadata":
                skipped.append(str(name))
                continue
            properties, size, chunks = _fields(meta, meta.name, "properties", "size", "chunks")
            dtype = properties.state[0] if isinstance(properties.state, tuple) else properties.state["dtype"]
            boxes = [_fields(chunk, "ChunkStorageMetadata", "offsets", "sizes") for chunk in chunks]
            pieces = [(begin, length, places[name, tuple(begin)]) for begin, length in boxes]
            tensors[name] = _sharded(folder, name, tuple(size), dtype, pieces)
    except safe_pickle.UnsafePickle as error:
        raise safe_pickle.UnsafePickle(error.name, folder / ".metadata") from None
    except safe_pickle.DamagedPickle as error:
        raise CheckpointError(f"{folder / '.metadata'}: {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{folder / '.metadata'}: is not a readable DCP index ({error}).") from None
    shards = sorted({file for file, _, _ in places.values()})
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise CheckpointError(
            f"{folder}: shards are missing: {', '.join(missing[:10])}. Copy the whole folder."
        )
    return TensorFile(folder, "dcp", tensors, tuple(skipped))


def _fields(value: Any, name: str, *fields: str) -> list[Any]:
    if not isinstance(value, Record) or value.name != name or not isinstance(value.state, dict):
        raise ValueError(f"expected {name}, got {getattr(value, 'name', type(value).__name__)}")
    return [value.state[field] for field in fields]


def _sharded(
    folder: Path,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    pieces: list[tuple[Any, Any, tuple[str, int, int]]],
) -> LazyTensor:
    covered = sum(math.prod(sizes) for _, sizes, _ in pieces)
    if covered != math.prod(shape):
        raise ValueError(f"chunks of '{name}' cover {covered} of {math.prod(shape)} elements")

    def load() -> Tensor:
        whole = torch.empty(shape, dtype=dtype)
        for offsets, sizes, (file, begin, length) in pieces:
            path = folder / file
            piece = _read_zip(path, map_file(path), begin, length)
            if not isinstance(piece, LazyTensor) or piece.shape != tuple(sizes) or piece.dtype != dtype:
                raise CheckpointError(f"{path}: '{name}' does not hold the chunk its index describes.")
            box = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
            whole[box] = piece.load()
        return whole

    return LazyTensor(shape, dtype, load)
