"""The published prompt encoder, Cosmos-Reason1-7B: every layer's state of every token, normalised and joined.

Letters: S text tokens, D width of the language model, N its layers, E = N D the width of an embedding. A prompt
becomes a chat of two turns, is padded to S = 512 on the right and read causally without a mask, so that pads
attend to the prompt; what the N layers make of a token (the last one after the final norm) is scaled to mean 0
and deviation 1 per layer and laid side by side: (512, 100352). Only the language layers are loaded; the vision
tower and the output head of the checkpoint stay where they are.
"""

from __future__ import annotations

import gc
import hashlib
import json
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from . import registry
from .dispatch import pick_device
from .formats import CheckpointError, EnvironmentProblem
from .safetensors_file import LazyTensor, open_safetensors
from .text_layers import MODES, Layers, check_shapes

TOKENS: Final = 512
WIDTH: Final = 100352
"""28 layers of width 3584."""

SYSTEM: Final = "You are a helpful assistant who will provide prompts to an image generator."
TEMPLATE: Final = 1
"""Version of everything between a prompt and its embedding that is neither weights nor precision."""

EPSILON: Final = 1e-8
HEADROOM: Final = 3 << 30
"""Bytes of GPU memory left free beside resident weights, for activations and for other programs."""

_CONFIG, _TOKENIZER, _TOKENIZER_CONFIG = "config.json", "tokenizer.json", "tokenizer_config.json"
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_PREFIXES: Final = ("model.", "model.language_model.", "language_model.model.", "language_model.", "")
"""Where the language model is in a checkpoint: as published, and as later releases of transformers save it."""

_EMBEDDING: Final = "embed_tokens.weight"


class Reason1:
    """Prompts to (512, E) embeddings with Cosmos-Reason1-7B, or with a model of its kind.

    source: "reason1" or its repository for the published model at its pinned revision, or a local folder in the
    same layout. mode: "bf16" (weights on the device, 13 GB), "int8" (half of that, other results), "offload"
    (one layer at a time, same results as bf16) or "auto": bf16 where the GPU has room, else offload. dtype: of
    weights and arithmetic.

    Making one touches neither network nor weights. `encode` loads; `close` gives the memory back. Raises
    CheckpointError and EnvironmentProblem.
    """

    tokens: Final = TOKENS

    def __init__(
        self,
        source: str | Path = "reason1",
        *,
        mode: str = "auto",
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        if mode not in ("auto", *MODES):
            raise ValueError(f"Reason1: mode must be auto, {', '.join(MODES)}, got {mode!r}.")
        self.published = registry.find_folder(source)
        self.folder = None if self.published else Path(source).expanduser()
        if self.folder is not None and not self.folder.is_dir():
            raise CheckpointError(
                f"text encoder: must be 'reason1' or an existing folder, got {str(source)!r}. "
                "For another repository, download it and give its folder."
            )
        if self.published is not None and self.published.name != "reason1":
            raise CheckpointError(f"text encoder: must be 'reason1' or a folder, got {str(source)!r}.")
        self.mode, self.dtype = mode, dtype
        self.device = pick_device(None if device is None else str(device))
        self.loads = 0
        self._layers: Layers | None = None

    @property
    def width(self) -> int:
        if self.published is not None:
            return WIDTH
        config = self._json(_CONFIG)
        sizes = config.get("text_config") or config
        try:
            return int(sizes["num_hidden_layers"]) * int(sizes["hidden_size"])
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(
                f"{self.folder}/{_CONFIG}: must tell num_hidden_layers and hidden_size, got neither."
            ) from None

    @property
    def precision(self) -> str:
        """What changes results: arithmetic, and weights in 8 bits. Where weights lie does not."""
        return "int8" if self.mode == "int8" else str(self.dtype).removeprefix("torch.")

    @property
    def record(self) -> dict[str, Any]:
        """Which encoder this is, for the sidecar."""
        how = {"precision": self.precision, "mode": self.mode}
        if self.published is not None:
            return {"encoder": self.published.repo, "revision": self.published.revision, **how}
        return {"encoder": str(self.folder), "revision": self._fingerprint(), **how}

    @property
    def identity(self) -> dict[str, Any]:
        """All that an embedding depends on besides the prompt. Kinds of device round differently."""
        source = (
            {"repository": self.published.repo, "revision": self.published.revision}
            if self.published is not None
            else {"folder": self._fingerprint()}
        )
        return source | {
            "template": TEMPLATE, "tokens": TOKENS, "precision": self.precision, "device": self.device.type,
        }  # fmt: skip

    def _fingerprint(self) -> str:
        """Names, sizes and times of change of the weights, and the small files by content."""
        assert self.folder is not None
        digest = hashlib.sha256()
        for path in sorted(self.folder.iterdir()):
            if path.suffix == ".safetensors":
                state = path.stat()
                digest.update(f"{path.name} {state.st_size} {state.st_mtime_ns}\n".encode())
            elif path.name in (_CONFIG, _TOKENIZER, _TOKENIZER_CONFIG, _INDEX):
                digest.update(path.name.encode() + b"\n" + path.read_bytes())
        return digest.hexdigest()

    # --- prompt to ids ---

    def render(self, prompt: str) -> str:
        """The chat that the encoder reads: with the template of its tokenizer, else with the published one."""
        tokenizer = self._loaded_tokenizer()
        if tokenizer.chat_template is None:
            turns = (("system", SYSTEM), ("user", prompt))
            return "".join(f"<|im_start|>{who}\n{text}<|im_end|>\n" for who, text in turns)
        chat = [
            {"role": who, "content": [{"type": "text", "text": text}]}
            for who, text in (("system", SYSTEM), ("user", prompt))
        ]
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=False))

    def tokenize(self, prompt: str) -> Tensor:
        """Ids (S,) int64: padded on the right, or cut to the first S."""
        return self._padded(self._ids(prompt))

    def note(self, prompt: str) -> str:
        """What the user should know about this prompt: that its end is not read; empty otherwise."""
        length = len(self._ids(prompt))
        if length <= TOKENS:
            return ""
        return f"prompt of {length} tokens: only the first {TOKENS}, chat marks included, are read: {prompt[:60]!r}"

    def _ids(self, prompt: str) -> list[int]:
        return list(self._loaded_tokenizer()(self.render(prompt), add_special_tokens=False)["input_ids"])

    def _padded(self, ids: list[int]) -> Tensor:
        pad = self._loaded_tokenizer().pad_token_id
        return torch.tensor((ids + [pad] * (TOKENS - len(ids)))[:TOKENS], dtype=torch.int64)

    # --- ids to embeddings ---

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> list[Tensor]:
        """One (S, E) tensor per prompt, on the CPU, in the dtype of the encoder."""
        if not prompts:
            return []
        ids = [self.tokenize(prompt) for prompt in prompts]
        self.load()
        assert self._layers is not None
        # One prompt at a time within a layer: its bits do not depend on what else is in the batch.
        states = [self._embedding.load()[i].to(self.device, self.dtype)[None] for i in ids]
        positions = torch.arange(TOKENS, device=self.device)[None, None].expand(3, 1, TOKENS)
        turned = self._rotary(states[0], positions)
        depth, width = len(self._weights), states[0].shape[-1]
        results = [torch.empty(TOKENS, depth, width, dtype=self.dtype) for _ in prompts]
        n = 0
        for layer in self._layers:
            for i, x in enumerate(states):
                # Without a mask this attention is causal over all S tokens, pads included.
                x = layer(x, attention_mask=None, position_embeddings=turned, use_cache=False)
                states[i] = x
                results[i][:, n] = normalized(self._norm(x) if n == depth - 1 else x)[0].cpu()
            n += 1
            del layer  # before the next one is on the device; enumerate would hold it too
        for prompt, result in zip(prompts, results, strict=True):
            if not bool(torch.isfinite(result).all()):
                raise CheckpointError(
                    f"text encoder: embeddings must be finite, got NaN or infinity for {prompt[:60]!r}. "
                    "Its weights may be damaged: download them again."
                )
        return [result.flatten(1) for result in results]

    def load(self) -> None:
        """Make ready to encode: files on this disk, checked, and a mode chosen. Weights follow in `encode`."""
        if self._layers is not None:
            return
        package = _transformers()
        config = self._text_config(package)
        tensors = self._open_weights()
        with torch.device("meta"):
            model = package.Qwen2_5_VLTextModel(config)
        weights: list[dict[str, LazyTensor]] = [{} for _ in model.layers]
        rest = {}
        for name, tensor in tensors.items():
            head, _, tail = name.partition(".")
            number, _, inner = tail.partition(".")
            if head == "layers" and number.isdigit() and int(number) < len(weights):
                weights[int(number)][inner] = tensor
            else:
                rest[name] = tensor
        layers = Layers(list(model.layers), list(weights), self.device, self.dtype, "offload")
        check_shapes("text: embedding", model.embed_tokens, {"weight": rest.pop(_EMBEDDING)})
        norm = {name.removeprefix("norm."): tensor for name, tensor in rest.items()}
        check_shapes("text: final norm", model.norm, norm)
        model.norm.load_state_dict(
            {name: tensor.load().to(self.device, self.dtype, copy=True) for name, tensor in norm.items()},
            assign=True,
        )
        self._embedding, self._weights = tensors[_EMBEDDING], weights
        self._norm = model.norm.requires_grad_(False)
        # Made again: its table of frequencies is computed, not loaded, so on the meta device there is none.
        self._rotary = type(model.rotary_emb)(config=config).to(self.device)
        self.mode = self.chosen_mode(layers.bytes)
        layers.mode = self.mode
        self._layers = layers
        self.loads += 1

    def chosen_mode(self, needed: int) -> str:
        """The mode asked for; for auto by free GPU memory. On a CPU the file itself is the memory."""
        if self.mode != "auto":
            return self.mode
        if self.device.type != "cuda":
            return "offload"
        free = torch.cuda.mem_get_info(self.device)[0]
        return "bf16" if free >= needed + HEADROOM else "offload"

    def close(self) -> None:
        """Give all memory back; the next `encode` loads again."""
        self._layers = None
        self.__dict__.update(dict.fromkeys(("_norm", "_rotary", "_embedding", "_weights", "_tokenizer")))
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # --- files ---

    def _file(self, name: str) -> Path:
        if self.published is not None:
            return registry.fetch(self.published, name)
        assert self.folder is not None
        if not (self.folder / name).is_file():
            raise CheckpointError(
                f"text encoder: {self.folder} must hold {name}, got none. "
                f"It must be laid out like {registry.REASON1.repo}."
            )
        return self.folder / name

    def _json(self, name: str) -> dict[str, Any]:
        path = self._file(name)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError("no object")
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: must be a JSON object, got: {error}. Download it again."
            ) from None
        return content

    def _text_config(self, package: Any) -> Any:
        content = self._json(_CONFIG)
        kind = content.get("model_type")
        if kind == "qwen2_5_vl":
            config = package.Qwen2_5_VLConfig.from_dict(content).get_text_config()
        elif kind == "qwen2_5_vl_text":
            config = package.Qwen2_5_VLTextConfig.from_dict(content)
        else:
            raise CheckpointError(f"text encoder: model_type must be qwen2_5_vl, got {kind!r} in {_CONFIG}.")
        if set(config.layer_types) != {"full_attention"}:
            raise CheckpointError("text encoder: attention must reach all tokens, got a sliding window.")
        config._attn_implementation = "sdpa"
        return config

    def _open_weights(self) -> dict[str, LazyTensor]:
        """The language model's tensors by their short names; only the files that hold some are fetched."""
        has_index = self.published is not None or (self.folder / _INDEX).is_file()  # type: ignore[operator]
        if has_index:
            table = self._json(_INDEX).get("weight_map")
            if not isinstance(table, dict) or any(Path(str(file)).name != file for file in table.values()):
                raise CheckpointError(
                    f"{_INDEX}: must map tensors to files beside it, got {str(table)[:80]}."
                )
        else:
            table = dict.fromkeys(open_safetensors(self._file(_SINGLE)).tensors, _SINGLE)
        prefix = next((prefix for prefix in _PREFIXES if prefix + _EMBEDDING in table), None)
        if prefix is None:
            names = ", ".join(sorted(table)[:5])
            raise CheckpointError(
                f"text encoder: must hold the language model of {registry.REASON1.repo}, got {names}."
            )
        wanted = {
            name.removeprefix(prefix): (name, file)
            for name, file in table.items()
            if name.startswith(tuple(prefix + part for part in ("layers.", "norm.", _EMBEDDING)))
        }
        files = {
            file: open_safetensors(self._file(file)) for file in sorted({file for _, file in wanted.values()})
        }
        for name, file in wanted.values():
            if name not in files[file].tensors:
                raise CheckpointError(f"{file}: must hold {name}, which its index names. Download it again.")
        return {short: files[file].tensors[name] for short, (name, file) in wanted.items()}

    _tokenizer: Any = None

    def _loaded_tokenizer(self) -> Any:
        if self._tokenizer is None:
            package = _transformers()
            settings = self._json(_TOKENIZER_CONFIG)
            pad = settings.get("pad_token")
            pad = pad.get("content") if isinstance(pad, dict) else pad
            path = self._file(_TOKENIZER)
            try:
                tokenizer = package.PreTrainedTokenizerFast(
                    tokenizer_file=str(path), chat_template=settings.get("chat_template")
                )
            except Exception as error:  # the tokenizers library raises the bare class
                raise CheckpointError(
                    f"{path}: must be a tokenizer, got: {error}. Download it again."
                ) from None
            known = tokenizer.get_vocab()
            for token in ("<|im_start|>", "<|im_end|>", pad):
                if token not in known:
                    raise CheckpointError(
                        f"text encoder: the tokenizer must know {token or 'a pad_token'}, got none."
                    )
            tokenizer.pad_token = pad
            self._tokenizer = tokenizer
        return self._tokenizer


def normalized(x: Tensor) -> Tensor:
    """x less its mean over its deviation (n - 1) along the last axis, each step rounded to the dtype of x."""
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + EPSILON)


def _transformers() -> Any:
    try:
        import transformers
        from transformers import Qwen2_5_VLTextModel  # noqa: F401
    except ImportError as error:
        raise EnvironmentProblem(
            f"text encoder: needs the package transformers, version 5 or later, got: {error}. "
            "Run: pip install 'transformers>=5'"
        ) from None
    return transformers
