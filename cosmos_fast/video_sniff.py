"""Say what a file really is, from its kind and first bytes, before any media library touches it."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .formats import MediaError

ACCEPTED = "a video (MP4, MOV, MKV, WebM, AVI, MPEG-TS) or an image (PNG, JPEG, GIF)"
IMAGE_FORMATS = {"png_pipe": "PNG", "jpeg_pipe": "JPEG", "gif": "GIF"}
VIDEO_FORMATS = {"mov": "MP4/MOV", "matroska": "Matroska/WebM", "avi": "AVI", "mpegts": "MPEG-TS"}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".gif"}
VIDEO_SUFFIXES = {".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".ts", ".mts"}

_SNIFF_BYTES = 4096
_MOV_ATOMS = {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot"}
_FOREIGN = (
    (
        b"version https://git-lfs.github.com/spec/",
        "a Git-LFS pointer",
        "Run `git lfs pull` to get the real file.",
    ),
    (b"#EXTM3U", "a playlist (M3U)", "Give the media file itself."),
    (b"ffconcat version", "a concat script", "Give the media file itself."),
    (b"v=0\r\n", "a streaming description (SDP)", "Give the media file itself."),
    (b"v=0\n", "a streaming description (SDP)", "Give the media file itself."),
    (b"<?xml", "an XML document", ""),
    (b"PK\x03\x04", "a ZIP archive", "Unpack it first."),
    (b"\x1f\x8b", "a gzip archive", "Unpack it first."),
    (b"%PDF", "a PDF document", ""),
    (b"\x93NUMPY", "a NumPy array", ""),
    (b"\x80\x04\x95", "a Python pickle", ""),
    (b"OggS", "an Ogg file", "Convert it to MP4 first."),
    (b"fLaC", "a FLAC audio file", ""),
    (b"ID3", "an MP3 audio file", ""),
    (b"BM", "a BMP image", "Convert it to PNG first."),
    (b"II*\x00", "a TIFF image", "Convert it to PNG first."),
    (b"MM\x00*", "a TIFF image", "Convert it to PNG first."),
)


def stat_regular(path: Path) -> os.stat_result:
    """Stat of a regular, non-empty file, without opening it; anything else is a MediaError."""
    try:
        info = os.stat(path)
    except FileNotFoundError:
        if path.is_symlink():
            raise MediaError(
                f"{path}: must exist, got a link to {os.readlink(path)}, which does not."
            ) from None
        raise MediaError(f"{path}: must exist, got no such file.") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise MediaError(f"{str(path)[:200]!r}: must be readable, got: {reason}.") from None
    kinds = (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    )
    for is_kind, name in kinds:
        if is_kind(info.st_mode):
            raise MediaError(f"{path}: must be a regular file, got {name}.")
    if info.st_size == 0:
        raise MediaError(f"{path}: must be {ACCEPTED}, got an empty file.")
    return info


def sniff(path: Path) -> str:
    """Name of the one demuxer that may read this file, chosen from its first bytes."""
    try:
        with open(path, "rb") as file:
            head = file.read(_SNIFF_BYTES)
    except OSError as error:
        raise MediaError(f"{path}: must be readable, got: {error.strerror}.") from None
    demuxer = _demuxer(head)
    if demuxer is None:
        content, hint = _foreign(head)
        raise MediaError(f"{path}: must be {ACCEPTED}, got {content}. {hint}".rstrip())
    suffix = path.suffix.lower()
    is_image = demuxer in IMAGE_FORMATS
    if suffix in (VIDEO_SUFFIXES if is_image else IMAGE_SUFFIXES):
        content = (IMAGE_FORMATS | VIDEO_FORMATS)[demuxer]
        raise MediaError(
            f"{path}: content must fit the name, got {content} content named {suffix}. "
            "Rename or replace the file."
        )
    return demuxer


@dataclass(frozen=True)
class ImageFacts:
    """What the header of an image says: size in pixels, EXIF orientation (1 to 8), whether its end is there."""

    width: int = 0
    height: int = 0
    orientation: int = 1
    complete: bool = True


def image_facts(path: Path, demuxer: str) -> ImageFacts:
    """Read an image's header without decoding, so that a bomb is known before any decoder sees it."""
    if demuxer == "jpeg_pipe":
        return _jpeg_facts(path.read_bytes())
    with open(path, "rb") as file:
        head = file.read(24)
    if demuxer == "gif":
        return ImageFacts(int.from_bytes(head[6:8], "little"), int.from_bytes(head[8:10], "little"))
    return ImageFacts(int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big"))


def _jpeg_facts(data: bytes) -> ImageFacts:
    position, width, height, orientation = 2, 0, 0, 1
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        segment = data[position + 4 : position + 2 + length]
        if marker == 0xE1:
            orientation = _exif_orientation(segment) or orientation
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = int.from_bytes(segment[1:3], "big"), int.from_bytes(segment[3:5], "big")
        position += 2 + max(length, 2)
        if marker == 0xDA:  # picture data follows; in it 0xFF is always escaped
            return ImageFacts(width, height, orientation, data.find(b"\xff\xd9", position) >= 0)
    return ImageFacts(width, height, orientation, complete=False)


def _exif_orientation(segment: bytes) -> int | None:
    if not segment.startswith(b"Exif\0\0"):
        return None
    tiff = segment[6:]
    order: Literal["little", "big"] = "little" if tiff[:2] == b"II" else "big"
    first = int.from_bytes(tiff[4:8], order)
    for index in range(int.from_bytes(tiff[first : first + 2], order)):
        entry = tiff[first + 2 + 12 * index :][:12]
        if len(entry) == 12 and int.from_bytes(entry[:2], order) == 0x0112:
            return int.from_bytes(entry[8:10], order)
    return None


def _demuxer(head: bytes) -> str | None:
    if head[4:8] in _MOV_ATOMS:
        return "mov" if head[8:12] not in (b"heic", b"avif", b"mif1") else None
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    if head.startswith(b"RIFF") and head[8:12] == b"AVI ":
        return "avi"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png_pipe"
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg_pipe"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if len(head) > 376 and head[0] == head[188] == head[376] == 0x47:
        return "mpegts"
    return None


def _foreign(head: bytes) -> tuple[str, str]:
    for magic, content, hint in _FOREIGN:
        if head.startswith(magic):
            return content, hint
    if head.startswith(b"RIFF"):
        return f"a RIFF file of type {head[8:12].decode('ascii', 'replace').strip()}", "Convert it first."
    if head[4:8] == b"ftyp":
        return "a HEIF/AVIF image", "Convert it to PNG first."
    if not head.strip(b"\0"):
        return "only zero bytes", "The copy or download did not finish."
    try:
        text = head.decode("utf-8-sig", "strict" if len(head) < _SNIFF_BYTES else "ignore")
    except UnicodeDecodeError:
        return "content of an unknown kind", ""
    if any(ord(letter) < 9 for letter in text):
        return "content of an unknown kind", ""
    if text.lstrip()[:1] in ("{", "["):
        try:
            json.loads(text)
        except ValueError:
            if len(head) < _SNIFF_BYTES:
                return "a text file", ""
        return "a JSON file", ""
    return "a text file", ""
