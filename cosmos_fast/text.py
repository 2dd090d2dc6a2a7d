"""Prompts to embeddings; nothing else knows which encoder made them.

Shape letters: S text tokens, E text width. `FileText` reads embeddings made beforehand (the 7B encoder of the
published system gives S = 512, E = 100352); `TinyText` is the small trainable encoder of the embedded model.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .formats import CheckpointError, SpecError

_FORMAT: Final = "cosmos-fast text embeddings 1"
_SHOWN: Final = 60
_TOKEN = re.compile(r"\w+|[^\w\s]")
_CONFIG: Final = ("vocabulary", "width", "tokens", "layers", "heads")


@runtime_checkable
class TextEncoder(Protocol):
    """Anything that turns prompts into token embeddings of one fixed shape."""

    @property
    def width(self) -> int:
        """E, width of one token."""

    @property
    def tokens(self) -> int:
        """S, tokens per prompt, padding included."""

    def encode(self, prompts: list[str]) -> list[Tensor]:
        """One (S, E) floating tensor per prompt, in order; padding rows are part of the result."""


def describe_encoder(encoder: TextEncoder) -> dict[str, Any]:
    """Which encoder this is, for a sidecar: its own `record` where it has one, else its class."""
    record = getattr(encoder, "record", None)
    return {"encoder": type(encoder).__name__} if record is None else dict(record)


def unread(encoder: TextEncoder, prompts: Mapping[str, str]) -> list[str]:
    """A line for each prompt, given by its key, of which this encoder knows at once that it reads a part alone."""
    note = getattr(encoder, "note", None)
    found = {key: note(prompt) for key, prompt in prompts.items()} if note else {}
    return [f"{key}: {text}" for key, text in found.items() if text]


def prompt_key(prompt: str) -> str:
    """Name of a prompt in an embedding file: SHA-256 of its UTF-8 bytes."""
    return hashlib.sha256(prompt.encode()).hexdigest()


class FileText:
    """Embeddings from a safetensors file with one (S, E) tensor per prompt under `prompt_key(prompt)`.

    Only the header is read at construction. `encode` returns tensors in the stored dtype on the CPU.
    Raises CheckpointError for a file that cannot be used, SpecError for a prompt that is not in it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with _open(self.path) as file:
            self.metadata: dict[str, str] = file.metadata() or {}
            self._keys = frozenset(file.keys())
            shapes = {tuple(file.get_slice(key).get_shape()) for key in self._keys}
        shape = shapes.pop() if len(shapes) == 1 else ()
        if len(shape) != 2 or 0 in shape:
            found = shape or sorted(shapes) or "no tensors"
            raise CheckpointError(f"text: tensors in {self.path} must share one shape (S, E), got {found}.")
        self.tokens, self.width = int(shape[0]), int(shape[1])

    @property
    def record(self) -> dict[str, str]:
        """Which file this is, and what its writer said about it."""
        return {"encoder": "file", "path": str(self.path), **self.metadata}

    def __contains__(self, prompt: str) -> bool:
        return prompt_key(prompt) in self._keys

    def encode(self, prompts: list[str]) -> list[Tensor]:
        """One (S, E) tensor per prompt."""
        for prompt in prompts:
            if prompt not in self:
                raise SpecError(
                    f"text: prompts must be in {self.path}, got {prompt[:_SHOWN]!r}. "
                    "Add it with tools/make_embeddings.py."
                )
        with _open(self.path) as file:
            embeddings = [file.get_tensor(prompt_key(prompt)) for prompt in prompts]
        for prompt, embedding in zip(prompts, embeddings, strict=True):
            if not embedding.is_floating_point() or not _finite(embedding):
                what = "infinities or NaN" if embedding.is_floating_point() else str(embedding.dtype)
                rule = f"text: embeddings in {self.path} must be finite floats, got {what}"
                raise CheckpointError(f"{rule} for {prompt[:_SHOWN]!r}.")
        return embeddings


def _finite(x: Tensor) -> bool:
    """One pass without a mask: of 51 million values `isfinite().all()` takes longer than reading them does."""
    return all(bool(end.isfinite()) for end in x.aminmax())


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"text: {path} must be a safetensors file, got {str(error)!r}.") from None


def write_embeddings(
    path: str | os.PathLike[str],
    embeddings: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write {prompt: (S, E) tensor} as a file for `FileText`; the file appears whole or not at all.

    Raises ValueError unless all tensors are finite floats of one shape and dtype.
    """
    if not embeddings:
        raise ValueError("write_embeddings: at least one prompt is required, got none.")
    first = next(iter(embeddings.values()))
    for prompt, embedding in embeddings.items():
        label = f"for {prompt[:_SHOWN]!r}"
        if embedding.ndim != 2 or 0 in embedding.shape:
            raise ValueError(
                f"write_embeddings: tensors must be (S, E), got {tuple(embedding.shape)} {label}."
            )
        if embedding.shape != first.shape or embedding.dtype != first.dtype:
            raise ValueError(
                f"write_embeddings: tensors must share one shape and dtype, got {tuple(embedding.shape)} "
                f"{embedding.dtype} {label} after {tuple(first.shape)} {first.dtype}."
            )
        if not embedding.is_floating_point() or not _finite(embedding):
            raise ValueError(f"write_embeddings: tensors must be finite floats, got other values {label}.")
    _save(
        Path(path),
        {prompt_key(prompt): embedding for prompt, embedding in embeddings.items()},
        {"format": _FORMAT, **(metadata or {})},
    )


def _save(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    part = path.with_name(f".{path.name}.part")
    try:
        # clone: safetensors refuses tensors that share memory, such as one embedding under two prompts.
        owned = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        part.touch()
        mode = part.stat().st_mode
        save_file(owned, part, metadata=metadata)
        part.chmod(mode)  # safetensors leaves 0600, which hides the file from a group
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class _Layer(nn.Module):
    """Pre-norm transformer layer: x + attention(ln(x)), then x + mlp(ln(x)).

    Shapes: x (B, S, E), returns the same. Pad rows attend and are attended to, as in the published encoder.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attn_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attn_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.attn_norm(x)).unflatten(-1, (3, self.heads, -1))
        q_BNSK, k_BNSK, v_BNSK = qkv.permute(2, 0, 3, 1, 4)
        mixed_BNSK = F.scaled_dot_product_attention(q_BNSK, k_BNSK, v_BNSK)
        x = x + self.attn_out(mixed_BNSK.transpose(1, 2).flatten(-2))
        return x + self.fc2(F.gelu(self.fc1(self.mlp_norm(x))))


class TinyText(nn.Module):
    """Small trainable encoder: words and punctuation hashed to a table, plus position, plus a few layers.

    Two fresh instances with the same arguments agree bit for bit, and making one leaves torch's global random
    state as it was. Words that fall into one bucket of the `vocabulary` are the same word to this model.
    """

    def __init__(
        self,
        vocabulary: int = 4096,
        width: int = 256,
        tokens: int = 32,
        layers: int = 1,
        heads: int = 4,
        seed: int = 0,
    ) -> None:
        if min(vocabulary - 1, width, tokens, layers, heads) < 1 or width % heads:
            sizes = f"vocabulary {vocabulary}, width {width}, tokens {tokens}, layers {layers}, heads {heads}"
            raise ValueError(f"TinyText: sizes must be positive and heads must divide width, got {sizes}.")
        super().__init__()
        self.vocabulary, self.width, self.tokens, self.heads = vocabulary, width, tokens, heads
        with torch.device("meta"):  # no default initialisation, so no draw from the global generator
            self.embed = nn.Embedding(vocabulary, width)
            self.position = nn.Parameter(torch.empty(tokens, width))
            self.blocks = nn.ModuleList(_Layer(width, heads) for _ in range(layers))
            self.norm = nn.LayerNorm(width)
        self.to_empty(device="cpu")
        self._initialise(seed)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                weight.zero_()
            elif "norm" in name:
                weight.fill_(1.0)
            else:
                fan_in = 1 if name.startswith(("embed", "position")) else weight.shape[1]
                weight.normal_(0.0, fan_in**-0.5, generator=generator)

    def tokenize(self, prompt: str) -> Tensor:
        """Bucket numbers (S,) int64 of the lower-case words and marks; 0 pads, what exceeds S is cut."""
        found = _TOKEN.findall(prompt.lower())[: self.tokens]
        digests = (hashlib.blake2b(token.encode(), digest_size=8).digest() for token in found)
        buckets = [1 + int.from_bytes(digest, "big") % (self.vocabulary - 1) for digest in digests]
        return torch.tensor(buckets + [0] * (self.tokens - len(buckets)), dtype=torch.int64)

    def note(self, prompt: str) -> str:
        """What a caller should know about this prompt, or nothing."""
        count = len(_TOKEN.findall(prompt))
        return "" if count <= self.tokens else f"the first {self.tokens} of {count} words and marks are read."

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Bucket numbers (B, S) to embeddings (B, S, E); the way to train it."""
        x_BSE = self.embed(tokens_BS) + self.position
        for block in self.blocks:
            x_BSE = block(x_BSE)
        return self.norm(x_BSE)

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> list[Tensor]:
        """One (S, E) float32 tensor per prompt, on the device of the weights."""
        # One prompt at a time, so that its bits do not depend on what else is in the batch.
        device = self.position.device
        return [self(self.tokenize(prompt).to(device)[None])[0].float() for prompt in prompts]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and sizes as one safetensors file."""
        sizes = (self.vocabulary, self.width, self.tokens, len(self.blocks), self.heads)
        config = dict(zip(_CONFIG, sizes, strict=True))
        _save(Path(path), self.state_dict(), {"tiny_text": json.dumps(config)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TinyText:
        """The encoder that `save` wrote. Raises CheckpointError for anything else."""
        with _open(Path(path)) as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        try:
            config = json.loads(metadata["tiny_text"])
            encoder = cls(**{key: int(config[key]) for key in _CONFIG})
            encoder.load_state_dict(state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"text: {path} must be a TinyText file, got {str(error)[:200]!r}."
            ) from None
        return encoder
