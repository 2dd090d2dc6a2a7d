"""Embeddings kept on disk, so that a heavy prompt encoder is loaded only for prompts never seen before.

`prepare` encodes what is missing, group by group, then frees the encoder: call it before anything else takes the
device's memory. `encode` then reads from disk. Letters: S text tokens, E text width.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from .disk_cache import CACHE_HOME, DEFAULT_LIMIT, DiskCache, content_key
from .formats import EnvironmentProblem
from .reason1 import Reason1

GROUP: Final = 16
"""Prompts encoded at once: 1.6 GB of results in host memory at the published size."""

_SUFFIX: Final = ".safetensors"


class HeavyEncoder(Protocol):
    """A TextEncoder that loads when first asked to encode, and gives its memory back."""

    @property
    def width(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def identity(self) -> Mapping[str, Any]:
        """All that an embedding depends on besides its prompt."""

    @property
    def record(self) -> Mapping[str, Any]:
        """What to tell about it in a sidecar."""

    def note(self, prompt: str) -> str: ...
    def encode(self, prompts: list[str]) -> list[Tensor]: ...
    def close(self) -> None: ...


class CachedText:
    """A TextEncoder that serves embeddings from a cache folder and fills it with `encoder` where needed.

    `notes` tells, by line, what happened besides: damaged entries that were made again, prompts that were cut.
    """

    def __init__(self, encoder: HeavyEncoder, cache: DiskCache) -> None:
        self.encoder, self.cache = encoder, cache
        self.notes: list[str] = []
        self.tokens, self.width = encoder.tokens, encoder.width
        self._identity = dict(encoder.identity)
        self._ready: set[str] = set()

    @property
    def record(self) -> dict[str, Any]:
        """Which encoder the embeddings are of."""
        return dict(self.encoder.record)

    def key(self, prompt: str) -> str:
        """The entry of a prompt."""
        return content_key("text", self._identity, prompt) + _SUFFIX

    def prepare(
        self,
        prompts: Sequence[str],
        between: Callable[[], None] = lambda: None,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Have all of `prompts` on disk; afterwards the encoder holds no memory.

        between: called before every group, where the caller may raise to stop. report: told once what will be done. Entries of these prompts are not
        removed to keep the cache's limit. Raises EnvironmentProblem when the disk lacks room, and what the
        encoder raises.
        """
        unique = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._ready]
        missing = [prompt for prompt in unique if self._read(prompt) is None]
        if missing:
            report(f"text: encoding {len(missing)} prompts with {self.record.get('encoder')}")
        for _ in self._made(missing, {self.key(prompt) for prompt in prompts}, between):
            pass
        self._ready.update(unique)

    def encode(self, prompts: list[str]) -> list[Tensor]:
        """One (S, E) tensor per prompt, on the CPU; prompts that are not on disk are encoded first."""
        found = {prompt: self._read(prompt) for prompt in prompts}
        missing = [prompt for prompt, embedding in found.items() if embedding is None]
        # Not read back: a process that shares the folder may have needed the room already.
        made = dict(self._made(missing, {self.key(prompt) for prompt in prompts}, lambda: None))
        return [made[prompt] if (held := found[prompt]) is None else held for prompt in prompts]

    def _made(
        self, missing: list[str], keep: set[str], between: Callable[[], None]
    ) -> Iterator[tuple[str, Tensor]]:
        """Encode and write `missing`, group by group, then free the encoder."""
        if not missing:
            return
        self._check_room(len(missing))
        try:
            for start in range(0, len(missing), GROUP):
                between()
                group = missing[start : start + GROUP]
                for prompt, embedding in zip(group, self.encoder.encode(group), strict=True):
                    embedding = embedding.detach().cpu().contiguous()
                    self._write(prompt, embedding, keep)
                    yield prompt, embedding
        finally:
            self.encoder.close()

    def _check_room(self, count: int) -> None:
        needed = count * self.tokens * self.width * 2  # bf16 as published
        folder = self.cache.folder.absolute()
        home = next(path for path in (folder, *folder.parents) if path.is_dir())
        free = shutil.disk_usage(home).free + self.cache.size()
        if needed > free:
            raise EnvironmentProblem(
                f"cache: {self.cache.folder} needs {needed / 1e9:.1f} GB for {count} prompts, got "
                f"{free / 1e9:.1f} GB. Free space, or pass --cache-dir FOLDER on a larger disk."
            )

    def _write(self, prompt: str, embedding: Tensor, keep: set[str]) -> None:
        from safetensors.torch import save_file

        metadata = {
            "sha256": _digest(embedding), "identity": json.dumps(self._identity, sort_keys=True),
            "prompt": prompt, "note": self.encoder.note(prompt),
        }  # fmt: skip
        self._tell(metadata["note"])
        self.cache.put(self.key(prompt), lambda path: save_file({"text": embedding}, path, metadata), keep)

    def _read(self, prompt: str) -> Tensor | None:
        """The embedding on disk; None for a miss, and with a note for an entry that does not read back."""
        key = self.key(prompt)
        path = self.cache.get(key)
        if path is None:
            return None
        try:
            embedding, metadata = _load(path)
            if tuple(embedding.shape) != (self.tokens, self.width):
                raise ValueError(f"shape {tuple(embedding.shape)}")
            if _digest(embedding) != metadata.get("sha256"):
                raise ValueError("other content than was written")
        except FileNotFoundError:
            return None
        except _damage() as error:
            self._tell(f"cache: {path.name[:16]}... is damaged ({error}); made again")
            self.cache.discard(key)
            return None
        self._tell(metadata.get("note", ""))
        return embedding

    def _tell(self, note: str) -> None:
        if note and note not in self.notes:
            self.notes.append(note)


def _damage() -> tuple[type[Exception], ...]:
    from safetensors import SafetensorError

    return (SafetensorError, ValueError, KeyError, TypeError, OSError, RuntimeError)


def _load(path: Path) -> tuple[Tensor, dict[str, str]]:
    from safetensors.torch import load

    # One opening: safe_open asks for the name twice, and between the two another process may remove the entry.
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return load(data)["text"], dict(header["__metadata__"])


def _digest(embedding: Tensor) -> str:
    return hashlib.sha256(embedding.view(torch.uint8).numpy().tobytes()).hexdigest()


def published_text(
    source: str | Path = "reason1",
    *,
    mode: str = "auto",
    device: str | torch.device | None = None,
    folder: str | Path = CACHE_HOME,
    limit_bytes: int = DEFAULT_LIMIT,
) -> CachedText:
    """The published prompt encoder (`reason1.Reason1`) behind a cache in `folder`/text; loads nothing yet."""
    return CachedText(
        Reason1(source, mode=mode, device=device), DiskCache(Path(folder) / "text", limit_bytes)
    )
