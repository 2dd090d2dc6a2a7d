"""What commands that read requests share: options, overrides, the checked batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .disk_cache import CACHE_HOME
from .formats import CONTROLS, SpecError

PATHS = click.Path(path_type=Path)
Command = Callable[..., Any]


def together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator; --help lists them in this order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


with_cache_dir = click.option(
    "--cache-dir", type=PATHS, default=CACHE_HOME, show_default=True, envvar="COSMOS_FAST_CACHE",
    help="Folder for what is used again; also COSMOS_FAST_CACHE.",
)  # fmt: skip


def overrides(command: Callable[..., Any]) -> Callable[..., Any]:
    """One option per spec field, and --set for fields of a control."""
    from .spec import Spec

    command = click.option(
        "--set", "control_fields", multiple=True, metavar="CONTROL.FIELD=VALUE",
        help="Override a field of a control, e.g. --set edge.control_weight=0.5. Repeatable.",
    )(command)  # fmt: skip
    for name, field in reversed(list(Spec.model_fields.items())):
        if name in ("name", "output_dir", *CONTROLS):
            continue
        flag = "--" + name.replace("_", "-")
        if field.annotation is bool:
            command = click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=field.description)(
                command
            )
        else:
            command = click.option(flag, name, default=None, metavar="VALUE", help=field.description)(command)
    return command


def read_overrides(options: dict[str, Any]) -> dict[str, Any]:
    """Options given on the command line as spec values: JSON where the text is JSON, else the text."""
    from .spec import Spec

    changes = {key: value(options[key], key) for key in Spec.model_fields if options.get(key) is not None}
    for pair in options.get("control_fields", ()):
        key, separator, text = pair.partition("=")
        if not separator:
            raise SpecError(f"--set: must be CONTROL.FIELD=VALUE, got {pair!r}.")
        changes[key] = value(text, key)
    return changes


def value(given: Any, key: str) -> Any:
    if not isinstance(given, str) or key.rpartition(".")[2] in (
        "prompt",
        "negative_prompt",
        "control_prompt",
        "mask_prompt",
    ):
        return given
    try:
        return json.loads(given)
    except ValueError:
        return given


with_model_options = together(
    click.option("--model", default="auto", show_default=True, help="auto, edge, vis, depth, seg, multi or edge/distilled."),
    click.option("--on-corrupt", type=click.Choice(["fail", "warn"]), default="fail", show_default=True,
                 help="What to do with an input that decodes with damage."),
    click.option("--skip-invalid", is_flag=True, help="Run the clips that are valid; exit 1 for the others."),
)  # fmt: skip


def checked_batch(
    specs: tuple[Path, ...], options: dict[str, Any], *, checkpoint: str | None, **preflight_options: Any
) -> Any:
    """The whole batch, checked without weights or a GPU; SpecError lists every problem of every clip."""
    from .makers import CLIP_MAKERS
    from .models import limits, offers_style
    from .planning import preflight
    from .spec import load_valid_specs

    found, problems = load_valid_specs(specs, read_overrides(options))
    has_style = offers_style(checkpoint, options.get("style_encoder"), preflight_options.get("configs"))
    makers = ("edge", "vis", *CLIP_MAKERS, *(("style",) if has_style else ()))
    batch = preflight(
        found, options["model"], makers=makers, on_corrupt=options["on_corrupt"], strict=False,
        **limits(checkpoint), **preflight_options,
    )  # fmt: skip
    problems += batch.problems
    if problems and not options["skip_invalid"]:
        raise SpecError(f"{len(problems)} problems", problems)
    if problems and not batch.clips:
        raise SpecError("no clip is valid", [*problems, "no clip is valid."])
    for problem in problems:
        click.echo(f"error: {problem}", err=True)
    return batch, bool(problems), found


def output_folder(given: Path | None, specs: list[Any]) -> Path:
    if given is not None:
        return given
    named = {spec.output_dir for spec in specs}
    if len(named) != 1 or None in named:
        raise SpecError("output folder: must be given with -o, or be one output_dir shared by all specs.")
    return Path(named.pop())


def known_configs(checkpoint: str | None, model: str) -> dict[str, Any]:
    """Network sizes read from the header of a local checkpoint, for the plan; published sizes otherwise."""
    from .models import local_configs

    return local_configs(checkpoint, model)
