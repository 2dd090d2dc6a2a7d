"""Options of `generate` for what looks at prompts, pictures and style images, and how they are opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli_options import together

if TYPE_CHECKING:
    from .clip_plan import ClipPlan
    from .guardrails import Guardrails
    from .style import SiglipStyle


guard_options = together(
    click.option("--guardrails/--no-guardrails", default=None,
                 help="Screen prompts and pictures, pixelate faces; default: on for published ids, off for other weights."),
    click.option("--style-encoder", metavar="FOLDER",
                 help="SigLIP 2 folder for style images; default: the published one, or the tiny model's own."),
)  # fmt: skip


def open_guardrails(options: Mapping[str, Any]) -> Guardrails | None:
    """What screens this run, its packages and weights found; None when it is off."""
    from .guardrails import screening
    from .models import is_published

    return screening(options["guardrails"], is_published(options["checkpoint"]), options["device"])[0]


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
