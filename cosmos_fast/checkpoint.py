"""Published weights in, our tensors out: nothing missing, nothing extra, nothing executed.

A checkpoint is a .pt file, a safetensors file or index, a distributed checkpoint folder, or a diffusers
folder with transformer/ and controlnet/. All are read as one mapping of published names to lazy tensors.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cosmos_fast.checkpoint_file import (
    CONFIG_KEY,
    Checkpoint,
    check_copies,
    checked,
    clean,
    is_same,
    open_checkpoint,
)
from cosmos_fast.config import NetworkConfig, branch_prefixes, published_shapes
from cosmos_fast.formats import CONTROLS, CheckpointError
from cosmos_fast.fp8_weights import check_matrices, in_8_bits, with_scales
from cosmos_fast.network_keys import (
    Entry,
    check_names,
    infer_config,
    layout,
    looks_like,
    our_shapes,
    to_ours,
    to_published,
)
from cosmos_fast.safetensors_file import LazyTensor, write_safetensors
from cosmos_fast.vae_keys import VAEConfig, diffusers_vae_keys, vae_layout
from cosmos_fast.weight_file import open_tensors

__all__ = [
    "CONFIG_KEY",
    "Checkpoint",
    "Entry",
    "Loaded",
    "Report",
    "convert",
    "infer_config",
    "inspect",
    "layout",
    "load_state",
    "load_vae_state",
    "open_checkpoint",
    "our_shapes",
    "save",
    "to_ours",
    "to_published",
]

_IMAGE = re.compile(r"img_context_proj\.|\.(q_img|k_img|v_img|q_img_norm|k_img_norm)\.")


class Loaded(NamedTuple):
    """A network's sizes, its tensors under our names, and what a reader should know about them."""

    config: NetworkConfig
    state: dict[str, Tensor]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What a checkpoint is. `kind` is single, single-no-image, distilled, multi, vae or unknown."""

    path: Path
    format: str = "unknown"
    kind: str = "unknown"
    config: NetworkConfig | None = None
    tensors: int = 0
    parameters: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def load_state(
    paths: str | Path | Mapping[str, str | Path],
    config: NetworkConfig | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
    device: torch.device | str = "cpu",
    *,
    model: str | None = None,
    is_finite_checked: bool = True,
    is_base_compared_fully: bool = False,
) -> Loaded:
    """Load a network: one checkpoint, or four single ones by control name for the multi-control network.

    `dtype` None keeps the file's, and 8-bit matrices are kept in any case, with their scales. `model` ("single" or "distilled") settles what shapes cannot: the time
    scale of a network without image context. From four files the base is taken from the last, seg, and
    image-context weights are dropped, as the published assembly does; whether the four bases agree is checked
    on both ends of every tensor, or on all of it with `is_base_compared_fully`, and disagreement is noted.
    Raises CheckpointError naming file and tensors.
    """
    if model not in (None, "single", "distilled"):
        raise CheckpointError(f"model: must be 'single' or 'distilled', got {model!r}.")
    notes: list[str] = []
    if isinstance(paths, Mapping) and len(paths) > 1:
        tensors, found = _assemble(paths, notes, is_base_compared_fully)
        config, where = config or found, ", ".join(str(paths[key]) for key in CONTROLS)
    else:
        path = next(iter(paths.values())) if isinstance(paths, Mapping) and paths else paths
        if isinstance(path, Mapping):
            raise CheckpointError("checkpoint: expected a path or four paths by control name, got none.")
        checkpoint = open_checkpoint(path)
        config = config or _settled(checkpoint, model)
        tensors, where = checkpoint.tensors, str(checkpoint.path)
        check_copies(checkpoint)
    hint = looks_like(tensors)
    check_names(
        where,
        {name: tensor.shape for name, tensor in tensors.items()},
        published_shapes(config),
        f"It looks like {hint}." if hint else _other_kind(tensors, config),
    )
    if check_matrices(where, tensors, config):
        notes.append("checkpoint: matrices are stored in 8 bits.")
    ready = {name: checked(where, name, t, is_finite_checked) for name, t in tensors.items()}
    return Loaded(config, to_ours(ready, config, dtype, device), tuple(notes))


def _settled(checkpoint: Checkpoint, model: str | None) -> NetworkConfig:
    """The checkpoint's config, refusing to guess the time scale of a network without image context."""
    config = checkpoint.config(model)
    is_open = config.image_width is None and config.branches == 1 and CONFIG_KEY not in checkpoint.metadata
    if is_open and not (model or checkpoint.model):
        raise CheckpointError(
            f"{checkpoint.path}: a network without image context may be the distilled one or an older single "
            "one, and its tensors do not tell. Name the model, or keep the published file name."
        )
    return config


def _other_kind(tensors: Mapping[str, LazyTensor], config: NetworkConfig) -> str:
    if "control_embedder.0.proj.1.weight" in tensors and config.branches == 1:
        return "It looks like a multi-control network."
    if "control_embedder.proj.1.weight" in tensors and config.branches > 1:
        return "It looks like a single-control network; multi-control takes all four of them."
    if config.image_width is None and "img_context_proj.0.weight" in tensors:
        return "It looks like a network with image context."
    return ""


def _assemble(
    paths: Mapping[str, str | Path], notes: list[str], is_compared_fully: bool
) -> tuple[dict[str, LazyTensor], NetworkConfig]:
    if set(paths) != set(CONTROLS):
        raise CheckpointError(
            f"multi-control: needs one checkpoint for each of {', '.join(CONTROLS)}, got {', '.join(paths)}."
        )
    opened = {key: open_checkpoint(paths[key]) for key in CONTROLS}
    configs = {}
    for key, checkpoint in opened.items():
        single = checkpoint.config()
        if single.branches > 1 or single.timestep_scale != NetworkConfig().timestep_scale:
            kind = "a multi-control" if single.branches > 1 else "the distilled"
            raise CheckpointError(
                f"{checkpoint.path}: {key} must be a single-control network, got {kind} one."
            )
        check_names(str(checkpoint.path), checkpoint.shapes, published_shapes(single))
        check_copies(checkpoint)
        configs[key] = replace(single, image_width=None, branches=len(CONTROLS))
    config = configs[CONTROLS[-1]]
    if odd := [key for key in CONTROLS if configs[key] != config]:
        raise CheckpointError(
            f"multi-control: networks must have equal sizes, got others in {', '.join(odd)}."
        )

    tensors: dict[str, LazyTensor] = {}
    last = opened[CONTROLS[-1]]
    dropped = set()
    for j, (key, checkpoint) in enumerate(opened.items()):
        embedder, blocks = branch_prefixes(j, config.branches)
        differing = []
        for name, tensor in checkpoint.tensors.items():
            if _IMAGE.search(name):
                dropped.add(key)
            elif name.startswith("control_embedder."):
                tensors[embedder + name.removeprefix("control_embedder.")] = tensor
            elif name.startswith("control_blocks."):
                tensors[blocks + name.removeprefix("control_blocks.")] = tensor
            else:
                if checkpoint is not last and not is_same(tensor, last.tensors[name], is_compared_fully):
                    differing.append(name)
                tensors[name] = tensor  # the last file wins
        if differing:
            notes.append(
                f"multi-control: {len(differing)} base tensors of {key} differ from {CONTROLS[-1]}'s, "
                f"which are used: {', '.join(differing[:10])}."
            )
    if dropped:
        names = ", ".join(key for key in CONTROLS if key in dropped)
        notes.append(
            f"multi-control: image-context weights of {names} are not part of this network and were dropped."
        )
    return tensors, config


def load_vae_state(
    path: str | Path, dtype: torch.dtype | None = torch.bfloat16, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Load the video VAE from tokenizer.pth, safetensors or a diffusers folder: published name -> tensor.

    Its width is that of `encoder.conv1.weight`: `VAEConfig(base=state["encoder.conv1.weight"].shape[0])`.
    """
    where, tensors = _open_vae(Path(path))
    return {
        name: checked(where, name, t, True).load().to(device, dtype or t.dtype, copy=True)
        for name, t in tensors.items()
    }


def _open_vae(path: Path) -> tuple[str, dict[str, LazyTensor]]:
    file = open_tensors(path / "vae" if (path / "vae").is_dir() else path)
    tensors, where = file.tensors, str(file.path)
    first = next(
        (tensors[n] for n in ("encoder.conv1.weight", "encoder.conv_in.weight") if n in tensors), None
    )
    if first is None or not first.shape:
        what = looks_like(clean(file).tensors) or "a Cosmos-Transfer2.5 denoiser"
        raise CheckpointError(f"{where}: must be the Wan 2.1 video VAE, got {what}.")
    config = VAEConfig(base=first.shape[0])
    if "encoder.conv_in.weight" in tensors:
        names = diffusers_vae_keys(config)
        tensors = {names.get(name, name): tensor for name, tensor in tensors.items()}
    check_names(where, {name: tensor.shape for name, tensor in tensors.items()}, vae_layout(config))
    return where, tensors


def save(
    path: str | Path,
    state: Mapping[str, Tensor],
    config: NetworkConfig,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write our tensors as safetensors under published names, with the config in the file's metadata."""
    tensors = {f"net.{name}": tensor for name, tensor in to_published(state, config).items()}
    return write_safetensors(
        path, tensors, {"format": "pt", **(metadata or {}), CONFIG_KEY: config.to_json()}
    )


def inspect(path: str | Path, *, is_finite_checked: bool = False) -> Report:
    """Say what a checkpoint is without raising on bad content: faults are listed in `problems`."""
    path = Path(path)
    try:
        is_folder_of_vae = (path / "vae").is_dir() and not (path / "transformer").is_dir()
        checkpoint = clean(open_tensors(path / "vae")) if is_folder_of_vae else open_checkpoint(path)
    except CheckpointError as error:
        return Report(path, problems=(str(error),))
    tensors = checkpoint.tensors
    report = Report(
        path=checkpoint.path,
        format=checkpoint.format,
        tensors=len(tensors),
        parameters=sum(math.prod(t.shape) for t in tensors.values()),
        dtypes=dict(Counter(str(t.dtype).removeprefix("torch.") for t in tensors.values())),
        ignored=checkpoint.ignored,
    )
    try:
        if "video VAE" in looks_like(tensors):
            report = replace(report, kind="vae")
            tensors = _open_vae(checkpoint.path)[1]
        else:
            config = checkpoint.config()
            report = replace(report, kind=_kind(checkpoint, config), config=config)
            check_names(str(checkpoint.path), checkpoint.shapes, published_shapes(config))
            check_copies(checkpoint)
            check_matrices(str(checkpoint.path), tensors, config)
        for name, tensor in tensors.items():
            ready = checked(str(checkpoint.path), name, tensor, is_finite_checked)
            if is_finite_checked:
                ready.load()
    except CheckpointError as error:
        return replace(report, problems=(str(error),))
    return report


def _kind(checkpoint: Checkpoint, config: NetworkConfig) -> str:
    if config.branches > 1:
        return "multi"
    if config.image_width is not None:
        return "single"
    return "distilled" if config.timestep_scale == 1.0 else "single-no-image"


def convert(
    src: str | Path, dst: str | Path, dtype: torch.dtype | None = torch.bfloat16, *, model: str | None = None,
    is_8_bit: bool = False,
) -> Report:  # fmt: skip
    """Rewrite a checkpoint of the denoiser or the VAE as one safetensors file under published names.

    `dtype` None keeps each tensor's; matrices in 8 bits stay so in any case. `is_8_bit` quantises those of the rule
    of `fp8_weights`. Raises CheckpointError on any fault; then nothing is written.
    """
    src, dst = Path(src), Path(dst)
    if dst.suffix != ".safetensors" or dst.is_dir() or (dst.exists() and src.exists() and dst.samefile(src)):
        raise CheckpointError(f"convert: the result must be another file named *.safetensors, got {dst}.")
    report = inspect(src)
    if report.problems:
        raise CheckpointError("; ".join(report.problems))
    metadata = {"format": "pt"}
    if report.kind == "vae":
        if is_8_bit:
            raise CheckpointError(f"{src}: only a denoiser can be stored in 8 bits, got the video VAE.")
        prefix, tensors = "", _open_vae(report.path)[1]
    else:
        checkpoint = open_checkpoint(src)
        config = _settled(checkpoint, model)
        prefix, tensors = "net.", checkpoint.tensors
        metadata[CONFIG_KEY] = config.to_json()
        if is_8_bit:
            tensors = in_8_bits(tensors, config)
    ready = {prefix + name: checked(str(src), name, tensor, True) for name, tensor in tensors.items()}
    write_safetensors(dst, with_scales(ready), metadata, dtype)
    return inspect(dst)
