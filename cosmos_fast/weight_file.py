"""Opens whatever holds weights, and says what a file that does not looks like instead."""

from __future__ import annotations

from pathlib import Path

from cosmos_fast.formats import CheckpointError
from cosmos_fast.safetensors_file import TensorFile, open_index, open_safetensors
from cosmos_fast.torch_file import open_dcp, open_legacy, open_zip


def open_tensors(path: str | Path) -> TensorFile:
    """Open a .pt/.pth file, a safetensors file or index, or a folder holding one of these or a DCP.

    Raises CheckpointError when the file is missing, damaged, of another kind, or asks for code to run.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file. Check the path, or give a published id such as 'edge'.")
    with path.open("rb") as file:
        head = file.read(512)
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(f"{path}: is empty (0 bytes). Download it again.")
    if head[:4] == b"PK\x03\x04":
        return open_zip(path)
    if path.name.endswith(".index.json"):
        return open_index(path)
    _refuse_other_content(path, head, size)
    if head[:1] == b"\x80":
        return open_legacy(path)
    return open_safetensors(path)


def _open_folder(path: Path) -> TensorFile:
    for folder in (path, path / "model"):
        if (folder / ".metadata").is_file():
            return open_dcp(folder)
    for pattern in ("*.safetensors.index.json", "*.safetensors", "*.pt", "*.pth"):
        found = sorted(path.glob(pattern))
        if len(found) > 1:
            names = ", ".join(f.name for f in found[:10])
            raise CheckpointError(
                f"{path}: expected one weight file, got {len(found)} ({names}). Name the file."
            )
        if found:
            return open_tensors(found[0])
    raise CheckpointError(
        f"{path}: holds no .pt, .safetensors or distributed checkpoint. Name the file itself."
    )


def _refuse_other_content(path: Path, head: bytes, size: int) -> None:
    text = head.lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        what = "a Git-LFS pointer, not the weights. Run 'git lfs pull', or download the file itself."
    elif text.startswith((b"<!doctype", b"<html", b"<?xml")):
        what = (
            "an HTML page, not weights: the download was answered by a web page. Log in and download again."
        )
    elif text.startswith((b'{"error', b"invalid username", b"access to model")):
        what = "an error message from the download server, not weights. Log in and download again."
    elif not head.strip(b"\0") and size > 8:
        what = "zeros: the download was reserved but never written. Delete it and download again."
    elif head[:2] == b"\x1f\x8b" or head[257:262] == b"ustar":
        what = "a compressed archive or tar. Unpack it first."
    else:
        return
    raise CheckpointError(f"{path}: starts like {what}")
