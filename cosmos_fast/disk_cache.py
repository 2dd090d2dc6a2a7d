"""A folder of results that are dear to make: named by what went in, bounded in size, shared by processes.

    cache = DiskCache(folder / "depth", limit_bytes=4 << 30)
    key = content_key("depth", revision, video_sha256, size) + ".npz"
    path = cache.get(key) or cache.put(key, write)      # write(path) makes the file

Every entry is one file that appears whole or not at all. When the folder grows beyond its limit, what was not
used for the longest time goes. An entry may also go at any moment because another process needs the room: who
opens a path of `get` and finds nothing there has a miss. Whether an entry still reads back is for its reader to
say, who calls `discard` for one that does not.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final

from cosmos_fast.formats import EnvironmentProblem

CACHE_HOME: Final = Path("~/.cache/cosmos-fast")
"""Where the command line keeps its caches, each in a folder of its own below."""

DEFAULT_LIMIT: Final = 10 << 30
"""Bytes one cache folder may hold: about 100 prompts of the published encoder."""

_KEY: Final = re.compile(r"[0-9a-f]{64}(\.[a-z0-9]{1,16})?")
_PART: Final = ".part-"
_ABANDONED: Final = 24 * 3600.0
"""Seconds after which a half-written file belongs to nobody: no writer pauses for a day."""


def content_key(*parts: object) -> str:
    """SHA-256 of `parts` in order: strings, numbers, None, and lists or dicts of them; TypeError for others.

    Different parts give different keys: ("ab", "c") is not ("a", "bc"), and 1 is not "1".
    """
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class DiskCache:
    """Files under one folder by key, at most `limit_bytes` of them.

    A key is a `content_key`, with a suffix if readers care about one ("<64 hex digits>.npz"). The folder is made
    by the first `put`. Nothing in it but entries of this form is ever removed, so a folder that holds other
    files is safe. Safe for any number of processes and threads on one file system.
    """

    def __init__(self, folder: str | os.PathLike[str], limit_bytes: int = DEFAULT_LIMIT) -> None:
        if limit_bytes < 1:
            raise ValueError(f"DiskCache: limit_bytes must be positive, got {limit_bytes}.")
        self.folder = Path(folder).expanduser()
        self.limit_bytes = limit_bytes

    def path(self, key: str) -> Path:
        """Where the entry of `key` is, or would be. ValueError for what is no key."""
        if not _KEY.fullmatch(key):
            raise ValueError(f"DiskCache: key must be a content_key, with or without suffix, got {key!r}.")
        return self.folder / key

    def get(self, key: str) -> Path | None:
        """The entry's file, now the most recently used one; None when there is none."""
        path = self.path(key)
        try:
            # The time of change is the time of last use: many file systems are mounted without access times.
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError:
            # A cache shared read-only is still a cache.
            return path if path.is_file() else None
        return path

    def put(self, key: str, writer: Callable[[Path], None], keep: Collection[str] = ()) -> Path:
        """Let `writer(path)` write a file, make it the entry of `key`, then remove old entries over the limit.

        `writer` gets a path of another name with the same suffix; what it raises passes through, and then nothing
        has changed. The new entry and those of the keys in `keep` stay even where they alone exceed the limit.
        Raises EnvironmentProblem when the folder cannot be written or the disk is full.
        """
        path = self.path(key)
        part = path.with_name(f"{_PART}{os.getpid()}-{secrets.token_hex(8)}-{key}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            part.touch()
            mode = part.stat().st_mode
            writer(part)
            part.chmod(mode)  # some writers leave 0600, which hides the file from a group
            self._sync(part)
            os.replace(part, path)
        except OSError as error:
            raise self._problem(error) from error
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
        self._shrink({key, *keep})
        return path

    def discard(self, key: str) -> None:
        """Remove an entry, if it is there."""
        with contextlib.suppress(OSError):
            self.path(key).unlink(missing_ok=True)

    def size(self) -> int:
        """Bytes of all entries."""
        return sum(size for _, size, _ in self._entries())

    def _entries(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, path), the longest unused first; abandoned parts are removed on the way."""
        found = []
        try:
            files = list(os.scandir(self.folder))
        except OSError:
            return []
        for file in files:
            with contextlib.suppress(OSError):  # another process may remove any of them meanwhile
                if _KEY.fullmatch(file.name) and file.is_file(follow_symlinks=False):
                    state = file.stat()
                    found.append((state.st_mtime, state.st_size, Path(file.path)))
                elif file.name.startswith(_PART) and _KEY.fullmatch(_key_of(file.name)):
                    if time.time() - file.stat().st_mtime > _ABANDONED:
                        os.unlink(file.path)
        return sorted(found)

    def _shrink(self, keep: set[str]) -> None:
        entries = self._entries()
        total = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if total <= self.limit_bytes:
                return
            if path.name not in keep:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
                total -= size

    @staticmethod
    def _sync(path: Path) -> None:
        """To the disk before the name is: after a power cut the entry is whole or absent."""
        with open(path, "rb") as file:
            os.fsync(file.fileno())

    def _problem(self, error: OSError) -> EnvironmentProblem:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return EnvironmentProblem(
                f"cache: {self.folder} must have room for a new entry, got a full disk. "
                "Free space, or pass --cache-dir FOLDER on a larger disk."
            )
        return EnvironmentProblem(
            f"cache: {self.folder} must be a folder that can be written, got: {error}. "
            "Pass --cache-dir FOLDER."
        )


def _key_of(part: str) -> str:
    """The key in a part's name; a writer that is itself careful puts another .part before the suffix."""
    return part.rpartition("-")[2].replace(".part.", ".")
