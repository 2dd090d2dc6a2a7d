"""Prompts of a batch on the command line: which encoder reads them, and reading them before any network is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from .cli_options import PATHS, together, with_cache_dir
from .formats import EnvironmentProblem, SpecError

if TYPE_CHECKING:
    from .clip_plan import ClipPlan
    from .config import NetworkConfig
    from .text import TextEncoder

text_options = together(
    click.option("--text-embeddings", type=PATHS, help="Embeddings of the prompts, made beforehand."),
    click.option("--text-encoder", help="Prompt encoder: reason1 (published, 7B) or a folder laid out like it; default: the "
                 "one beside the checkpoint, else reason1."),
    click.option("--text-mode", type=click.Choice(["auto", "bf16", "int8", "offload"]), default="auto", show_default=True,
                 help="Weights of reason1: on the GPU (13 GB), there in 8 bits (other results), layer by layer (1 GB), or auto: "
                 "bf16 where it fits, else offload."),
    with_cache_dir,
)  # fmt: skip
"""The options that `text_encoder` reads."""


def text_encoder(options: Mapping[str, Any]) -> TextEncoder:
    """The prompt encoder asked for, else the one of the checkpoint, else the published one. Nothing heavy is loaded."""
    from .models import is_embedded, own_text
    from .text import FileText
    from .text_cache import published_text

    file, named = options["text_embeddings"], options["text_encoder"]
    if file is not None and named is not None:
        raise SpecError(f"text: either --text-embeddings or --text-encoder, got both: {file} and {named}.")
    if (file or named) and is_embedded(options["checkpoint"]):
        key, given = ("text-embeddings", file) if file else ("text-encoder", named)
        raise SpecError(
            f"{key}: the tiny model reads prompts itself, got {given}. Name the "
            "weights that the embeddings were made for, e.g. --checkpoint published."
        )
    if file is not None:
        return FileText(file)
    if named is None and (own := own_text(options["checkpoint"])):
        return own
    return published_text(
        named or "reason1", mode=options["text_mode"], device=options["device"], folder=options["cache_dir"]
    )


def missing_prompts(text: TextEncoder, clips: Sequence[ClipPlan]) -> list[str]:
    """What a file of embeddings does not know, clip by clip; an encoder takes any prompt."""
    from .text import FileText

    if not isinstance(text, FileText):
        return []
    return [
        f"{clip.name}: {key}: must be in {text.path}, got {prompt[:60]!r}. Add it with tools/make_embeddings.py."
        for clip in clips
        for key, prompt in clip.prompts.items()
        if prompt not in text
    ]


def check_width(text: TextEncoder, configs: Mapping[str, NetworkConfig]) -> None:
    """EnvironmentProblem where a network known beforehand reads embeddings of another width."""
    for model, config in configs.items():
        if config.text_width != text.width:
            raise EnvironmentProblem(
                f"text: the {model} network reads embeddings of width {config.text_width}, got {text.width}. Use "
                "--text-embeddings or --text-encoder made for this checkpoint."
            )


def made_by(text: TextEncoder) -> dict[str, Any] | None:
    """What of the encoder a finished clip must share. A file that moved or grew tells nothing about its clip."""
    from .text import FileText, describe_encoder

    if isinstance(text, FileText):
        return None
    return {key: item for key, item in describe_encoder(text).items() if key != "mode"}


def prepare(
    text: TextEncoder,
    clips: Iterable[ClipPlan],
    between: Callable[[], None],
    report: Callable[[str], None],
) -> None:
    """Encode every prompt of `clips` that is not on disk yet; the encoder's memory is free again afterwards.

    between: called before every group of prompts, may raise to stop. Encoders that are not `CachedText` are small,
    and read prompts as they come.
    """
    from .text_cache import CachedText

    if not isinstance(text, CachedText):
        return
    told = len(text.notes)
    text.prepare([prompt for clip in clips for prompt in clip.prompts.values()], between, report)
    for note in text.notes[told:]:
        report(note)
