"""The command line: parse, call, print. Results on stdout, everything else on stderr.

Exit codes: 0 all clips done (or already done), 1 some clips failed, 2 bad usage or invalid specs and nothing
started, 3 the environment must change first, 130 or 143 interrupted with the state resumable.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import __version__
from .formats import CONTROLS, CosmosFastError, MediaError, SpecError

if TYPE_CHECKING:
    from .clip_plan import ClipPlan

SPEC_ERROR, ENVIRONMENT_ERROR = 2, 3
TINY_NOTE = (
    "cosmos-fast: no --checkpoint given: the tiny model inside the package makes this (320x192, simulated table scenes). "
    "--checkpoint published takes the full-size weights."
)
PATHS = click.Path(path_type=Path)


class Commands(click.Group):
    """Turns this package's own errors into a message and an exit code; anything else is a bug and shows itself."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (SpecError, MediaError) as error:
            for problem in getattr(error, "problems", [str(error)]):
                click.echo(f"error: {problem}", err=True)
            ctx.exit(SPEC_ERROR)
        except CosmosFastError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(getattr(error, "exit_code", ENVIRONMENT_ERROR))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="cosmos-fast")
def main() -> None:
    """Controllable video generation with Cosmos-Transfer2.5-2B."""


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


model_options = [
    click.option("--model", default="auto", show_default=True, help="auto, edge, vis, depth, seg, multi or edge/distilled."),
    click.option("--on-corrupt", type=click.Choice(["fail", "warn"]), default="fail", show_default=True,
                 help="What to do with an input that decodes with damage."),
    click.option("--skip-invalid", is_flag=True, help="Run the clips that are valid; exit 1 for the others."),
]  # fmt: skip


def with_model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(model_options):
        command = option(command)
    return command


def checked_batch(
    specs: tuple[Path, ...], options: dict[str, Any], *, checkpoint: str | None, **preflight_options: Any
) -> Any:
    """The whole batch, checked without weights or a GPU; SpecError lists every problem of every clip."""
    from .models import is_embedded
    from .planning import preflight
    from .spec import load_valid_specs

    found, problems = load_valid_specs(specs, read_overrides(options))
    makers = ("edge", "vis", *(("style",) if is_embedded(checkpoint) else ()))
    batch = preflight(
        found, options["model"], makers=makers, on_corrupt=options["on_corrupt"], strict=False,
        **preflight_options,
    )  # fmt: skip
    problems += batch.problems
    if problems and not options["skip_invalid"]:
        raise SpecError(f"{len(problems)} problems", problems)
    if problems and not batch.clips:
        raise SpecError("no clip is valid", [*problems, "no clip is valid."])
    for problem in problems:
        click.echo(f"error: {problem}", err=True)
    return batch, bool(problems), found


@main.command()
@click.argument("specs", nargs=-1, required=True, type=PATHS)
@click.option(
    "-o", "--output-dir", "folder", type=PATHS, help="Folder for results; default: output_dir of the spec."
)
@click.option(
    "--checkpoint",
    help="tiny: the small model inside the package (default); published: the full-size files of --model; or a "
    "published id, a file or a folder.",
)
@click.option(
    "--vae", help="Video VAE file or folder; default: beside the checkpoint, else the published one."
)
@click.option("--text-embeddings", type=PATHS, help="Embeddings of the prompts (tools/make_embeddings.py).")
@click.option("--recipe", default="exact", show_default=True, help="Precision: exact (bf16) or fp32.")
@click.option("--device", help="cuda, cuda:N or cpu; default: a GPU when there is one.")
@click.option("--vae-window", type=int, default=4, show_default=True, help="Frames the VAE encodes at once.")
@click.option("--graphs", is_flag=True, help="Replay steps as CUDA graphs: for small shapes and images.")
@click.option(
    "--codec", type=click.Choice(["libx264", "libx265", "libsvtav1"]), default="libx264", show_default=True
)
@click.option("--resume", is_flag=True, help="Keep clips that are finished and unchanged.")
@click.option(
    "--grace", default=30.0, show_default=True, help="Seconds a clip may still take after an interrupt."
)
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan, make nothing.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
@with_model_options
@overrides
def generate(specs: tuple[Path, ...], **options: Any) -> None:
    """Make the clips that SPECS (.json, .jsonl or folders of them) ask for."""
    from .guards import StopFlag, Stopped
    from .outputs import OutputFolder
    from .progress import Progress
    from .recipe import Plan, Recipe
    from .sidecar import environment

    try:
        recipe = Recipe.preset(options["recipe"])
        plan = Plan(
            device=options["device"], vae_encode_window=options["vae_window"], graphs=options["graphs"]
        )
    except ValueError as error:
        raise SpecError(str(error)) from None
    batch, some_invalid, found = checked_batch(
        specs,
        options,
        recipe=recipe,
        plan=plan,
        checkpoint=options["checkpoint"],
        configs=known_configs(options["checkpoint"], options["model"]),
        **limits(options["checkpoint"]),
    )
    if options["dry_run"]:
        click.echo(batch.as_table())
        sys.exit(1 if some_invalid else 0)
    text = text_encoder(options)
    if options["checkpoint"] is None and not options["quiet"]:
        click.echo(TINY_NOTE, err=True)
    if not options["skip_invalid"] and (missing := missing_prompts(text, batch.clips)):
        raise SpecError(f"{len(missing)} prompts without embeddings", missing)
    folder = OutputFolder(output_folder(options["folder"], found))
    from .engine import Engine
    from .models import locate, locate_vae
    from .report import gpu_record
    from .runner import Options, run_batch

    def open_engine(model: str) -> Engine:
        engine = Engine(
            options["checkpoint"], model=model, vae=options["vae"], text=text, recipe=recipe, plan=plan,
        )  # fmt: skip
        folder.write_run(
            environment(gpu_record(engine.device)) | {"recipe": recipe.to_dict(), "plan": plan.to_dict()}
        )
        return engine

    def made_with(model: str) -> dict[str, Any]:
        source = locate(options["checkpoint"], model)
        record = source.record(locate_vae(options["vae"], source))
        return {"recipe": recipe.to_dict(), "checkpoint": record}

    with StopFlag(options["grace"]) as stop, Progress(batch.clips, quiet=options["quiet"]) as progress:
        try:
            summary = run_batch(
                batch, open_engine, folder, options=Options(options["codec"], options["resume"], made_with),
                stop=stop, progress=progress.step, report=progress.line,
            )  # fmt: skip
        except Stopped as stopped:
            progress.line(str(stopped))
            sys.exit(stopped.exit_code)
    for name in (*summary.skipped, *summary.done):
        click.echo(folder.clip(name).media(next(c.frames for c in batch.clips if c.name == name)))
    sys.exit(1 if summary.failed or some_invalid else 0)


def output_folder(given: Path | None, specs: list[Any]) -> Path:
    if given is not None:
        return given
    named = {spec.output_dir for spec in specs}
    if len(named) != 1 or None in named:
        raise SpecError("output folder: must be given with -o, or be one output_dir shared by all specs.")
    return Path(named.pop())


def text_encoder(options: dict[str, Any]) -> Any:
    """The prompt encoder that goes with the checkpoint."""
    from .models import is_embedded, own_text
    from .text import FileText

    if options["text_embeddings"] is not None:
        if is_embedded(options["checkpoint"]):
            raise SpecError(
                f"text-embeddings: the tiny model reads prompts itself, got {options['text_embeddings']}. Name the "
                "weights that the embeddings were made for, e.g. --checkpoint published."
            )
        return FileText(options["text_embeddings"])
    if own := own_text(options["checkpoint"]):
        return own
    raise SpecError(
        "text: this checkpoint needs embeddings of its prompts, got none. Pass --text-embeddings FILE."
    )


def missing_prompts(text: Any, clips: Sequence[ClipPlan]) -> list[str]:
    """What a file of embeddings does not know, clip by clip; an encoder takes any prompt."""
    from .text import FileText

    if not isinstance(text, FileText):
        return []
    problems = []
    for clip in clips:
        has_negative = clip.network_calls > clip.steps * len(clip.chunks)
        for key in ("prompt", "negative_prompt")[: 1 + has_negative]:
            if (prompt := getattr(clip.spec, key)) not in text:
                problems.append(
                    f"{clip.name}: {key}: must be in {text.path}, got {prompt[:60]!r}. "
                    "Add it with tools/make_embeddings.py."
                )
    return problems


def limits(checkpoint: str | None) -> dict[str, Any]:
    """What the checkpoint was made for (chunk lengths, resolutions, defaults), where its card says so."""
    from .models import limits as of

    return of(checkpoint)


def known_configs(checkpoint: str | None, model: str) -> dict[str, Any]:
    """Network sizes read from the header of a local checkpoint, for the plan; published sizes otherwise."""
    from .models import local_configs

    return local_configs(checkpoint, model)


@main.command()
@click.argument("specs", nargs=-1, required=True, type=PATHS)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--checkpoint", help="Plan for these weights, as generate takes them; default: the tiny model.")
@with_model_options
@overrides
def plan(specs: tuple[Path, ...], as_json: bool, checkpoint: str | None, **options: Any) -> None:
    """Check SPECS and print chunks, shapes, FLOPs and memory. Needs no GPU and no weights."""
    configs = known_configs(checkpoint, options["model"])
    batch, some_invalid, _ = checked_batch(
        specs, options, checkpoint=checkpoint, configs=configs, **limits(checkpoint)
    )
    click.echo(batch.as_json() if as_json else batch.as_table())
    sys.exit(1 if some_invalid else 0)


@main.command()
def schema() -> None:
    """Print the JSON Schema of a spec."""
    from .spec import json_schema

    click.echo(json.dumps(json_schema(), indent=2))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--device", help="Device to explain; default: a GPU when there is one, else the CPU.")
def info(as_json: bool, device: str | None) -> None:
    """Show this machine: devices, versions, codecs, and which implementation each op would use and why."""
    from .report import machine

    record = machine(device)
    click.echo(json.dumps(record, indent=2) if as_json else record_text(record))


def record_text(record: dict[str, Any]) -> str:
    lines = [f"{key}: {item}" for key, item in record.items() if key != "ops"]
    for dtype, ops in record["ops"].items():
        lines.append(f"ops on {record['device']} in {dtype}:")
        for op in ops:
            lines.append(f"  {op['op']:<16} {op['chosen']}")
            lines += [f"  {'':<16}   not {name}: {why}" for name, why in op["others"].items()]
    return "\n".join(lines)


@main.group()
def checkpoint() -> None:
    """Look into weight files, or convert them."""


@checkpoint.command()
@click.argument("path", type=PATHS)
@click.option("--finite", is_flag=True, help="Also read every tensor and look for NaN and infinities.")
def inspect(path: Path, finite: bool) -> None:
    """Say what PATH holds. Exit 3 if it cannot be used."""
    from .checkpoint import inspect as look

    report = look(path, is_finite_checked=finite)
    click.echo(f"{report.path}: {report.format}, {report.kind}")
    click.echo(f"{report.tensors} tensors, {report.parameters:,} parameters, {report.dtypes}")
    if report.config is not None:
        click.echo(f"config: {report.config.to_json()}")
    click.echo(f"ignored: {len(report.ignored)} entries")
    for problem in report.problems:
        click.echo(f"error: {problem}", err=True)
    sys.exit(ENVIRONMENT_ERROR if report.problems else 0)


@checkpoint.command()
@click.argument("source")
@click.argument("target", type=PATHS)
@click.option("--dtype", type=click.Choice(["bf16", "fp32", "keep"]), default="bf16", show_default=True)
@click.option(
    "--model", type=click.Choice(["single", "distilled"]), help="What the tensors alone do not tell."
)
def convert(source: str, target: Path, dtype: str, model: str | None) -> None:
    """Write SOURCE (any readable form, or a published id) as one safetensors file TARGET."""
    import torch

    from . import registry
    from .checkpoint import convert as rewrite

    path = registry.resolve(source)
    if not isinstance(path, Path):
        raise SpecError(f"convert: must name one network, got {', '.join(path)} in {source}.")
    wanted = {"bf16": torch.bfloat16, "fp32": torch.float32, "keep": None}[dtype]
    report = rewrite(path, target, wanted, model=model)
    click.echo(f"{target}: {report.kind}, {report.tensors} tensors")


if __name__ == "__main__":
    main()
