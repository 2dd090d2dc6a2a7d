"""The vision half of a SigLIP model, read from a folder of the transformers layout; the text half stays on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .formats import CheckpointError, EnvironmentProblem
from .weight_file import open_tensors

_PREFIX = "vision_model."


def need_transformers(what: str, extra: str) -> Any:
    """The transformers package. Raises EnvironmentProblem with the command that installs it."""
    try:
        import transformers
    except ImportError:
        raise EnvironmentProblem(
            f"{what}: needs the package transformers, which is not installed. "
            f"Run: pip install 'cosmos-fast[{extra}]'"
        ) from None
    return transformers


def load_vision_tower(
    folder: Path, kind: str, *, has_head: bool, dtype: torch.dtype, device: torch.device, extra: str
) -> Any:
    """A `SiglipVisionModel` (kind "siglip") or `Siglip2VisionModel` ("siglip2") in evaluation mode.

    has_head: whether the pooling head is built; without it a head in the file is left out. Every other tensor of the
    tower must be there and finite. Raises CheckpointError, or EnvironmentProblem without transformers (`extra` is
    what installs it).
    """
    transformers = need_transformers(f"{kind} model", extra)
    config_class, model_class = {
        "siglip": (transformers.SiglipVisionConfig, transformers.SiglipVisionModel),
        "siglip2": (transformers.Siglip2VisionConfig, transformers.Siglip2VisionModel),
    }[kind]
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: must hold config.json of a {kind} model, got none.")
    config = config_class.from_pretrained(folder, local_files_only=True)
    config.vision_use_head = has_head
    tensors = open_tensors(folder).tensors
    if any(name.startswith(_PREFIX) for name in tensors):
        tensors = {n.removeprefix(_PREFIX): t for n, t in tensors.items() if n.startswith(_PREFIX)}
    with torch.device("meta"):
        model = model_class(config)
    tower = getattr(model, "vision_model", model)  # transformers 4 wraps the tower once more
    wanted = tower.state_dict()
    if missing := sorted(set(wanted) - set(tensors)):
        raise CheckpointError(
            f"{folder}: must hold a {kind} vision tower, got no {missing[0]} ({len(missing)} tensors are missing)."
        )
    state = {}
    for name, like in wanted.items():
        if tensors[name].shape != tuple(like.shape):
            raise CheckpointError(
                f"{folder}: {name} must be {tuple(like.shape)} as config.json says, got {tensors[name].shape}."
            )
        state[name] = tensors[name].load().to(device, dtype, copy=True)
        if not bool(state[name].isfinite().all()):
            raise CheckpointError(f"{folder}: {name} must be finite, got NaN or infinity.")
    tower.load_state_dict(state, strict=True, assign=True)
    if hasattr(
        tower.embeddings, "position_ids"
    ):  # made by the constructor, not stored, so still without data
        count = tower.embeddings.position_ids.shape[-1]
        tower.embeddings.position_ids = torch.arange(count, device=device)[None]
    return model.eval().requires_grad_(False)


def identity(folder: Path) -> list[list[str | int]]:
    """Path, bytes and time of change of the files of a model: names it in cache keys and records."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in (".json", ".safetensors"))
    return [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
