"""Weights in e4m3 with one fp32 scale per output row: which layers have them, and how a matrix becomes one.

In a file a matrix `<layer>.weight` (out, in) is F8_E4M3 and has `<layer>.weight_scale` (out,) F32 beside it; value =
code * scale. Rows of q, k and v that are one matrix here keep their own scales, so packing them changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cosmos_fast.config import NetworkConfig
from cosmos_fast.formats import CheckpointError
from cosmos_fast.network_keys import layout
from cosmos_fast.safetensors_file import SCALE, LazyTensor

FP8 = torch.float8_e4m3fn
TOP = 448.0
"""Largest value of e4m3."""

# Everything that neither rule names stays as it is. What the rule names is 15 % of a call's FLOP, all but attention, and
# brings an error of 0.030 to a velocity of the model in the package; embeddings, head and hints are 0.17 % and would make it
# 0.047 (docs/log.md, "which layers stay in bf16"): before_proj and after_proj feed the residual stream without a gate, and
# the head's error is the result's. Time and modulation run once for all tokens.
_BLOCK = r"(control\.\d+\.)?blocks\.\d+"
_COMPUTED = re.compile(rf"{_BLOCK}\.(qkv|attn_out|cross\.q|cross\.image_q|cross\.out|fc1|fc2)")
_STORED = re.compile(rf"{_BLOCK}\.(cross\.kv|cross\.image_kv)")


def is_computed(layer: str) -> bool:
    """Whether the layer of that name in our network multiplies in 8 bits: it meets every token at every step."""
    return _COMPUTED.fullmatch(layer) is not None


def is_stored(layer: str) -> bool:
    """Whether it keeps 8-bit weights but multiplies in its input's dtype: read once a prompt, only its bytes matter."""
    return _STORED.fullmatch(layer) is not None


def quantised_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    """w (out, in) -> codes e4m3 of its shape, scales (out,) fp32; the largest value of a row becomes 448."""
    wide = w.detach().float()
    scale = wide.abs().amax(dim=1).clamp_min(1e-20) / TOP
    return (wide / scale[:, None]).clamp(-TOP, TOP).to(FP8), scale


def published_matrices(config: NetworkConfig) -> set[str]:
    """Published names of the matrices that an 8-bit file keeps in 8 bits."""
    layers = ((entry.published, entry.ours.removesuffix(".weight")) for entry in layout(config))
    return {published for published, layer in layers if is_computed(layer) or is_stored(layer)}


def in_8_bits(tensors: Mapping[str, LazyTensor], config: NetworkConfig) -> dict[str, LazyTensor]:
    """Tensors by published name -> the same with the matrices of the rule as codes with scales, still lazy."""
    chosen = published_matrices(config)
    return {name: _codes(t) if name in chosen and t.scale is None else t for name, t in tensors.items()}


def _codes(tensor: LazyTensor) -> LazyTensor:
    # Each load quantises again: writing a file then needs no memory for more than one matrix.
    scale = LazyTensor(tensor.shape[:1], torch.float32, lambda: quantised_rows(tensor.load())[1])
    return replace(tensor, dtype=FP8, load=lambda: quantised_rows(tensor.load())[0], scale=scale)


def with_scales(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """As a file lists them: scales under names of their own."""

    def entries() -> Iterator[tuple[str, LazyTensor]]:
        for name, tensor in tensors.items():
            yield name, tensor
            if tensor.scale is not None:
                yield name + SCALE, tensor.scale

    return dict(entries())


def check_matrices(where: str, tensors: Mapping[str, LazyTensor], config: NetworkConfig) -> bool:
    """Whether these are 8-bit weights; CheckpointError unless all matrices of the rule are, and no others, or none is."""
    have = {name for name, tensor in tensors.items() if tensor.scale is not None}
    if have and (wrong := sorted(have ^ published_matrices(config))):
        raise CheckpointError(
            f"{where}: the 8-bit matrices must be those of the rule, got otherwise: {', '.join(wrong[:10])}. "
            "Convert the unquantised file again."
        )
    return bool(have)
