"""Containers of weights: every reader against the library that writes it, and every damaged or hostile file."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cosmos_fast import safe_pickle
from cosmos_fast.formats import CheckpointError
from cosmos_fast.safetensors_file import write_safetensors
from cosmos_fast.weight_file import open_tensors

STATE = {
    "net.a.weight": torch.arange(12.0).view(3, 4).bfloat16(),
    "net.b.bias": torch.linspace(-1, 1, 5),
    "net.c": torch.tensor(7),
    "net.d": torch.ones(2, 3, dtype=torch.float16),
    "net.empty": torch.empty(0, dtype=torch.uint8),
}


def assert_holds(file, state) -> None:
    assert set(file.tensors) == set(state)
    for name, tensor in state.items():
        lazy = file.tensors[name]
        assert (lazy.shape, lazy.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(lazy.load(), tensor)


def save_dcp(folder: Path, state: dict) -> Path:
    import torch.distributed.checkpoint as dcp

    with pytest.warns(UserWarning):
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


# ------------------------------------------------------------------------------------------------- readers


@pytest.mark.parametrize("is_zip", [True, False])
def test_torch_files(tmp_path, is_zip):
    path = tmp_path / "x.pt"
    torch.save(STATE, path, _use_new_zipfile_serialization=is_zip)
    assert_holds(open_tensors(path), STATE)


def test_torch_file_with_what_training_leaves_in_it(tmp_path):
    """Extra state as byte streams, parameters, views, shared storage and an ordered dict with attributes."""
    base = torch.arange(24.0).view(4, 6)
    state = OrderedDict(
        weight=torch.nn.Parameter(base.clone()), row=base[2], transposed=base.t(), block=base[1:3, 2:5]
    )
    state._metadata = {"": {"version": 1}}
    state["norm._extra_state"] = io.BytesIO(pickle.dumps({"recipe": 1}))
    state["attn._extra_state"] = torch.empty(0, dtype=torch.uint8)
    state["none"], state["note"] = None, "text"
    torch.save(state, tmp_path / "x.pt")
    file = open_tensors(tmp_path / "x.pt")
    tensors = {k: v.detach() for k, v in state.items() if isinstance(v, torch.Tensor)}
    assert_holds(file, tensors)
    assert set(file.skipped) == {"norm._extra_state", "none"}
    assert file.metadata == {"note": "text"}


def test_wrapped_state_dict_is_unwrapped(tmp_path):
    torch.save({"state_dict": STATE, "step": 3}, tmp_path / "x.pt")
    assert_holds(open_tensors(tmp_path / "x.pt"), STATE)


def test_safetensors_file_and_shards(tmp_path):
    save_file(STATE, tmp_path / "whole.safetensors", {"who": "us"})
    file = open_tensors(tmp_path / "whole.safetensors")
    assert_holds(file, STATE)
    assert file.metadata == {"who": "us"}

    folder = tmp_path / "shards"
    folder.mkdir()
    names = sorted(STATE)
    where = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for shard in set(where.values()):
        save_file({n: STATE[n] for n in names if where[n] == shard}, folder / shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert_holds(open_tensors(folder), STATE)
    (folder / "part-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shards are missing: part-1\.safetensors"):
        open_tensors(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../whole.safetensors"}}))
    with pytest.raises(CheckpointError, match="beside the index"):
        open_tensors(index)


def test_our_writer_is_read_by_the_library(tmp_path):
    path = write_safetensors(tmp_path / "x.safetensors", STATE, {"k": "v"}, torch.float32)
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, STATE[name].float() if STATE[name].is_floating_point() else STATE[name])
    assert not list(tmp_path.glob("*.part"))


def test_writer_leaves_nothing_when_it_fails(tmp_path):
    def broken():
        raise CheckpointError("no")

    save_file(STATE, tmp_path / "x.safetensors")
    lazy = open_tensors(tmp_path / "x.safetensors").tensors
    lazy["net.b.bias"] = replace(lazy["net.b.bias"], load=broken)
    with pytest.raises(CheckpointError, match="no"):
        write_safetensors(tmp_path / "y.safetensors", lazy, {})
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_dcp(tmp_path):
    state = {**STATE, "net.x._extra_state": io.BytesIO(b"hi")}
    save_dcp(tmp_path / "model", state)
    for folder in (tmp_path, tmp_path / "model"):
        file = open_tensors(folder)
        assert_holds(file, STATE)
        assert file.skipped == ("net.x._extra_state",)
    next((tmp_path / "model").glob("*.distcp")).unlink()
    with pytest.raises(CheckpointError, match="shards are missing"):
        open_tensors(tmp_path)


def test_dcp_tensor_in_chunks(tmp_path):
    """A tensor saved by two ranks: two chunks of one name, glued from what two names were saved as."""
    from torch.distributed.checkpoint import metadata as meta

    whole = torch.arange(40.0).view(5, 8)
    save_dcp(tmp_path, {"top": whole[:2].clone(), "rest": whole[2:].clone()})
    index = pickle.loads((tmp_path / ".metadata").read_bytes())  # written by the lines above
    one = index.state_dict_metadata["top"]
    boxes = {"top": ((0, 0), (2, 8)), "rest": ((2, 0), (3, 8))}
    chunks = [meta.ChunkStorageMetadata(torch.Size(at), torch.Size(size)) for at, size in boxes.values()]
    index.state_dict_metadata = {"w": replace(one, size=torch.Size((5, 8)), chunks=chunks)}
    places = {key.fqn: info for key, info in index.storage_data.items()}
    index.storage_data = {
        meta.MetadataIndex("w", torch.Size(boxes[name][0])): info for name, info in places.items()
    }
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    assert_holds(open_tensors(tmp_path), {"w": whole})
    index.state_dict_metadata["w"] = replace(one, size=torch.Size((5, 8)), chunks=chunks[:1])
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match="cover 16 of 40"):
        open_tensors(tmp_path)


# ------------------------------------------------------------------------------------------- hostile files


class Payload:
    """Runs a command when unpickled."""

    def __init__(self, marker: Path, how: str) -> None:
        self.marker, self.how = marker, how

    def __reduce__(self):
        code = f"open({str(self.marker)!r}, 'w').close()"
        return {
            "system": (os.system, (f"touch {self.marker}",)),
            "eval": (eval, (code,)),
            "state": (OrderedDict, (), {"x": EvalOf(code)}),
        }[self.how]


class EvalOf:
    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self):
        return eval, (self.code,)


@pytest.mark.parametrize("how", ["system", "eval", "state"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "dcp"])
def test_pickled_code_never_runs(tmp_path, how, kind):
    marker, path = tmp_path / "marker", tmp_path / "x.pt"
    payload = Payload(marker, how)
    if kind == "dcp":
        path = save_dcp(tmp_path / "model", STATE)
        index = pickle.loads((path / ".metadata").read_bytes())
        index.planner_data = payload
        (path / ".metadata").write_bytes(pickle.dumps(index))
    else:
        torch.save({**STATE, "x": payload}, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match=r"posix\.system|eval|[Uu]nsupported|not opened"):
        open_tensors(path)
    assert not marker.exists()
    # The payload works: the plain unpickler does run it.
    pickle.loads(pickle.dumps(payload))
    assert marker.exists()


@pytest.mark.parametrize(
    ("program", "named"),
    [
        (b"cposix\nsystem\n(S'true'\ntR.", "posix.system"),
        (b"(S'true'\niposix\nsystem\n.", "INST"),
        (b"(cposix\nsystem\nS'true'\no.", "posix.system"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"N)R.", "call of NoneType"),
        (b"}}b.", "state of dict"),
        (b"P1\n.", "PERSID"),
        (b"NQ.", "persistent id"),
    ],
)
def test_safe_pickle_refuses(program, named):
    with pytest.raises(safe_pickle.UnsafePickle, match=named):
        safe_pickle.load(program, {})


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@given(plain, st.integers(3, 5))
@settings(max_examples=60, deadline=None)
def test_safe_pickle_reads_plain_data_as_python_does(value, protocol):
    assert safe_pickle.load(pickle.dumps(value, protocol), {}) == value


@pytest.fixture(scope="module")
def small_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    torch.save({"a": torch.ones(3), "e": io.BytesIO(b"x")}, folder / "x.pt")
    save_file({"a": torch.ones(3), "b": torch.ones(2)}, folder / "x.safetensors")
    return folder


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_any_damage_is_a_checkpoint_error_or_harmless(small_files, tmp_path, name):
    data = (small_files / name).read_bytes()
    generator = torch.Generator().manual_seed(3)
    path = tmp_path / name
    refused = 0
    for _ in range(300):
        at, value, cut = (
            int(torch.randint(n, (1,), generator=generator)) for n in (len(data), 256, len(data))
        )
        damaged = data[:at] + bytes([value]) + data[at + 1 :]
        path.write_bytes(damaged[:cut] if cut % 3 == 0 else damaged)
        try:
            for lazy in open_tensors(path).tensors.values():
                lazy.load().sum()
        except CheckpointError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 60


# ------------------------------------------------------------------------------------------- damaged files

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5526163456\n"


def spoil(path: Path, how: str) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    if how == "overlap":
        header["b"]["data_offsets"], header["a"]["data_offsets"] = [0, 8], [4, 12]
    elif how == "gap":
        header.pop("a")
    elif how == "shape":
        header["a"]["shape"] = [7]
    elif how == "negative":
        header["a"]["shape"] = [-2]
    elif how == "dtype":
        header["a"]["dtype"] = "F4"
    text = json.dumps(header).encode()
    path.write_bytes(
        {
            "empty": b"",
            "zeros": bytes(4096),
            "lfs": LFS,
            "html": b"\n<!DOCTYPE html><html><body>Sign in</body></html>",
            "denied": b'{"error":"Access to model is restricted"}',
            "tar": b"\x1f\x8b\x08" + bytes(64),
            "truncated": data[:-3],
            "trailing": data + b"123",
            "short": b"abc",
            "huge": struct.pack("<Q", 1 << 62) + data[8:],
            "json": data[:9] + b"?" + data[10:],
        }.get(how, struct.pack("<Q", len(text)) + text + data[8 + length :])
    )


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("empty", r"is empty \(0 bytes\)"),
        ("zeros", "zeros: the download was reserved"),
        ("lfs", "Git-LFS pointer"),
        ("html", "HTML page"),
        ("denied", "error message from the download server"),
        ("tar", "archive or tar"),
        ("truncated", "is cut short: tensors need 16 bytes, got 13"),
        ("trailing", "followed by extra bytes"),
        ("short", "neither a torch file nor safetensors"),
        ("huge", "header of 4611686018427387904 bytes"),
        ("json", "header damaged"),
        ("overlap", "overlaps another"),
        ("gap", "leaves a gap"),
        ("shape", "does not fill its 8 bytes"),
        ("negative", "malformed shape"),
        ("dtype", "dtype 'F4'"),
    ],
)
def test_damaged_safetensors(tmp_path, how, message):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, path)
    spoil(path, how)
    with pytest.raises(CheckpointError, match=message) as error:
        open_tensors(path)
    assert str(path) in str(error.value)


def test_damaged_torch_files(tmp_path):
    path = tmp_path / "x.pt"
    torch.save(STATE, path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        open_tensors(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match="not a torch weight file"):
        open_tensors(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="must hold a state dict, got list"):
        open_tensors(path)
    with pytest.raises(CheckpointError, match="no such file"):
        open_tensors(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match=r"holds no \.pt"):
        (tmp_path / "void").mkdir()
        open_tensors(tmp_path / "void")


def test_compressed_or_shrunk_storage_is_refused(tmp_path):
    torch.save({"a": torch.ones(100)}, tmp_path / "x.pt")
    for compression, size in ((zipfile.ZIP_DEFLATED, 400), (zipfile.ZIP_STORED, 200)):
        with zipfile.ZipFile(tmp_path / "x.pt") as old, zipfile.ZipFile(tmp_path / "y.pt", "w") as new:
            for info in old.infolist():
                data = old.read(info)
                is_data = info.filename.endswith("data/0")
                new.writestr(info.filename, data[:size] if is_data else data, compression)
        with pytest.raises(CheckpointError, match="must hold 400 plain bytes"):
            open_tensors(tmp_path / "y.pt")
