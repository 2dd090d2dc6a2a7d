"""The bounded folder of results: whole files only, oldest out first, several processes at once."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cosmos_fast.disk_cache import DiskCache, content_key
from cosmos_fast.formats import EnvironmentProblem

KEYS = [content_key("test", n) for n in range(6)]


def data(size: int, fill: bytes = b"x"):
    return lambda path: path.write_bytes(fill * size)


def aged(path: Path, seconds: float) -> None:
    os.utime(path, times=(time.time() - seconds,) * 2)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_keys_tell_parts_apart():
    keys = [
        content_key(*parts)
        for parts in (
            ("ab", "c"),
            ("a", "bc"),
            ("abc",),
            (1,),
            ("1",),
            (None,),
            ("é",),
            ("e\u0301",),
            ({"a": 1},),
        )
    ]
    assert len(set(keys)) == len(keys) and all(len(key) == 64 for key in keys)
    assert content_key({"b": 1, "a": 2}) == content_key({"a": 2, "b": 1})
    # Written down: a key that changes between releases empties every cache.
    assert content_key("a", 1) == "2657442bb4a48d62f780ea60395ef2d203da2669fa41cdc1f4f080b25ddb1a6a"
    with pytest.raises(TypeError):
        content_key(b"bytes")


def test_put_and_get(tmp_path):
    cache = DiskCache(tmp_path / "new" / "folder")
    assert cache.get(KEYS[0]) is None and cache.size() == 0
    seen = []

    def write(path: Path) -> None:
        seen.append(path)
        path.write_bytes(b"12345")

    path = cache.put(KEYS[0] + ".npz", write)
    assert path == cache.get(KEYS[0] + ".npz") and path.read_bytes() == b"12345" and cache.size() == 5
    assert seen[0].suffix == ".npz" and seen[0] != path
    assert cache.get(KEYS[0]) is None  # the suffix is part of the key
    assert names(cache.folder) == {KEYS[0] + ".npz"}


@pytest.mark.parametrize(
    "key", ["", "short", "../" + KEYS[0], KEYS[0].upper(), KEYS[0] + "/x", KEYS[0] + "."]
)
def test_what_is_no_key(tmp_path, key):
    with pytest.raises(ValueError, match="content_key"):
        DiskCache(tmp_path).get(key)


def test_the_longest_unused_goes_first(tmp_path):
    cache = DiskCache(tmp_path, limit_bytes=300)
    for n in range(3):
        aged(cache.put(KEYS[n], data(100)), 100 - n)
    cache.get(KEYS[0])  # used now: 1 is the oldest
    cache.put(KEYS[3], data(100))
    assert names(tmp_path) == {KEYS[0], KEYS[2], KEYS[3]}
    cache.put(KEYS[4], data(200))
    assert cache.size() <= 300 and KEYS[4] in names(tmp_path) and KEYS[2] not in names(tmp_path)


def test_the_new_and_the_kept_stay_over_the_limit(tmp_path):
    cache = DiskCache(tmp_path, limit_bytes=150)
    aged(cache.put(KEYS[0], data(100)), 50)
    aged(cache.put(KEYS[1], data(100), keep=[KEYS[0]]), 40)
    assert names(tmp_path) == {KEYS[0], KEYS[1]}
    cache.put(KEYS[2], data(500))
    assert names(tmp_path) == {KEYS[2]}


def test_other_files_are_never_removed(tmp_path):
    (tmp_path / "thesis.txt").write_bytes(b"x" * 1000)
    (tmp_path / ".part-mine").write_bytes(b"x" * 1000)
    for path in (tmp_path / "thesis.txt", tmp_path / ".part-mine"):
        aged(path, 1e6)
    cache = DiskCache(tmp_path, limit_bytes=10)
    cache.put(KEYS[0], data(10))
    cache.put(KEYS[1], data(10))
    assert names(tmp_path) == {"thesis.txt", ".part-mine", KEYS[1]}


def test_a_failing_writer_changes_nothing(tmp_path):
    cache = DiskCache(tmp_path)
    cache.put(KEYS[0], data(5, b"a"))

    def half(path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyError("stop")

    with pytest.raises(KeyError):
        cache.put(KEYS[0], half)
    assert names(tmp_path) == {KEYS[0]} and (tmp_path / KEYS[0]).read_bytes() == b"aaaaa"


def test_abandoned_parts_go_and_fresh_ones_stay(tmp_path):
    old, fresh = (tmp_path / f".part-1-{k}-{KEYS[5]}" for k in "ab")
    for path in (old, fresh):
        path.write_bytes(b"half")
    aged(old, 25 * 3600)
    aged(fresh, 3600)
    DiskCache(tmp_path).put(KEYS[0], data(1))
    assert names(tmp_path) == {KEYS[0], fresh.name}


def test_full_disk_and_unwritable_folder(tmp_path):
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(EnvironmentProblem, match="full disk.*--cache-dir"):
        DiskCache(tmp_path).put(KEYS[0], full)
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentProblem, match="must be a folder.*--cache-dir"):
        DiskCache(tmp_path / "file").put(KEYS[0], data(1))
    assert DiskCache(tmp_path / "file").get(KEYS[0]) is None


def test_the_mode_is_that_of_a_plain_file(tmp_path):
    def private(path: Path) -> None:
        path.write_bytes(b"x")
        path.chmod(0o600)

    path = DiskCache(tmp_path / "c").put(KEYS[0], private)
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_discard(tmp_path):
    cache = DiskCache(tmp_path)
    cache.put(KEYS[0], data(1))
    cache.discard(KEYS[0])
    cache.discard(KEYS[0])
    assert cache.get(KEYS[0]) is None


WRITER = """
import sys
from cosmos_fast.disk_cache import DiskCache
folder, keys = sys.argv[1], sys.argv[2:]
cache = DiskCache(folder, limit_bytes=250_000)
for turn in range(150):
    key = keys[turn % len(keys)]
    fill = key[:1].encode()
    cache.put(key, lambda path: path.write_bytes(fill * 100_000))
    path = cache.get(key)
    try:
        content = path.read_bytes() if path else b""
    except FileNotFoundError:
        content = b""
    assert content in (b"", fill * 100_000), len(content)
"""


def test_processes_that_write_the_same_keys(tmp_path):
    """Readers see whole entries or none while three writers replace and evict each other's."""
    command = [sys.executable, "-c", WRITER, str(tmp_path), *KEYS[:4]]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in running:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    cache = DiskCache(tmp_path, limit_bytes=250_000)
    assert cache.size() <= 300_000 and not [name for name in names(tmp_path) if name.startswith(".")]
