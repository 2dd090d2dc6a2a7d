"""The output folder: confined paths, sidecars, the manifest, and what counts as done.

A clip is done when `<name>.json` exists, carries the same spec hash, and the output file it names has the
recorded SHA-256. Every write goes to a `.part` file, is flushed to disk and renamed, in this order: media,
`<name>.txt`, `<name>.json`, one line in `manifest.jsonl`. So a process may die anywhere and leave the old
state or the new one, never half of one.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import hashlib
import json
import os
import re
import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

from . import __version__
from .formats import CONTROLS, ClipError, EnvironmentProblem, SpecError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}
_SUFFIXES = (
    *(f"_{kind}_{key}" for kind in ("control", "mask") for key in CONTROLS),
    "_mask_guided_generation",
)

ALL_REFUSED = 4
"""Exit code of a batch of which guardrails refused every clip."""


def name_problem(name: str) -> str | None:
    """Why `name` cannot be a clip's file stem, or None."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return f"name: must be 1 to 128 of A-Z a-z 0-9 . _ - and start with a letter or digit, got {name!r}."
    if name.split(".")[0].lower() in _DEVICES:
        return f"name: must not be a reserved device name, got {name!r}."
    if name.lower() == "run" or name.lower().endswith(".part"):
        return f"name: 'run' and names ending in '.part' are taken by the output folder, got {name!r}."
    return None


def name_problems(names: Sequence[str]) -> list[str]:
    """Every fault of a batch's names: bad ones, and two that would write the same file on any file system."""
    problems = [p for p in map(name_problem, names) if p]
    owner: dict[str, str] = {}
    for name in names:
        if (key := str(name).lower()) in owner:
            problems.append(f"name: must be unique, capitals aside, got {owner[key]!r} and {name!r}.")
        owner.setdefault(key, str(name))
    taken = {(o.lower() + s): o for o in owner.values() for s in _SUFFIXES}
    problems += [
        f"name: {name!r} is also a file that clip {taken[key]!r} may write. Rename one."
        for key, name in owner.items()
        if key in taken
    ]
    return problems


def exit_code(statuses: Iterable[str]) -> int:
    """Of a batch by what became of its clips: 0 all are done or somebody else's, 4 all were refused, else 1."""
    found = set(statuses)
    if found <= {"done", "skipped", "elsewhere"}:
        return 0
    return ALL_REFUSED if found == {"refused"} else 1


def of_all(codes: Iterable[int]) -> int:
    """One exit code of several parts of a run: the gravest; ALL_REFUSED only where every part says so."""
    found = set(codes)
    return max(found if len(found) == 1 else {1 if code == ALL_REFUSED else code for code in found})


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: `.part`, fsync, rename, fsync of the folder. Leaves no `.part` on failure."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.unlink(missing_ok=True)
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _json(record: Mapping[str, Any], indent: int | None = None) -> bytes:
    return json.dumps(record, indent=indent, ensure_ascii=False, allow_nan=False).encode() + b"\n"


class Held(Protocol):
    """A claim, as far as this module needs it."""

    def held(self) -> bool: ...


class OutputFolder:
    """One output folder and all that may be written in it.

    Raises EnvironmentProblem when it cannot be made, written or locked.
    """

    def __init__(self, path: str | Path) -> None:
        self.root = Path(path).expanduser().resolve()
        self._recorded: set[tuple[str, str]] | None = None
        probe = self.root / f".write-check-{uuid.uuid4().hex}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            _write(probe, b"ok")
            with self.locked():
                pass
        except OSError as error:
            raise EnvironmentProblem(
                f"output folder: must be a folder that can be written and locked, got {self.root} "
                f"({error.strerror or error}). Choose another with -o."
            ) from None
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)

    def path(self, filename: str) -> Path:
        """Path of one file of this folder; ClipError if it leads elsewhere, or is not a plain file."""
        path = self.root / filename
        if filename != os.path.basename(filename) or filename in ("", ".", "..") or "\0" in filename:
            raise ClipError(f"output path: must be a plain file name, got {filename!r}.")
        if self.root.resolve() != self.root or path.is_symlink():
            raise ClipError(f"output path: must not be a symbolic link, got {path}. Remove the link.")
        if path.exists() and not path.is_file():
            raise ClipError(f"output path: must be a plain file, got {path}. Remove it or change the folder.")
        return path

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder's lock; the system drops it when the holder dies."""
        handle = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def clip(self, name: str) -> ClipOutputs:
        return ClipOutputs(self, name)

    def write_run(self, record: Mapping[str, Any]) -> Path:
        """Write `run.json`, the environment of the latest run in this folder."""
        path = self.path("run.json")
        _write(path, _json({"started": _now(), **record}, indent=2))
        return path

    def record(self, name: str, status: str, reason: str | None = None, **fields: Any) -> None:
        """Append one line to `manifest.jsonl` and flush it to disk; safe from several processes and hosts.

        Raises EnvironmentProblem when the disk refuses.
        """
        if status not in ("done", "failed", "refused"):
            raise ValueError(f"manifest: status must be done, failed or refused, got {status!r}.")
        line = _json({"name": name, "status": status, "time": _now(), "reason": reason, **fields})
        try:
            with self.locked():
                self._append(self.path("manifest.jsonl"), line)
        except OSError as error:
            raise EnvironmentProblem(f"manifest: must be writable, got {error}.") from error

    @staticmethod
    def _append(path: Path, line: bytes) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        with os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
                line = b"\n" + line  # a writer died in mid-line: its half line must not swallow ours
            if file.write(line) != len(line):
                raise OSError("short write, the disk may be full")
            os.fsync(file.fileno())

    def manifest(self) -> list[dict[str, Any]]:
        """Every whole line of the manifest, in order; half lines of a process that died are left out."""
        path, lines = self.path("manifest.jsonl"), []
        for line in path.read_bytes().splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
        return lines

    def ensure_recorded(self, name: str, digest: str, **fields: Any) -> None:
        """Give a finished clip its manifest line if a crash came between the two."""
        if self._recorded is None:
            done = (line for line in self.manifest() if line.get("status") == "done")
            self._recorded = {(str(line.get("name")), str(line.get("sha256"))) for line in done}
        if (name, digest) not in self._recorded:
            self.record(name, "done", sha256=digest, **fields)
            self._recorded.add((name, digest))


class ClipOutputs:
    """The files of one clip. SpecError if `name` breaks the name rule."""

    def __init__(self, folder: OutputFolder, name: str) -> None:
        if problem := name_problem(name):
            raise SpecError(problem)
        self.folder, self.name = folder, name

    def media(self, frames: int) -> Path:
        """`<name>.jpg` for one frame, else `<name>.mp4`."""
        return self._path("", frames)

    def control(self, key: str, frames: int) -> Path:
        return self._path(f"_control_{self._key(key)}", frames)

    def mask(self, key: str, frames: int) -> Path:
        return self._path(f"_mask_{self._key(key)}", frames)

    def guided_mask(self, frames: int) -> Path:
        return self._path("_mask_guided_generation", frames)

    @property
    def prompt(self) -> Path:
        return self.folder.path(f"{self.name}.txt")

    @property
    def sidecar(self) -> Path:
        return self.folder.path(f"{self.name}.json")

    def _key(self, key: str) -> str:
        if key not in CONTROLS:
            raise ValueError(f"control: must be one of {', '.join(CONTROLS)}, got {key!r}.")
        return key

    def _path(self, suffix: str, frames: int) -> Path:
        return self.folder.path(f"{self.name}{suffix}.{'jpg' if frames == 1 else 'mp4'}")

    @property
    def claim_path(self) -> Path:
        """Where this clip's one writer signs: `guards.Claim.take(clip.claim_path, clip.folder.locked)`."""
        return self.folder.path(f".{self.name}.claim")

    def remove_parts(self) -> None:
        """Delete what an earlier attempt left half written. Call it with the claim held."""
        for suffix in ("", *_SUFFIXES):
            for end in ("part.mp4", "part.jpg", "mp4.part", "jpg.part", "json.part", "txt.part"):
                (self.folder.root / f"{self.name}{suffix}.{end}").unlink(missing_ok=True)

    def read_sidecar(self) -> dict[str, Any] | None:
        """The sidecar, or None if there is none or it is not ours to read."""
        try:
            record = json.loads(self.sidecar.read_bytes())
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) and isinstance(record.get("output"), dict) else None

    def redo_reason(
        self, spec_hash: str, *, recipe: Any = None, checkpoint: Any = None, version: str = __version__,
        text: Mapping[str, Any] | None = None, is_screened: bool = False,
        made: Any = None, inputs: Mapping[str, str] | None = None,
    ) -> str | None:  # fmt: skip
        """Why the clip must be made (again), or None when it is done.

        `recipe`, `checkpoint`, `made`, `inputs` (SHA-256 by key) and the keys of `text` are compared when given. The output
        file is hashed, so an edit is noticed.
        is_screened: guardrails are on, so a clip that was made without them is not done.
        """
        record = self.read_sidecar()
        if record is None:
            return f"{self.sidecar.name} is missing or not a finished record"
        for key, now, then in (
            ("spec", spec_hash, record.get("spec_hash")),
            ("version", version, (record.get("versions") or {}).get("cosmos_fast")),
            ("recipe", recipe, record.get("recipe")),
            ("checkpoint", checkpoint, record.get("checkpoint")),
            ("maker of a control", made, record.get("made")),
            ("input file", inputs, record.get("inputs")),
            ("text", text, text and {key: (record.get("text") or {}).get(key) for key in text}),
        ):
            if now is not None and now != then:
                return f"{key} changed since it was made"
        if is_screened and not (record.get("guardrail") or {}).get("run"):
            return "it was made without guardrails"
        output = record["output"]
        if output.get("file") not in (f"{self.name}.mp4", f"{self.name}.jpg"):
            return f"{self.sidecar.name} does not name this clip's output"
        path = self.folder.path(output["file"])
        if not path.is_file():
            return f"{path.name} is missing"
        if path.stat().st_size != output.get("bytes") or sha256(path) != output.get("sha256"):
            return f"{path.name} is not the file that was written"
        self.folder.ensure_recorded(
            self.name, output["sha256"], spec_hash=spec_hash, output=path.name, host=socket.gethostname()
        )
        return None

    def finish(
        self, sidecar: Mapping[str, Any], *, files: Sequence[Path] = (), claim: Held | None = None
    ) -> dict[str, Any]:
        """Record a clip whose media are already in place; returns the sidecar as written.

        `sidecar["output"]["frames"]` tells .mp4 from .jpg; `files` are the controls and masks saved too.
        What an earlier record of this clip named and this one does not is deleted. Raises ClipError if the
        media are missing, the claim was lost, or the disk refuses.
        """
        before, record = self.read_sidecar(), copy.deepcopy(dict(sidecar))
        media = self.media(record["output"]["frames"])
        try:
            if not media.is_file() or media.stat().st_size == 0:
                raise ClipError(
                    f"{self.name}: output must be written before its record, got no {media.name}."
                )
            for path in (media, *files):
                _sync(path)
            record["output"] |= {"file": media.name, "bytes": media.stat().st_size, "sha256": sha256(media)}
            _write(self.prompt, (record["spec"].get("prompt") or "").encode())
            record["files"] = {p.name: p.stat().st_size for p in (self.prompt, *files)}
            if claim is not None and not claim.held():
                raise ClipError(f"{self.name}: its claim must be held to the end, got taken over by another.")
            _write(self.sidecar, _json(record, indent=2))
            self._remove_stale(before, {media.name, *record["files"]})
            seconds = sum((s or {}).get("seconds") or 0 for s in (record.get("stages") or {}).values())
            self.folder.record(
                self.name, "done", spec_hash=record["spec_hash"], output=media.name,
                sha256=record["output"]["sha256"], host=socket.gethostname(), seconds=round(seconds, 3),
            )  # fmt: skip
        except (OSError, EnvironmentProblem) as error:
            raise ClipError(f"{self.name}: its record must be written, got {error}.") from error
        return record

    def _remove_stale(self, before: Mapping[str, Any] | None, keep: set[str]) -> None:
        ours = {f"{self.name}{suffix}.{end}" for suffix in ("", *_SUFFIXES) for end in ("mp4", "jpg")}
        named = {before["output"].get("file"), *(before.get("files") or ())} if before else set()
        for filename in sorted((named & ours) - keep):
            self.folder.path(filename).unlink(missing_ok=True)

    def fail(self, reason: str, status: str = "failed", spec_hash: str | None = None) -> None:
        """Record a clip that was not made: `status` "failed" or "refused". Half-written files go."""
        if status == "done":
            raise ValueError("manifest: a clip that failed cannot be recorded as done.")
        self.remove_parts()
        self.folder.record(self.name, status, reason, spec_hash=spec_hash, host=socket.gethostname())
