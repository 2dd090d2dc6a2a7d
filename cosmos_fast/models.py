"""Which files make up a model: from what the user named to weight files on this disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from . import registry
from .formats import CONTROLS, CheckpointError, SpecError
from .planning import DISTILLED, MODELS

_VAE_FILES = ("tokenizer.pth", "tokenizer.safetensors", "vae")


@dataclass(frozen=True)
class Located:
    """Weight files of one model: a path, or for the multi-control model a path per control."""

    model: str
    files: Path | dict[str, Path]

    @property
    def first(self) -> Path:
        return self.files if isinstance(self.files, Path) else next(iter(self.files.values()))


def locate(checkpoint: str | Path | Mapping[str, str | Path] | None, model: str | None) -> Located:
    """Files of `model` in `checkpoint`, downloading only what is named by a published id.

    checkpoint: a file, a folder (published layout, diffusers layout or distributed checkpoint), a published
    id, paths by control name, or None for the published files of `model`. model may be None when the
    checkpoint is a published id or paths by control. Raises CheckpointError or EnvironmentProblem.
    """
    if model is not None and model not in MODELS:
        raise SpecError(f"model: must be one of {', '.join(MODELS)}, got {model!r}.")
    if isinstance(checkpoint, Mapping):
        found = {name: Path(path).expanduser() for name, path in checkpoint.items()}
        return Located(
            model or (registry.MULTI if len(found) > 1 else next(iter(found), "")), _pick(found, model)
        )
    if checkpoint is None:
        if model is None:
            raise CheckpointError("checkpoint: must be given when no model is named, got neither.")
        checkpoint = model
    published = registry.find(str(checkpoint))
    if model is None:
        model = registry.MULTI if str(checkpoint) == registry.MULTI else published.name if published else None
    if model is None:
        raise CheckpointError(
            f"model: must be one of {', '.join(MODELS)} for the checkpoint {str(checkpoint)!r}, got none."
        )
    if published is None and Path(checkpoint).expanduser().is_dir():
        if (few_steps := registry.find(model)) is not None and model == DISTILLED:
            if (path := registry.find_local(Path(checkpoint).expanduser(), few_steps)) is not None:
                return Located(model, path)
    files = registry.resolve(checkpoint)
    return Located(model.removesuffix("/older"), files if isinstance(files, Path) else _pick(files, model))


def _pick(found: Mapping[str, Path], model: str | None) -> Path | dict[str, Path]:
    """Of the controls a folder holds, the files this model needs."""
    if model in CONTROLS:
        if model not in found:
            raise CheckpointError(
                f"checkpoint: must hold the {model} network, got {', '.join(found) or 'none'}."
            )
        return found[model]
    if model == DISTILLED:
        raise CheckpointError("checkpoint: must hold distilled/general/edge, got a folder without it.")
    return dict(found) if len(found) > 1 else next(iter(found.values()))


def locate_vae(vae: str | Path | None, beside: Located) -> Path:
    """The video VAE: the one named, else one beside the checkpoint or in a folder above it, else the published."""
    if vae is None:
        home = beside.first if beside.first.is_dir() else beside.first.parent
        for folder in (home, *list(home.parents)[:3]):
            for name in _VAE_FILES:
                if (folder / name).exists():
                    return folder / name
    path = registry.resolve("vae" if vae is None else vae)
    if not isinstance(path, Path):
        raise CheckpointError(f"vae: must be one file or folder, got a folder of control networks: {vae}.")
    return path
