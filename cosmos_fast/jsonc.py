"""JSON as people write it: `//` and `/* */` comments and trailing commas, and errors with line and column.

Stricter than the standard library elsewhere: duplicate keys, NaN, Infinity, numbers too large for a float,
lone surrogates and nesting deeper than `MAX_DEPTH` are errors. Only the standard library is imported.
"""

from __future__ import annotations

import bisect
import math
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .formats import SpecError

MAX_DEPTH: Final = 64
MAX_BYTES: Final = 4 * 2**20
"""Largest document: one .json file, or one line of a .jsonl file."""

MAX_LINES_BYTES: Final = 64 * 2**20
"""Largest .jsonl file; 5,000 records with long prompts are about 10 MiB."""

SUFFIXES: Final = (".json", ".jsonc", ".jsonl")
_BOM: Final = b"\xef\xbb\xbf"
_BLANK = re.compile(r"\s*(//.*)?")

KeyPath = tuple[str | int, ...]
_MAX_DIGITS: Final = 400

_SPACE = re.compile(r"[ \t\r\n]+")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_WORD = re.compile(r"-?[A-Za-z_][A-Za-z_0-9]*")
_HEX = re.compile(r"[0-9a-fA-F]{4}")
_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_WORDS = {"true": True, "false": False, "null": None}


class JsonError(SpecError):
    """Text that is not JSON. `reason` is the sentence without the place; `line` and `column` count from 1."""

    def __init__(self, reason: str, line: int, column: int) -> None:
        super().__init__(f"line {line}, column {column}: {reason}")
        self.reason, self.line, self.column = reason, line, column


class Document:
    """A parsed text: `value`, and `where(path)` giving (line, column) of a key or list item."""

    def __init__(self, text: str, first_line: int = 1) -> None:
        self._text, self._first_line, self._at = text, first_line, 0
        self._offsets: dict[KeyPath, int] = {}
        self._line_ends: list[int] = []
        self._skip()
        self._offsets[()] = self._at
        self.value: Any = self._value((), 0)
        self._skip()
        if self._at < len(text):
            raise self._unexpected("expected nothing after the value")

    def where(self, path: KeyPath) -> tuple[int, int]:
        """Line and column of `path`; of its nearest known parent when the path itself is not in the text."""
        while path not in self._offsets:
            path = path[:-1]
        return self._place(self._offsets[path])

    def _place(self, offset: int) -> tuple[int, int]:
        if not self._line_ends:
            self._line_ends = [match.start() for match in re.finditer("\n", self._text)] or [len(self._text)]
        line = bisect.bisect_left(self._line_ends, offset)
        return self._first_line + line, offset - (self._line_ends[line - 1] if line else -1)

    def _error(self, reason: str, offset: int) -> JsonError:
        return JsonError(reason, *self._place(offset))

    def _unexpected(self, rule: str) -> JsonError:
        found = self._text[self._at : self._at + 1]
        return self._error(
            f"{rule}, got {found!r}." if found else f"{rule}, got the end of the text.", self._at
        )

    def _skip(self) -> None:
        """Move over white space and comments."""
        text = self._text
        while True:
            if match := _SPACE.match(text, self._at):
                self._at = match.end()
            if text.startswith("//", self._at):
                end = text.find("\n", self._at)
                self._at = len(text) if end < 0 else end
            elif text.startswith("/*", self._at):
                end = text.find("*/", self._at + 2)
                if end < 0:
                    raise self._error("comment: must end with '*/', got the end of the text.", self._at)
                self._at = end + 2
            else:
                return

    def _value(self, path: KeyPath, depth: int) -> Any:
        mark = self._text[self._at : self._at + 1]
        if mark == '"':
            return self._string()
        if mark == "{" or mark == "[":
            if depth == MAX_DEPTH:
                raise self._error(f"nesting must be at most {MAX_DEPTH} deep, got more.", self._at)
            return self._object(path, depth + 1) if mark == "{" else self._array(path, depth + 1)
        return self._scalar()

    def _object(self, path: KeyPath, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        self._at += 1
        self._skip()
        while self._text[self._at : self._at + 1] != "}":
            start = self._at
            if self._text[start : start + 1] != '"':
                raise self._unexpected("expected a key in double quotes or '}'")
            key = self._string()
            if key in found:
                line, _ = self._place(self._offsets[(*path, key)])
                raise self._error(
                    f"keys must be unique, got {key!r} again. It is first set in line {line}.", start
                )
            self._offsets[(*path, key)] = start
            self._skip()
            if self._text[self._at : self._at + 1] != ":":
                raise self._unexpected(f"expected ':' after key {key!r}")
            self._at += 1
            self._skip()
            found[key] = self._value((*path, key), depth)
            self._comma("}")
        self._at += 1
        return found

    def _array(self, path: KeyPath, depth: int) -> list[Any]:
        found: list[Any] = []
        self._at += 1
        self._skip()
        while self._text[self._at : self._at + 1] != "]":
            item = (*path, len(found))
            self._offsets[item] = self._at
            found.append(self._value(item, depth))
            self._comma("]")
        self._at += 1
        return found

    def _comma(self, closing: str) -> None:
        self._skip()
        mark = self._text[self._at : self._at + 1]
        if mark == ",":
            self._at += 1
            self._skip()
        elif mark != closing:
            raise self._unexpected(f"expected ',' or '{closing}'")

    def _string(self) -> str:
        text, start, parts = self._text, self._at, []
        self._at += 1
        while True:
            match = _PLAIN.match(text, self._at)
            assert match is not None, "the pattern also matches nothing"
            parts.append(match.group())
            self._at = match.end()
            mark = text[self._at : self._at + 1]
            if mark == '"':
                self._at += 1
                return "".join(parts)
            if mark in ("", "\n", "\r"):
                raise self._error("string: must end in its own line, got no closing '\"'.", start)
            if mark != "\\":
                raise self._unexpected("string: control characters must be escaped")
            parts.append(self._escape())

    def _escape(self) -> str:
        start = self._at
        kind = self._text[start + 1 : start + 2]
        if kind in _ESCAPES and kind:
            self._at += 2
            return _ESCAPES[kind]
        if kind != "u":
            shown = "\\" + kind
            raise self._error(f"string: unknown escape, got {shown}. Write \\\\ for a backslash.", start)
        code = self._code_unit(start)
        if 0xD800 <= code < 0xDC00 and self._text.startswith("\\u", self._at):
            low = self._code_unit(self._at)
            if 0xDC00 <= low < 0xE000:
                return chr(0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00))
        if 0xD800 <= code < 0xE000:
            raise self._error("string: surrogates must come in pairs, got half of one.", start)
        return chr(code)

    def _code_unit(self, start: int) -> int:
        match = _HEX.match(self._text, start + 2)
        if match is None:
            raise self._error("string: \\u needs four hexadecimal digits.", start)
        self._at = match.end()
        return int(match.group(), 16)

    def _scalar(self) -> Any:
        text, start = self._text, self._at
        if (word := _WORD.match(text, start)) is not None:
            name = word.group()
            if name in _WORDS:
                self._at = word.end()
                return _WORDS[name]
            if name.lstrip("-").lower() in ("nan", "infinity", "inf"):
                raise self._error(f"numbers must be finite, got {name}.", start)
            meant = "null" if name.lower() == "none" else name.lower()
            hint = f"Write {meant}." if meant in _WORDS else "Text needs double quotes."
            raise self._error(f"expected a value, got {name[:40]}. {hint}", start)
        number = _NUMBER.match(text, start)
        if number is None:
            hint = " Text needs double quotes." if text.startswith("'", start) else ""
            error = self._unexpected("expected a value")
            raise JsonError(error.reason + hint, error.line, error.column)
        following = text[number.end() : number.end() + 1]
        if following.isalnum() or following in (".", "_", "+", "-") and following:
            raise self._error(
                f"number: must be plain decimal, got {text[start : start + 20].split()[0]}.", start
            )
        digits = number.group()
        if len(digits) > _MAX_DIGITS:
            raise self._error(
                f"number: must have at most {_MAX_DIGITS} characters, got {len(digits)}.", start
            )
        self._at = number.end()
        if number.group(1) is None and number.group(2) is None:
            return int(digits)
        value = float(digits)
        if math.isinf(value):
            raise self._error(f"numbers must be finite, got {digits}.", start)
        return value


def parse(text: str, first_line: int = 1) -> Document:
    """Parse one JSON document. Raises JsonError with line and column; lines count from `first_line`."""
    return Document(text, first_line)


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """Content of a small regular file. Raises SpecError for anything else (a FIFO is never opened)."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "something else"
            raise SpecError(f"file: must be a regular file, got {kind}.")
        if status.st_size > limit:
            raise SpecError(f"file: must be at most {limit:,} bytes, got {status.st_size:,}.")
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, SpecError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise SpecError(f"file: must be readable, got {reason!r}.") from None
    if len(data) > limit:  # it grew since stat
        raise SpecError(f"file: must be at most {limit:,} bytes, got more.")
    if data.startswith(b"version https://git-lfs"):
        raise SpecError("file: must hold its content, got a Git LFS pointer. Run 'git lfs pull'.")
    return data


def decode(data: bytes, first_line: int = 1) -> str:
    """UTF-8 text, a byte order mark dropped. Raises JsonError at the first byte that is not UTF-8."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise JsonError("text: must be UTF-8, got a UTF-16 byte order mark.", first_line, 1)
    data = data.removeprefix(_BOM)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start)
        column = error.start - data.rfind(b"\n", 0, error.start)
        reason = f"text: must be UTF-8, got byte 0x{data[error.start]:02x}."
        raise JsonError(reason, first_line + line, column) from None


@dataclass(frozen=True)
class Record:
    """One object of a file: the value, the name it gets by default, and where its keys stand."""

    file: Path
    name: str
    document: Document

    @property
    def value(self) -> Any:
        return self.document.value

    def where(self, path: KeyPath) -> str:
        """`file:line` of a key."""
        return f"{self.file}:{self.document.where(path)[0]}"


def records(path: Path, problems: list[str]) -> Iterator[Record]:
    """Each object of a .json or .jsonl file, or of all such files of a folder; faults go to `problems`.

    In a .jsonl file blank lines and lines that hold only a comment are passed over; the default name is the
    file stem, with the line number after it for .jsonl.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not files:
            problems.append(f"{path}: folder must hold {' or '.join(SUFFIXES)} files, got none.")
        for file in files:
            yield from records(file, problems)
        return
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        hint = " YAML is not read; write JSON." if kind in (".yaml", ".yml") else ""
        problems.append(f"{path}: spec files must end in {' or '.join(SUFFIXES)}, got {path.name!r}.{hint}")
        return
    try:
        data = read_bytes(path, MAX_BYTES if kind != ".jsonl" else MAX_LINES_BYTES)
    except SpecError as error:
        problems.append(f"{path}: {error}")
        return
    # Only \n ends a line: U+2028 and the like may stand inside a JSON string.
    parts = enumerate(data.removeprefix(_BOM).split(b"\n"), 1) if kind == ".jsonl" else [(1, data)]
    empty = True
    for number, part in parts:
        try:
            if len(part) > MAX_BYTES:
                raise JsonError(f"line: must be at most {MAX_BYTES:,} bytes, got {len(part):,}.", number, 1)
            text = decode(part, number)
            if kind == ".jsonl" and _BLANK.fullmatch(text):
                continue
            empty = False
            yield Record(
                path, f"{path.stem}-{number}" if kind == ".jsonl" else path.stem, parse(text, number)
            )
        except JsonError as error:
            empty = False
            problems.append(f"{path}:{error.line}:{error.column}: {error.reason}")
    if empty:
        problems.append(f"{path}: file must hold at least one object, got none.")
