"""Rules for single values of a spec: names, text, numbers and paths, and how a broken rule is worded.

No file but a prompt file is ever opened here: media files are judged by suffix and by `stat`.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from . import jsonc
from .formats import RESOLUTIONS, TEMPORAL, SpecError
from .jsonc import KeyPath

MEDIA_SUFFIXES: Final = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".png", ".jpg", ".jpeg", ".gif")
MASK_SUFFIXES: Final = (*MEDIA_SUFFIXES, ".npz")
_NEVER_TEXT: Final = (".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".npy", ".npz", ".bin", ".safetensors")
MAX_TEXT_BYTES: Final = 1_000_000

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}


_ALIASES = {"blur": "vis", "segmentation": "seg", "canny": "edge", "steps": "num_steps"}
"""Other words for keys that a spelling distance does not find."""


class Rule(ValueError):
    """A broken rule about one value: what must hold, and one thing to do about it."""

    def __init__(self, rule: str, hint: str = "") -> None:
        super().__init__(rule)
        self.rule, self.hint = rule, hint


def shown(value: Any, limit: int = 80) -> str:
    """`value` as JSON for a message, cut to `limit` characters."""
    try:
        text = json.dumps(value, ensure_ascii=True, default=str)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"


def sentence(rule: str, value: Any, hint: str = "") -> str:
    """`<rule>, got <value>. <hint>`"""
    return f"{rule}, got {shown(value)}." + (f" {hint}" if hint else "")


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """A hint naming the known word nearest to `word`, else all of them."""
    known = list(known)
    near = difflib.get_close_matches(str(word)[:100].lower(), known, n=1, cutoff=0.6)
    return f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(known)}."


def explain(fault: Mapping[str, Any], known: Mapping[KeyPath, list[str]]) -> tuple[KeyPath, str]:
    """Key path and sentence of one pydantic error. `known` maps an object's path to the keys it may have."""
    path: KeyPath = tuple(fault["loc"])
    key, value = ".".join(map(str, path)), fault["input"]
    if fault["type"] == "extra_forbidden":
        owner = ".".join(map(str, path[:-1])) or "spec"
        hint = did_you_mean(_ALIASES.get(str(path[-1]), path[-1]), known[path[:-1]])
        return path, f"{owner}: unknown key {shown(path[-1])}. {hint}"
    if fault["type"] == "missing":
        return path, f"{key}: is required, got nothing."
    if isinstance(rule := fault.get("ctx", {}).get("error"), Rule):
        return path, f"{key}: {sentence(rule.rule, value, rule.hint)}"
    if fault["type"] == "model_type":
        return path, f"{key}: {sentence('must be an object such as {}', value)}"
    if fault["type"] == "int_parsing_size":
        return path, f"{key}: {sentence('must be an integer of usual size', value)}"
    message = fault["msg"].split(", unable")[0].replace("Input should be", "must be").replace("tuple", "list")
    hint = ""
    if fault["type"] == "literal_error" and isinstance(value, str):
        hint = did_you_mean(value, re.findall(r"'([^']+)'", fault["ctx"]["expected"]))
    return path, f"{key}: {sentence(message[0].lower() + message[1:], value, hint)}"


def number(value: Any) -> Any:
    """Refuse true and false where a number is asked for; the rest is the schema's business."""
    if isinstance(value, bool):
        raise Rule("must be a number", "true and false are not numbers.")
    return value


def whole(value: Any) -> Any:
    """A whole number; 1.0 counts as 1."""
    value = number(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def chunk_frames(value: int) -> int:
    """Chunk lengths a causal video codec can hold: 1, 5, 9, ... 93, ..."""
    if value % TEMPORAL != 1:
        raise Rule(f"must be {TEMPORAL}k+1 (1, 5, ..., 93)", "Published models take 93, or 1 for images.")
    return value


def resolution(value: Any) -> Any:
    """A key of the size table; 720 and 720.0 mean "720"."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value == int(value):
        value = str(int(value))
    if not isinstance(value, str) or value not in RESOLUTIONS:
        raise Rule("must be a known resolution", f"Known: {', '.join(RESOLUTIONS)}.")
    return value


def sigma_max(value: Any) -> Any:
    """A number from 0 to 200 as text."""
    if value is None:
        return None
    try:
        sigma = float(number(value))
    except (TypeError, ValueError, OverflowError):
        sigma = float("nan")
    if not 0 <= sigma <= 200:
        raise Rule("must be a number from 0 to 200")
    return value if isinstance(value, str) else f"{value:g}"


def name(value: str) -> str:
    """A file stem that is safe on every system."""
    if not _NAME.fullmatch(value) or value.endswith("."):
        raise Rule(
            "must be 1 to 128 letters, digits, '.', '_' or '-', starting with a letter or digit",
            "Folders belong in output_dir.",
        )
    if value.split(".")[0].lower() in _RESERVED:
        raise Rule("must not be a device name of Windows", f"Try '{value}-1'." if "." not in value else "")
    if value.lower() == "run" or value.lower().endswith(".part"):
        raise Rule("must not be 'run' or end in '.part', which the output folder uses itself")
    return value


def text(value: str) -> str:
    """Text for the encoder: at most 1 MB of UTF-8, no control characters but newline and tab."""
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise Rule("must be valid Unicode") from None
    if size > MAX_TEXT_BYTES:
        raise Rule(f"must be at most {MAX_TEXT_BYTES:,} bytes")
    if bad := _CONTROL.search(value):
        raise Rule(f"must not hold control characters (U+{ord(bad.group()):04X} at character {bad.start()})")
    return value


def local_path(value: str | os.PathLike[str], base: str | os.PathLike[str]) -> str:
    """Absolute path of `value` seen from `base`; `~` expanded, folders resolved, a final link kept."""
    joined = os.path.join(base, os.path.expanduser(os.fspath(value)))
    folder, last = os.path.split(joined)
    # A file link keeps its own name: caches link clip.mp4 to a blob without a suffix.
    return (
        os.path.join(os.path.realpath(folder), last)
        if last not in ("", ".", "..")
        else os.path.realpath(joined)
    )


def is_path(value: Any) -> bool:
    """Whether `value` can be a local path at all."""
    if not isinstance(value, (str, os.PathLike)):
        return False
    path = os.fspath(value)
    return isinstance(path, str) and path != "" and "\0" not in path and "://" not in path


def _file(value: Any, allowed: tuple[str, ...] | None) -> Path:
    if not is_path(value):
        raise Rule("must be the path of a local file", "URLs are not read; download the file first.")
    path = Path(local_path(value, os.getcwd()))
    suffix = path.suffix.lower()
    if allowed is not None and suffix not in allowed:
        raise Rule(f"must be one of {' '.join(allowed)}", "Files of other types are never opened.")
    if allowed is None and suffix in _NEVER_TEXT:
        raise Rule("must be a text or .json file", "Files of other types are never opened.")
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        reason = "" if isinstance(error, FileNotFoundError) else f" ({error.strerror})"
        raise Rule(f"must be an existing file{reason}", _RELATIVE if not reason else "") from None
    if not stat.S_ISREG(mode):
        raise Rule("must be a regular file, not a folder, pipe or device")
    if not os.access(path, os.R_OK):
        raise Rule("must be readable")
    return path


_RELATIVE = "Paths in a spec are relative to its folder, paths on the command line to the current one."


def media_file(value: Any) -> Path:
    """An existing video or image, by suffix; not opened."""
    return _file(value, MEDIA_SUFFIXES)


def mask_file(value: Any) -> Path:
    """An existing video, image or .npz of labels, by suffix; not opened."""
    return _file(value, MASK_SUFFIXES)


def prompt_file(value: Any) -> Path:
    """An existing file that may hold text."""
    return _file(value, None)


def folder(value: Any) -> Path:
    """A folder that exists or can be made."""
    if not is_path(value):
        raise Rule("must be the path of a local folder")
    path = Path(local_path(value, os.getcwd()))
    if path.exists() and not path.is_dir():
        raise Rule("must be a folder")
    return path


def read_prompt(path: Path) -> str:
    """The prompt in a file: its whole text stripped, or for .json a string or {"prompt": "..."}.

    Raises Rule, with the place in the file where there is one.
    """
    try:
        content = jsonc.decode(jsonc.read_bytes(path))
        if path.suffix.lower() not in (".json", ".jsonc"):
            return text(content.replace("\r\n", "\n").replace("\r", "\n").strip())
        value = jsonc.parse(content).value
    except SpecError as error:
        raise Rule(f"must hold a prompt ({str(error).rstrip('.')})") from None
    if isinstance(value, dict):
        value = value.get("prompt")
    if not isinstance(value, str):
        raise Rule('must hold a JSON string or {"prompt": "..."}')
    return text(value.strip())
