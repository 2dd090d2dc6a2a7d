"""The command line: parse, call, print. Results on stdout, everything else on stderr.

Exit codes: 0 all clips done (or already done), 1 some clips failed, 2 bad usage or invalid specs and nothing
started, 3 the environment must change first, 4 guardrails refused every clip, 130 or 143 interrupted with the state
resumable.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import __version__
from .cli_controls import controls, open_makers, with_maker_options
from .cli_guards import guard_options, open_guardrails, open_style
from .cli_options import (
    PATHS,
    checked_batch,
    known_configs,
    output_folder,
    overrides,
    with_model_options,
)
from .cli_parallel import described, open_layout, spread, tell_exchange, told_once, with_ranks
from .cli_tools import checkpoint, info, schema
from .formats import CosmosFastError, MediaError, SpecError
from .prompts import check_width, made_by, missing_prompts, prepare, text_encoder, text_options

if TYPE_CHECKING:
    from .solo import Solo

SPEC_ERROR, ENVIRONMENT_ERROR = 2, 3
TINY_NOTE = (
    "cosmos-fast: no --checkpoint given: the tiny model inside the package makes this (320x192, simulated robot arm and street scenes). "
    "--checkpoint published takes the full-size weights."
)


class Commands(click.Group):
    """Turns this package's own errors into a message and an exit code; anything else is a bug and shows itself."""

    def make_context(self, info_name: str | None, args: list[str], *more: Any, **extra: Any) -> click.Context:
        return super().make_context(
            info_name, args, *more, obj=tuple(args), **extra
        )  # what ranks are started with

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
@text_options
@with_maker_options
@guard_options
@click.option(
    "--recipe",
    default="exact",
    show_default=True,
    help="Precision: exact (bf16), fp32, fp8, fp8_linear, fp8_vae or fp8_sparse (an experiment).",
)
@click.option("--device", help="cuda, cuda:N or cpu; default: a GPU when there is one.")
@click.option("--vae-window", type=int, default=4, show_default=True, help="Frames the VAE encodes at once.")
@click.option(
    "--vae-strips",
    type=int,
    default=1,
    show_default=True,
    help="Strips the VAE cuts a picture into, for small cards: 4 take a third of its memory, a fifth more time.",
)
@with_ranks
@click.option(
    "--graphs/--no-graphs",
    default=None,
    help="Replay steps as CUDA graphs. Default: for images and other small shapes.",
)
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
    from .team import open_team

    team = open_team()
    with told_once(team):
        _generate(team, specs, options)


def _generate(team: Solo, specs: tuple[Path, ...], options: dict[str, Any]) -> None:
    from .guards import StopFlag, Stopped
    from .outputs import OutputFolder, of_all
    from .progress import Progress
    from .recipe import Plan, Recipe
    from .sidecar import environment

    try:
        recipe = Recipe.preset(options["recipe"])
        plan = Plan(
            device=options["device"], vae_encode_window=options["vae_window"], vae_strips=options["vae_strips"],
            graphs=options["graphs"], exchange=options["exchange"],
        )  # fmt: skip
    except ValueError as error:
        raise SpecError(str(error)) from None
    configs = known_configs(options["checkpoint"], options["model"])
    checked = team.share("batch", lambda: checked_batch(
        specs, options, recipe=recipe, plan=plan, checkpoint=options["checkpoint"], configs=configs,
    ))  # fmt: skip
    batch, some_invalid, found = checked
    layout = open_layout(options, team, batch)
    if options["dry_run"]:
        click.echo(batch.as_table() + (f"\n{described(layout, options)}" if layout.ranks > 1 else ""))
        sys.exit(1 if some_invalid else 0)
    text = text_encoder(options)
    check_width(text, configs)
    if options["checkpoint"] is None and not options["quiet"] and team.started == 1:
        click.echo(TINY_NOTE, err=True)
    if not options["skip_invalid"] and (missing := missing_prompts(text, batch.clips)):
        raise SpecError(f"{len(missing)} prompts without embeddings", missing)
    makers = open_makers(options)
    makers.check(batch.clips)
    style, guardrails = open_style(options, batch.clips), open_guardrails(options)
    folder = OutputFolder(output_folder(options["folder"], found))
    if layout.ranks > team.started:
        with StopFlag(options["grace"]) as stop, Progress(batch.clips, quiet=True) as progress:
            outcome = spread(layout, batch, {"batch": checked}, folder, stop, options["grace"], progress.line)
        for problem in outcome.problems:
            click.echo(f"error: {problem}", err=True)
        if stop.requested:
            click.echo(str(Stopped(stop.exit_code)), err=True)
        made = [clip for clip in batch.clips if outcome.status[clip.name][0] in ("done", "skipped")]
        for clip in made:
            click.echo(folder.clip(clip.name).media(clip.frames))
        sys.exit(of_all([outcome.exit_code, 1] if some_invalid else [outcome.exit_code]))
    from .engine import Engine
    from .models import locate, locate_vae
    from .report import gpu_record
    from .runner import Options, follow, run_batch, waiting
    from .team import Team

    team.enter(layout)
    plan = replace(plan, device=team.device(plan.device), context=layout.context, cfg=layout.cfg)

    def open_engine(model: str) -> Engine:
        locate(options["checkpoint"], model)  # a network that is missing shows before prompts are encoded
        if team.is_leader:
            clips = waiting(batch.clips, folder, run)
            if layout.groups > 1:
                prepare(text, team.split(clips), stop.check, progress.line)
                team.meet("prompts", stop.check)
            prepare(text, clips, stop.check, progress.line)
            team.open(model)
        engine = Engine(
            options["checkpoint"], model=model, vae=options["vae"], text=text, recipe=recipe, plan=plan,
            clip_makers=makers, style=style, guardrails=guardrails or options["guardrails"],
        )  # fmt: skip
        if team.is_leader:
            tell_exchange(engine.mesh, progress.line)
        if team.is_first:
            policies = {"recipe": recipe.to_dict(), "plan": engine.plan_record}
            folder.write_run(environment(gpu_record(engine.device)) | policies)
        return engine

    def made_with(model: str) -> dict[str, Any]:
        source = locate(options["checkpoint"], model)
        record = source.record(locate_vae(options["vae"], source))
        return {"recipe": recipe.to_dict(), "checkpoint": record, "text": made_by(text)}

    run = Options(options["codec"], options["resume"], made_with, guardrails, makers)
    shown = Progress(batch.clips, quiet=options["quiet"], label=team.label, workers=layout.groups)
    with StopFlag(options["grace"]) as stop, shown as progress:
        if isinstance(team, Team) and not team.is_leader:
            follow(team, open_engine)
            sys.exit(team.close(0))
        try:
            summary = run_batch(
                batch, open_engine, folder, options=run, stop=stop, progress=progress.step,
                on_made=progress.made, report=progress.line, team=team,
            )  # fmt: skip
        except Stopped as stopped:
            if team.started == 1:
                progress.line(str(stopped))
            sys.exit(team.close(stopped.exit_code))
    for name in (*summary.skipped, *summary.done):
        click.echo(folder.clip(name).media(next(c.frames for c in batch.clips if c.name == name)))
    sys.exit(team.close(of_all([summary.exit_code, 1] if some_invalid else [summary.exit_code])))


@main.command()
@click.argument("specs", nargs=-1, required=True, type=PATHS)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--checkpoint", help="Plan for these weights, as generate takes them; default: the tiny model.")
@with_model_options
@overrides
def plan(specs: tuple[Path, ...], as_json: bool, checkpoint: str | None, **options: Any) -> None:
    """Check SPECS and print chunks, shapes, FLOPs and memory. Needs no GPU and no weights."""
    configs = known_configs(checkpoint, options["model"])
    batch, some_invalid, _ = checked_batch(specs, options, checkpoint=checkpoint, configs=configs)
    click.echo(batch.as_json() if as_json else batch.as_table())
    sys.exit(1 if some_invalid else 0)


for command in (controls, schema, info, checkpoint):
    main.add_command(command)

if __name__ == "__main__":
    main()
