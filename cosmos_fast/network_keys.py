"""Names of the denoiser's tensors: published, ours (packed), diffusers; and what a set of names says.

Ours packs what runs together: q, k, v of a block are one matrix, and so are the three modulations.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from cosmos_fast.config import SUBLAYERS, NetworkConfig, branch_prefixes, published_shapes
from cosmos_fast.formats import PATCH, CheckpointError
from cosmos_fast.safetensors_file import SCALE, LazyTensor

Shape = tuple[int, ...]
Source = Mapping[str, Tensor] | Mapping[str, LazyTensor]


class Entry(NamedTuple):
    """One published tensor and its place in ours.

    `part` is its index among the `parts` equal pieces stacked in `ours`, or None when it is all of `ours`.
    """

    published: str
    ours: str
    part: int | None = None
    parts: int = 1


_BLOCK: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("qkv.weight", ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")),
    ("q_gain", ("self_attn.q_norm.weight",)),
    ("k_gain", ("self_attn.k_norm.weight",)),
    ("attn_out.weight", ("self_attn.output_proj.weight",)),
    ("cross.q.weight", ("cross_attn.q_proj.weight",)),
    ("cross.kv.weight", ("cross_attn.k_proj.weight", "cross_attn.v_proj.weight")),
    ("cross.q_gain", ("cross_attn.q_norm.weight",)),
    ("cross.k_gain", ("cross_attn.k_norm.weight",)),
    ("cross.out.weight", ("cross_attn.output_proj.weight",)),
    ("fc1.weight", ("mlp.layer1.weight",)),
    ("fc2.weight", ("mlp.layer2.weight",)),
    ("mod.down", tuple(f"adaln_modulation_{part}.1.weight" for part in SUBLAYERS)),
    ("mod.up", tuple(f"adaln_modulation_{part}.2.weight" for part in SUBLAYERS)),
)
_BLOCK_IMAGE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("cross.image_q.weight", ("cross_attn.q_img.weight",)),
    ("cross.image_kv.weight", ("cross_attn.k_img.weight", "cross_attn.v_img.weight")),
    ("cross.image_q_gain", ("cross_attn.q_img_norm.weight",)),
    ("cross.image_k_gain", ("cross_attn.k_img_norm.weight",)),
)
# Stacked along a new first dimension; everything else packed is joined along its rows.
_STACKED = ("mod.down", "mod.up")

_TOP = (
    ("x_embedder.proj.1.weight", "x_embed.weight"),
    ("t_embedder.1.linear_1.weight", "time.linear_1.weight"),
    ("t_embedder.1.linear_2.weight", "time.linear_2.weight"),
    ("t_embedding_norm.weight", "time.gain"),
    ("crossattn_proj.0.weight", "text_proj.weight"),
    ("crossattn_proj.0.bias", "text_proj.bias"),
    ("final_layer.adaln_modulation.1.weight", "head.mod_down"),
    ("final_layer.adaln_modulation.2.weight", "head.mod_up"),
    ("final_layer.linear.weight", "head.linear.weight"),
)
_TOP_IMAGE = (
    ("img_context_proj.0.weight", "image_proj.weight"),
    ("img_context_proj.0.bias", "image_proj.bias"),
)


def layout(config: NetworkConfig) -> list[Entry]:
    """Every published tensor of the network (names after `net.`) with its place in ours."""
    has_image = config.image_width is not None
    entries = [Entry(*names) for names in (*_TOP, *(_TOP_IMAGE if has_image else ()))]

    def block(theirs: str, ours: str) -> None:
        for name, sources in (*_BLOCK, *(_BLOCK_IMAGE if has_image else ())):
            for part, source in enumerate(sources):
                index = part if len(sources) > 1 else None
                entries.append(Entry(theirs + source, ours + name, index, len(sources)))

    for i in range(config.blocks):
        block(f"blocks.{i}.", f"blocks.{i}.")
    for j in range(config.branches):
        embedder, blocks = branch_prefixes(j, config.branches)
        ours = f"control.{j}."
        entries.append(Entry(f"{embedder}proj.1.weight", f"{ours}embed.weight"))
        for n in range(config.num_control_blocks):
            block(f"{blocks}{n}.", f"{ours}blocks.{n}.")
            for leaf in ("weight", "bias"):
                if n == 0:
                    entries.append(Entry(f"{blocks}0.before_proj.{leaf}", f"{ours}before_proj.{leaf}"))
                entries.append(Entry(f"{blocks}{n}.after_proj.{leaf}", f"{ours}after_proj.{n}.{leaf}"))
    return entries


def our_shapes(config: NetworkConfig) -> dict[str, Shape]:
    """Name and shape of every parameter of our network."""
    published = published_shapes(config)
    shapes: dict[str, Shape] = {}
    for entry in layout(config):
        rows, *rest = published[entry.published]
        is_stacked = entry.ours.endswith(_STACKED)
        shapes[entry.ours] = (entry.parts, rows, *rest) if is_stacked else (entry.parts * rows, *rest)
    return shapes


def to_ours(
    published: Source,
    config: NetworkConfig,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Pack published tensors (names after `net.`, lazy or not) into new tensors of ours.

    `dtype` None keeps the dtype of the source, `device` None its device (lazy tensors: the CPU). A matrix of 8-bit
    codes stays one whatever `dtype` says, and its scales come beside it as `<name>_scale`. Raises CheckpointError
    unless names and shapes fit `config`.
    """
    check_names(
        "checkpoint", {name: tuple(t.shape) for name, t in published.items()}, published_shapes(config)
    )
    shapes = our_shapes(config)
    state: dict[str, Tensor] = {}
    for entry in layout(config):
        source = published[entry.published]
        scale = source.scale if isinstance(source, LazyTensor) else None
        if entry.ours not in state:
            place = device or (source.device if isinstance(source, Tensor) else "cpu")
            kind = source.dtype if scale is not None else dtype or source.dtype
            state[entry.ours] = torch.empty(shapes[entry.ours], dtype=kind, device=place)
            if scale is not None:
                rows = shapes[entry.ours][:1]
                state[entry.ours + SCALE] = torch.empty(rows, dtype=scale.dtype, device=place)
        value = source.load() if isinstance(source, LazyTensor) else source
        pieces = state[entry.ours].view(entry.parts, *source.shape)
        pieces[entry.part or 0].copy_(value)
        if scale is not None:
            state[entry.ours + SCALE].view(entry.parts, -1)[entry.part or 0].copy_(scale.load())
    return state


def to_published(state: Mapping[str, Tensor], config: NetworkConfig) -> dict[str, Tensor]:
    """The exact inverse of `to_ours`: published names, as views of our tensors."""
    check_names("network state", {name: tuple(t.shape) for name, t in state.items()}, our_shapes(config))
    shapes = published_shapes(config)
    return {
        entry.published: state[entry.ours].view(entry.parts, *shapes[entry.published])[entry.part or 0]
        for entry in layout(config)
    }


def check_names(what: str, got: Mapping[str, Shape], expected: Mapping[str, Shape], hint: str = "") -> None:
    """Raise CheckpointError naming up to 10 tensors that are missing, unexpected or of another shape."""
    faults = [
        ("missing", [name for name in expected if name not in got]),
        ("unexpected", [name for name in got if name not in expected]),
        (
            "of another shape",
            [
                f"{name} {list(got[name])} instead of {list(shape)}"
                for name, shape in expected.items()
                if name in got and tuple(got[name]) != tuple(shape)
            ],
        ),
    ]
    problems = [
        f"{len(names)} tensors {kind}: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
        for kind, names in faults
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{what}: tensors must match the network, got {'; '.join(problems)}. {hint}".strip()
        )


def looks_like(names: Collection[str]) -> str:
    """What a set of tensor names (prefixes removed) belongs to, in words; empty for a network of ours."""

    def has(*fragments: str) -> bool:
        return any(fragment in name for name in names for fragment in fragments)

    if not names:
        return "a file without tensors"
    if has("lora_", ".lora.", "lora."):
        return "a LoRA adapter; merge it into its base network first"
    if has("view_embeddings", "input_hint_block", "cross_view_attn"):
        return "a multiview network, which is another model family"
    if has("model.layers.", "lm_head.", "language_model."):
        return "a language model, perhaps the text encoder"
    if has("vision_model.", "text_model.", "vision_tower."):
        return "an image or text encoder"
    if has("encoder.downsamples.", "encoder.down_blocks.", "post_quant_conv."):
        return "a video VAE (Wan or compatible), not the denoiser"
    if has("net_fake_score.") and not has("net."):
        return "the critic of a distillation run, not the generator"
    if has("transformer_blocks."):
        return "the diffusers transformer alone; give the folder that also holds controlnet/"
    if has("patch_embed_base."):
        return "a diffusers ControlNet alone; give the folder that also holds transformer/"
    if has("x_embedder.") and not has("control_embedder."):
        return "a Cosmos-Predict2.5 network without a control branch"
    if has("exp_avg", "optimizer"):
        return "optimizer state, not weights"
    return "" if has("x_embedder.proj.1.weight") else "another model"


def infer_config(shapes: Mapping[str, Shape], *, model: str | None = None) -> NetworkConfig:
    """Sizes of the network whose published shapes these are.

    Shapes cannot tell the distilled network from an older single one without image context: for such a
    network `model` "distilled" sets the unscaled times. Token counts are those of the published models.
    """
    if foreign := looks_like(shapes):
        raise CheckpointError(f"weights: expected a Cosmos-Transfer2.5 network, got {foreign}.")

    def count(prefix: str) -> int:
        found = (name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix))
        return 1 + max((int(index) for index in found if index.isdigit()), default=-1)

    try:
        width, patch_in = shapes["x_embedder.proj.1.weight"]
        text_dim, text_width = shapes["crossattn_proj.0.weight"]
        (head,) = shapes["blocks.0.self_attn.q_norm.weight"]
        mlp = shapes["blocks.0.mlp.layer1.weight"][0]
        rank = shapes["blocks.0.adaln_modulation_self_attn.1.weight"][0]
        is_multi = "control_embedder.0.proj.1.weight" in shapes
        embedder, control_blocks = branch_prefixes(0, 4 if is_multi else 1)
        control_in = shapes[f"{embedder}proj.1.weight"][1]
        blocks, controls = count("blocks."), count(control_blocks)
        latent = patch_in // PATCH**2 - 2
        image = shapes.get("img_context_proj.0.weight")
        return NetworkConfig(
            width=width,
            heads=width // head,
            blocks=blocks,
            mlp_ratio=mlp // width,
            adaln_rank=rank,
            text_width=text_width,
            text_dim=text_dim,
            image_width=image[1] if image else None,
            control_every=math.ceil(blocks / controls),
            branches=count("control_embedder.") if is_multi else 1,
            timestep_scale=1.0 if model == "distilled" and not (image or is_multi) else 0.001,
            control_modalities=(control_in // PATCH**2 - 2) // latent,
            latent_channels=latent,
        )
    except (KeyError, ValueError, ZeroDivisionError, IndexError) as error:
        raise CheckpointError(
            f"weights: the network's sizes cannot be read from its tensors ({error})."
        ) from None


# Fragments of published names and what diffusers calls them, in the order they apply.
_DIFFUSERS = (
    ("x_embedder.proj.1.", "patch_embed.proj."),
    ("control_embedder.proj.1.", "patch_embed.proj."),
    ("t_embedder.1.linear_", "time_embed.t_embedder.linear_"),
    ("t_embedding_norm.", "time_embed.norm."),
    ("self_attn.", "attn1."),
    ("cross_attn.", "attn2."),
    ("output_proj.", "to_out.0."),
    ("q_proj.", "to_q."),
    ("k_proj.", "to_k."),
    ("v_proj.", "to_v."),
    (".q_norm.", ".norm_q."),
    (".k_norm.", ".norm_k."),
    ("mlp.layer1.", "ff.net.0.proj."),
    ("mlp.layer2.", "ff.net.2."),
    ("final_layer.adaln_modulation.", "norm_out.linear_"),
    ("final_layer.linear.", "proj_out."),
)
_SHARED = ("x_embedder.", "t_embedder.", "t_embedding_norm.", "crossattn_proj.", "img_context_proj.")


def diffusers_names(published: str) -> list[tuple[str, str]]:
    """Places (component folder, name) of a published single-control tensor; a second place is a copy."""
    name = published
    for number, part in enumerate(SUBLAYERS, start=1):
        name = name.replace(f"adaln_modulation_{part}.", f"norm{number}.linear_")
    for theirs, diffusers in _DIFFUSERS:
        name = name.replace(theirs, diffusers)
    if published.startswith("control_"):
        return [("controlnet", name)]
    if name.startswith("blocks."):
        name = f"transformer_{name}"
    places = [("transformer", name)]
    if published.startswith(_SHARED):
        places.append(("controlnet", name.replace("patch_embed.", "patch_embed_base.")))
    return places
