"""Options of `generate` for what looks at prompts, pictures and style images, and how they are opened."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from .clip_plan import ClipPlan
    from .config import NetworkConfig
    from .guardrails import Guardrails
    from .style import SiglipStyle


def guard_options(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option(
        "--style-encoder", metavar="FOLDER",
        help="SigLIP 2 folder for style images; default: the published one, or the tiny model's own.",
    )(command)  # fmt: skip
    return click.option(
        "--guardrails/--no-guardrails", default=None,
        help="Screen prompts and pictures, pixelate faces; default: on for published ids, off for other weights.",
    )(command)  # fmt: skip


def open_guardrails(options: Mapping[str, Any]) -> Guardrails | None:
    """What screens this run, its packages and weights found; None when it is off."""
    from .guardrails import screening
    from .models import is_published

    return screening(options["guardrails"], is_published(options["checkpoint"]), options["device"])[0]


def offers_style(
    checkpoint: str | None, style_encoder: str | None, configs: Mapping[str, NetworkConfig] | None
) -> bool:
    """Whether style images can be encoded for these weights, as far as is known before they are loaded."""
    from .config import NetworkConfig
    from .models import is_embedded

    if is_embedded(checkpoint):
        return True
    published = NetworkConfig.single().image_width
    is_known = (
        style_encoder is not None or not configs or any(c.image_width == published for c in configs.values())
    )
    return is_known and importlib.util.find_spec("transformers") is not None


def open_style(options: Mapping[str, Any], clips: Sequence[ClipPlan]) -> SiglipStyle | None:
    """The encoder these clips need, its weights found; None where no clip has a style image or the model brings
    an encoder of its own."""
    from .disk_cache import DiskCache
    from .models import is_embedded
    from .style import STYLE_CACHE_BYTES, SiglipStyle

    named = options["style_encoder"]
    if all(clip.style is None for clip in clips) or (named is None and is_embedded(options["checkpoint"])):
        return None
    folder = Path(options["cache_dir"]) / "style"
    encoder = SiglipStyle(
        named or "style", device=options["device"], cache=DiskCache(folder, STYLE_CACHE_BYTES)
    )
    encoder.check()
    return encoder
