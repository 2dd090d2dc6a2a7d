"""Which files make up a model: from what the user named to weight files on this disk."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import embedded, registry
from .checkpoint import Loaded, load_state, load_vae_state, open_checkpoint
from .config import NetworkConfig
from .disk_cache import DiskCache
from .formats import CONTROLS, DISTILLED, MODELS, CheckpointError, SpecError
from .network_keys import to_ours
from .planning import config_for
from .spec import Spec
from .style import STYLE_CACHE, STYLE_CACHE_BYTES, SiglipStyle
from .text import TinyText
from .tiny_style import TinyStyle

PUBLISHED = "published"
"""Checkpoint that stands for the published files of whichever model is asked for."""

_VAE_FILES = ("tokenizer.pth", "tokenizer.safetensors", "vae")


@dataclass(frozen=True)
class Located:
    """Weight files of one model: a path, or for the multi-control model a path per control.

    Of the embedded model the files are parts that make sense together only.
    """

    model: str
    files: Path | dict[str, Path]
    is_embedded: bool = False

    def record(self, vae: Path) -> dict[str, dict[str, str | int]]:
        """Path, size and time of change (ns) of every weight file: in the sidecar, and compared by resume."""
        files = self.files if isinstance(self.files, dict) else {self.model: self.files}
        return {
            name: {
                "path": str(path),
                "bytes": sum(p.stat().st_size for p in _parts(path)),
                "mtime_ns": path.stat().st_mtime_ns,
            }
            for name, path in (*files.items(), ("vae", vae))
        }

    @property
    def first(self) -> Path:
        return self.files if isinstance(self.files, Path) else next(iter(self.files.values()))


def _parts(path: Path) -> list[Path]:
    """A file itself, or all files of a folder in order of name."""
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def _around(path: Path) -> list[Path]:
    """Where files that belong to a checkpoint may lie: its folder, and three above."""
    home = path if path.is_dir() else path.parent
    return [home, *list(home.parents)[:3]]


def hashes(files: Mapping[str, Mapping[str, str | int]]) -> dict[str, str]:
    """SHA-256 of each of the files of a `Located.record`; of a folder, over its files in order of name."""
    digests = {}
    for name, file in files.items():
        digest = hashlib.sha256()
        for part in _parts(Path(str(file["path"]))):
            with open(part, "rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
        digests[name] = digest.hexdigest()
    return digests


def locate(checkpoint: str | Path | Mapping[str, str | Path] | None, model: str | None) -> Located:
    """Files of `model` in `checkpoint`, downloading only what is named by a published id.

    checkpoint: a file, a folder (published layout, diffusers layout or distributed checkpoint), a published
    id, paths by control name, "published" for the published files of `model`, or None for the embedded model
    (also "tiny"). model may be None when the checkpoint is a published id or paths by control; of the embedded
    model that is "multi". Raises CheckpointError or EnvironmentProblem.
    """
    if model is not None and model not in MODELS:
        raise SpecError(f"model: must be one of {', '.join(MODELS)}, got {model!r}.")
    if isinstance(checkpoint, Mapping):
        found = {name: Path(path).expanduser() for name, path in checkpoint.items()}
        return Located(
            model or (registry.MULTI if len(found) > 1 else next(iter(found), "")), _pick(found, model)
        )
    if is_embedded(checkpoint):
        model = model or registry.MULTI
        return Located(model, dict(embedded.files(model)), is_embedded=True)
    if checkpoint is None or str(checkpoint) == PUBLISHED:
        if model is None:
            raise CheckpointError(
                f"checkpoint: {PUBLISHED} needs a model, got none. Name one of {', '.join(MODELS)}."
            )
        checkpoint = model
    published = registry.find(str(checkpoint))
    if model is None:
        model = registry.MULTI if str(checkpoint) == registry.MULTI else published.name if published else None
    if model is None:
        raise CheckpointError(
            f"model: must be one of {', '.join(MODELS)} for the checkpoint {str(checkpoint)!r}, got none."
        )
    folder, few_steps = Path(checkpoint).expanduser(), registry.find(DISTILLED)
    if published is None and model == DISTILLED and few_steps is not None and folder.is_dir():
        if (path := registry.find_local(folder, few_steps)) is not None:
            return Located(model, path)
    files = registry.resolve(checkpoint)
    return Located(model.removesuffix("/older"), files if isinstance(files, Path) else _pick(files, model))


def is_embedded(checkpoint: str | Path | Mapping[str, str | Path] | None) -> bool:
    """Whether this names the model inside the package, as naming nothing does."""
    return checkpoint is None or (isinstance(checkpoint, str) and checkpoint == embedded.NAME)


def is_published(checkpoint: str | Path | Mapping[str, str | Path] | None) -> bool:
    """Whether this names published files by their id. A path may hold anything, the published files too."""
    if checkpoint is None or isinstance(checkpoint, Mapping):
        return False
    name = str(checkpoint)
    return name in (PUBLISHED, registry.MULTI) or registry.find(name) is not None


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
    if vae is None and beside.is_embedded:
        return embedded.vae_file()
    if vae is None:
        for folder in _around(beside.first):
            for name in _VAE_FILES:
                if (folder / name).exists():
                    return folder / name
    path = registry.resolve("vae" if vae is None else vae)
    if not isinstance(path, Path):
        raise CheckpointError(f"vae: must be one file or folder, got a folder of control networks: {vae}.")
    return path


def network_state(source: Located, dtype: torch.dtype, device: torch.device) -> Loaded:
    """Sizes and weights of a network, by our names."""
    if source.is_embedded:
        config, published = embedded.state(source.model)
        state = to_ours(published, config, dtype, device)
        return Loaded(config, state, ("checkpoint: the tiny model inside the package.",))
    kind = "distilled" if source.model == DISTILLED else "single"
    return load_state(source.files, dtype=dtype, device=device, model=kind)


def vae_state(path: Path, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Weights of the video VAE that `locate_vae` found, by their published names."""
    if path == embedded.vae_file():
        return {name: tensor.to(device, dtype) for name, tensor in embedded.vae_state().items()}
    return load_vae_state(path, dtype, device)


CARD = "model.json"
"""Beside a checkpoint that is not the published one: what its tensors do not tell, such as chunk lengths."""


def beside(checkpoint: str | Path, name: str) -> Path | None:
    """A file that belongs to a local checkpoint: in its folder, or in one of three folders above."""
    path = Path(checkpoint).expanduser()
    if not path.exists():
        return None
    return next((found for folder in _around(path) if (found := folder / name).exists()), None)


def model_card(checkpoint: str | Path | None) -> dict[str, Any]:
    """What a checkpoint was made for, as far as it differs from the published ones, for which this is empty.

    chunk_frames: frames per chunk. resolutions: resolution keys. defaults: values of a request's keys that hold
    where the request leaves them out.
    """
    if is_embedded(checkpoint):
        return embedded.card()
    path = beside(checkpoint, CARD) if checkpoint else None
    if path is None:
        return {}
    try:
        card = json.loads(path.read_text())
        lengths = card.get("chunk_frames", [])
        if not all(type(n) is int and n > 0 and n % 4 == 1 for n in lengths):
            raise ValueError(f"chunk_frames must be 4k+1 frames, got {lengths}")
        if unknown := sorted(set(card.get("defaults", {})) - set(Spec.model_fields)):
            raise ValueError(f"defaults must be keys of a request, got {', '.join(unknown)}")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: must be a JSON object about the model, got: {error}.") from None
    return card


def limits(checkpoint: str | Path | Mapping[str, str | Path] | None) -> dict[str, Any]:
    """What the card of a checkpoint says, as keywords of `planning.preflight`."""
    card = {} if isinstance(checkpoint, Mapping) else model_card(checkpoint)
    found: dict[str, Any] = {"chunk_lengths": tuple(card["chunk_frames"])} if "chunk_frames" in card else {}
    if "resolutions" in card:
        found["resolutions"] = tuple(card["resolutions"])
    return found | {"defaults": dict(card.get("defaults", {}))}


def own_text(checkpoint: str | Path | Mapping[str, str | Path] | None) -> TinyText | None:
    """The prompt encoder that belongs to a checkpoint: embedded, or a file beside it. None for the published."""
    if is_embedded(checkpoint):
        sizes, state = embedded.text_state()
        encoder = TinyText(**sizes)
        encoder.load_state_dict(state)
        return encoder
    if checkpoint is None or isinstance(checkpoint, Mapping):
        return None
    path = beside(checkpoint, "text.safetensors")
    return TinyText.load(path) if path else None


def offers_style(
    checkpoint: str | None, style_encoder: str | None, configs: Mapping[str, NetworkConfig] | None
) -> bool:
    """Whether style images can be encoded for these weights, as far as is known before they are loaded."""
    if is_embedded(checkpoint):
        return True
    published = NetworkConfig.single().image_width
    is_known = (
        style_encoder is not None or not configs or any(c.image_width == published for c in configs.values())
    )
    return is_known and importlib.util.find_spec("transformers") is not None


def open_style(
    style: Any, source: Located, config: NetworkConfig, device: str | None, cache: DiskCache | None = None
) -> Any:
    """The encoder of style images: the given one, or of a given folder, else what the network was trained with.

    None where the network takes no style image, or was trained with an encoder that is not known here.
    """
    if style is None and source.is_embedded:
        return TinyStyle()
    if style is None and config.image_width == NetworkConfig.single().image_width:
        style = "style"
    if not isinstance(style, (str, Path)):
        return style
    return SiglipStyle(style, device=device, cache=cache or DiskCache(STYLE_CACHE, STYLE_CACHE_BYTES))


def local_configs(checkpoint: str | Path | None, model: str) -> dict[str, NetworkConfig]:
    """Network sizes by model, from the headers of a local checkpoint or the embedded model; else empty."""
    if is_embedded(checkpoint):
        return {
            name: embedded.config(name)
            for name in (MODELS if model == "auto" else (model,))
            if name in MODELS
        }
    name, _, release = str(checkpoint).rpartition("/")
    if release == "older" and registry.find(str(checkpoint)) is not None:
        return {name: replace(config_for(name), image_width=None)}  # the first release has no image context
    if checkpoint is None or not Path(checkpoint).expanduser().exists():
        return {}
    if model not in ("auto", *MODELS):
        return {}  # preflight says what is wrong with the name
    configs = {}
    for name in MODELS if model == "auto" else (model,):
        try:
            first = locate(checkpoint, name).first
            config = open_checkpoint(first).config("distilled" if name == DISTILLED else "single")
        except CheckpointError:
            continue  # this checkpoint does not hold that model; a clip that needs it fails when it is opened
        multi = name == registry.MULTI and config.branches == 1
        configs[name] = replace(config, branches=len(CONTROLS), image_width=None) if multi else config
    return configs
