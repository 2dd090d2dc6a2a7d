"""The tiny model that ships inside the package: trained, small enough for a CPU, of the published architecture.

Its folder holds one packed file for the frozen base, one for each control branch, the few-step edge network as a
difference to base and edge, the video VAE and the prompt encoder. `index.json` lists them with their SHA-256 and
the sizes of every network; nothing is used that does not match. Made by tools/pack_model.py.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from .config import NetworkConfig, branch_prefixes, published_shapes
from .formats import CONTROLS, DISTILLED, MODELS, CheckpointError, EnvironmentProblem
from .lowbit import read_packed
from .network_keys import check_names

NAME: Final = "tiny"
"""Id of the embedded model wherever a checkpoint is named."""

FORMAT: Final = "cosmos-fast embedded 1"
FOLDER: Final = Path(__file__).resolve().parent / "data" / NAME
INDEX: Final = "index.json"

_IMAGE = re.compile(r"img_context_proj\.|\.(q_img|k_img|v_img|q_img_norm|k_img_norm)\.")


def without_image(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that a network without image context keeps."""
    return {name: tensor for name, tensor in tensors.items() if not _IMAGE.search(name)}


def parts(model: str) -> tuple[str, ...]:
    """Stems of the packed files that make up a network, in the order they are laid over each other."""
    if model not in MODELS:
        raise CheckpointError(f"embedded model: must be one of {', '.join(MODELS)}, got {model!r}.")
    if model == "multi":
        return ("base", *CONTROLS)
    return ("base", "edge", "distilled") if model == DISTILLED else ("base", model)


def files(model: str) -> dict[str, Path]:
    """The packed files of a network by stem; EnvironmentProblem if the installation lacks them."""
    index()
    return {part: FOLDER / f"{part}.safetensors" for part in parts(model)}


def vae_file() -> Path:
    return FOLDER / "vae.safetensors"


def index() -> dict[str, Any]:
    """`index.json`: format, card, networks, text, files. EnvironmentProblem where it is not installed."""
    path = FOLDER / INDEX
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise EnvironmentProblem(
            f"embedded model: its weights must be in {FOLDER}, got no {INDEX}. "
            "Install cosmos-fast again, or name other weights with --checkpoint."
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path}: must be JSON, got {error}. Install cosmos-fast again.") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        got = found.get("format") if isinstance(found, dict) else type(found).__name__
        raise CheckpointError(f"{path}: must be {FORMAT!r}, got {got!r}. Install cosmos-fast again.")
    return found


def card() -> dict[str, Any]:
    """What the model was made for: chunk_frames, resolutions, size, defaults of a request."""
    return dict(index()["card"])


def config(model: str) -> NetworkConfig:
    """Sizes of one of MODELS."""
    parts(model)
    networks = index()["networks"]
    if model == "multi":
        return replace(_config(networks["edge"]), image_width=None, branches=len(CONTROLS))
    return _config(networks[model])


def _config(values: Mapping[str, Any]) -> NetworkConfig:
    return NetworkConfig.from_json(json.dumps(values))


def state(model: str) -> tuple[NetworkConfig, dict[str, Tensor]]:
    """(sizes, published name -> fp32 tensor) of "edge", "vis", "depth", "seg", "multi" or "edge/distilled".

    Raises CheckpointError if a file does not match the index, EnvironmentProblem if it is not installed.
    """
    found, sizes = {part: _read(part) for part in parts(model)}, config(model)
    tensors = found["base"]
    if model == DISTILLED:
        tensors = without_image(tensors | branch(found["base"], found["edge"]))
        own = found["distilled"]
        tensors = {name: t + own[name] if name in own else t for name, t in tensors.items()}
    elif model == "multi":
        tensors = without_image(tensors)
        for j, control in enumerate(CONTROLS):
            tensors |= _numbered(without_image(branch(found["base"], found[control])), j)
    else:
        tensors = tensors | branch(found["base"], found[model])
    got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_names(f"embedded {model}", got, published_shapes(sizes), "Install cosmos-fast again.")
    return sizes, tensors


def vae_state() -> dict[str, Tensor]:
    """Published name -> fp32 tensor of the video VAE."""
    return _read("vae")


def text_state() -> tuple[dict[str, int], dict[str, Tensor]]:
    """(sizes of text.TinyText, its fp32 tensors)."""
    return dict(index()["text"]), _read("text")


SAME: Final = "same:"
"""Marks an entry of a branch that repeats a tensor of the base: `same:<branch name>=<base name>`, empty."""


def branch(base: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of one control branch, those that it shares with the base filled in."""
    filled = {}
    for name, tensor in own.items():
        if name.startswith(SAME):
            ours, _, theirs = name.removeprefix(SAME).partition("=")
            filled[ours] = base[theirs]
        else:
            filled[name] = tensor
    return filled


def _numbered(tensors: Mapping[str, Tensor], j: int) -> dict[str, Tensor]:
    """Tensors of a lone branch under their names in the multi-control network."""
    renamed = {}
    for name, tensor in tensors.items():
        for lone, numbered in zip(branch_prefixes(0, 1), branch_prefixes(j, len(CONTROLS)), strict=True):
            if name.startswith(lone):
                renamed[numbered + name.removeprefix(lone)] = tensor
    return renamed


def _read(part: str) -> dict[str, Tensor]:
    """One packed file, after its bytes were compared with the index."""
    path = FOLDER / f"{part}.safetensors"
    expected = index()["files"].get(path.name, {}).get("sha256")
    try:
        got = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise EnvironmentProblem(
            f"embedded model: {path} must be readable, got {error.strerror}. Install cosmos-fast again."
        ) from None
    if got != expected:
        raise CheckpointError(
            f"{path}: must have the SHA-256 of {INDEX}, got {got[:16]}. Install cosmos-fast again."
        )
    return read_packed(path)
