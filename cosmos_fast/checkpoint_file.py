"""One view of every container: published names to lazy tensors, with what is not a parameter set aside."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cosmos_fast.config import NetworkConfig, published_shapes
from cosmos_fast.formats import CheckpointError
from cosmos_fast.network_keys import diffusers_names, infer_config
from cosmos_fast.safetensors_file import SCALE, LazyTensor, TensorFile
from cosmos_fast.weight_file import open_tensors

CONFIG_KEY = "cosmos_fast_config"
"""Entry of a safetensors file's metadata that holds the network's sizes: a small model describes itself."""

# Training counters, rotary tables and Transformer Engine state: in every published file, used by no one here.
_IGNORED = re.compile(r"^(accum_\w+|pos_embedder(_options)?\..*|(.*\.)?_extra_state)$")

# Shapes do not tell these apart, published file names do: (first part of the uuid) -> model.
_MODEL_OF_FILE = {
    "41f07f13": "distilled",
    **dict.fromkeys(("ecd0ba00", "fcab44fe", "20d9fd0b", "0f214f66"), "single"),
}


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: published names, no prefix, to lazy tensors. `copies` must equal those."""

    path: Path
    format: str
    tensors: dict[str, LazyTensor]
    ignored: tuple[str, ...]
    metadata: dict[str, str]
    copies: tuple[tuple[str, LazyTensor], ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def model(self) -> str | None:
        """ "distilled" or "single" where the file's published name says which, else None."""
        found = {_MODEL_OF_FILE.get(part[:8]) for part in self.path.parts} - {None}
        return found.pop() if len(found) == 1 else None

    def config(self, model: str | None = None) -> NetworkConfig:
        """Sizes from the file's own metadata, else from its shapes and published name, else `model`.

        Raises CheckpointError when `model` contradicts what the file says.
        """
        try:
            if CONFIG_KEY in self.metadata:
                config = NetworkConfig.from_json(self.metadata[CONFIG_KEY])
            else:
                config = infer_config(self.shapes, model=self.model or model)
        except (CheckpointError, ValueError) as error:
            raise CheckpointError(f"{self.path}: {error}") from None
        is_distilled = config.timestep_scale == 1.0
        if model and is_distilled != (model == "distilled"):
            what = "the distilled network" if is_distilled else "not the distilled network"
            raise CheckpointError(f"{self.path}: is {what}, got model '{model}'.")
        return config


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint of the denoiser in any format. Reads its index only; raises CheckpointError."""
    path = Path(path)
    if (path / "transformer").is_dir() and (path / "controlnet").is_dir():
        return _open_diffusers(path)
    if path.is_dir() and ((path / "transformer").is_dir() or (path / "controlnet").is_dir()):
        have, lack = (
            ("transformer", "controlnet")
            if (path / "transformer").is_dir()
            else ("controlnet", "transformer")
        )
        raise CheckpointError(
            f"{path}: a diffusers folder must hold transformer/ and controlnet/, got {have}/ only. "
            f"Put the {lack}/ folder of the same model beside it."
        )
    return clean(open_tensors(path))


def clean(file: TensorFile) -> Checkpoint:
    """Strip `net.`, prefer the averaged weights, set aside what is not a parameter."""
    prefix = next((p for p in ("net_ema.", "net.") if any(n.startswith(p) for n in file.tensors)), "")
    tensors: dict[str, LazyTensor] = {}
    ignored = list(file.skipped)
    for full, tensor in file.tensors.items():
        name = full.removeprefix(prefix)
        other_copy = prefix and not full.startswith(prefix) and full.startswith(("net.", "net_fake_score."))
        if other_copy or _IGNORED.match(name.removeprefix("net.")):
            ignored.append(full)
        elif name in tensors:
            raise CheckpointError(f"{file.path}: '{name}' occurs with and without the prefix '{prefix}'.")
        else:
            tensors[name] = tensor
    return Checkpoint(file.path, file.format, _paired(file.path, tensors), tuple(ignored), file.metadata)


def _paired(path: Path, tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Every matrix of 8-bit codes with its scales, which are then no tensors of their own."""
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith(".weight" + SCALE)}
    out = {}
    for name, tensor in tensors.items():
        if name.endswith(".weight" + SCALE):
            continue
        scale = scales.pop(name + SCALE, None)
        if scale is not None:
            fits = (tensor.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
            if not fits or len(tensor.shape) != 2 or scale.shape != tensor.shape[:1]:
                raise CheckpointError(
                    f"{path}: '{name}' must be (rows, columns) e4m3 codes with (rows,) fp32 scales, got "
                    f"{tensor.dtype} {tensor.shape} with {scale.dtype} {scale.shape}. Convert the unquantised file again."
                )
        out[name] = tensor if scale is None else replace(tensor, scale=scale)
    if scales:
        raise CheckpointError(f"{path}: scales without codes: {', '.join(list(scales)[:10])}.")
    return out


def _open_diffusers(path: Path) -> Checkpoint:
    files = {component: open_tensors(path / component) for component in ("transformer", "controlnet")}
    found = {
        (component, name): tensor
        for component, file in files.items()
        for name, tensor in file.tensors.items()
    }

    def count(component: str, prefix: str) -> int:
        indices = {n.split(".")[1] for c, n in found if c == component and n.startswith(prefix)}
        return 1 + max((int(i) for i in indices if i.isdigit()), default=-1)

    blocks, controls = count("transformer", "transformer_blocks."), count("controlnet", "control_blocks.")
    if not 0 < controls <= blocks:
        raise CheckpointError(
            f"{path}: expected transformer and control blocks, got {blocks} and {controls}."
        )
    image = 64 if ("transformer", "img_context_proj.0.weight") in found else None
    # Names depend on the counts alone, so any width serves to list them.
    names = NetworkConfig.tiny(blocks=blocks, control_every=math.ceil(blocks / controls), image_width=image)
    tensors: dict[str, LazyTensor] = {}
    copies = []
    for name in published_shapes(names):
        for place in diffusers_names(name):
            tensor = found.pop(place, None)
            if tensor is None:
                continue
            if name in tensors:
                copies.append((name, tensor))
            else:
                tensors[name] = tensor
    tensors |= {f"{component}/{name}": tensor for (component, name), tensor in found.items()}
    return Checkpoint(path, "diffusers", tensors, (), files["transformer"].metadata, tuple(copies))


def _without_nan(where: str, name: str, codes: Tensor) -> Tensor:
    # e4m3 has no infinities, and one NaN of either sign.
    if bad := int((codes.view(torch.uint8) & 0x7F == 0x7F).sum()):
        raise CheckpointError(f"{where}: '{name}' must be finite, got {bad} NaN or infinite values.")
    return codes


def is_same(a: LazyTensor, b: LazyTensor, is_compared_fully: bool = True) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    left, right = a.load().reshape(-1), b.load().reshape(-1)
    ends = slice(None) if is_compared_fully else slice(0, 1 << 14)
    # Bytes, not numbers: a NaN must equal itself here, the finite check names it later.
    return all(
        torch.equal(x[ends].contiguous().view(torch.uint8), y[ends].contiguous().view(torch.uint8))
        for x, y in ((left, right), (left[-(1 << 14) :], right[-(1 << 14) :]))
    )


def check_copies(checkpoint: Checkpoint) -> None:
    names = [name for name, copy in checkpoint.copies if not is_same(checkpoint.tensors[name], copy)]
    if names:
        raise CheckpointError(
            f"{checkpoint.path}: transformer/ and controlnet/ must agree on the tensors they share, "
            f"got different {', '.join(names[:10])}. They belong to different models."
        )


def checked(where: str, name: str, tensor: LazyTensor, is_finite_checked: bool) -> LazyTensor:
    if tensor.scale is not None:
        scale = checked(where, name + SCALE, tensor.scale, is_finite_checked)
        return replace(tensor, scale=scale, load=lambda: _without_nan(where, name, tensor.load()))
    if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{where}: '{name}' must be bf16, fp16 or fp32, got {kind}. Use the unquantised file."
        )

    def load() -> Tensor:
        value = tensor.load()
        # The sum is several times faster and only errs by overflow, which the exact test then settles.
        if not value.sum(dtype=torch.float32).isfinite() and not value.isfinite().all():
            bad = int((~value.isfinite()).sum())
            raise CheckpointError(f"{where}: '{name}' must be finite, got {bad} NaN or infinite values.")
        return value

    return LazyTensor(tensor.shape, tensor.dtype, load) if is_finite_checked else tensor
