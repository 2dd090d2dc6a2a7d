"""Several ranks on the command line: their options, the layout, the parent that starts them, and how a rank ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from .cli_options import together
from .formats import CosmosFastError, EnvironmentProblem, MediaError, SpecError
from .recipe import EXCHANGES

if TYPE_CHECKING:
    from .clip_plan import BatchPlan
    from .guards import StopFlag
    from .launch import Outcome
    from .layout import Layout
    from .outputs import OutputFolder
    from .parallel import Mesh
    from .solo import Solo

with_ranks = together(
    click.option("--gpus", type=click.IntRange(1), help="GPUs to use (with --device cpu: processes); default: 1, or the ranks of torchrun."),
    click.option("--context", type=click.IntRange(1), help="GPUs that share the tokens of a clip; default: what one clip alone can use."),
    click.option("--cfg", type=click.IntRange(1, 2), help="2: half of a clip's GPUs take the second guidance pass; default: where all clips have one."),
    click.option("--exchange", type=click.Choice(EXCHANGES), default="auto", show_default=True,
                 help="How GPUs that share tokens pass them on: copies between GPUs of one host, collectives (NCCL), or the former where it proves itself."),
)  # fmt: skip
"""The options that `open_layout` reads, and --exchange."""


def open_layout(options: Mapping[str, Any], team: Solo, batch: BatchPlan) -> Layout:
    """How the ranks share the clips; SpecError or EnvironmentProblem where they cannot."""
    from .dispatch import pick_device
    from .layout import choose

    started, gpus, device = team.started, options["gpus"], options["device"]
    if started > 1 and gpus not in (None, started):
        raise SpecError(f"gpus: must be the {started} ranks that were started, got {gpus}. Leave --gpus out.")
    layout = choose(max(started, gpus or 1), batch.clips, options["context"], options["cfg"])
    if layout.ranks > 1 and device not in (None, "cuda", "cpu"):
        raise SpecError(
            f"device: must be cuda or cpu for {layout.ranks} ranks, got {device}. Leave the number out."
        )
    if layout.ranks > 1 and started == 1 and device != "cpu":
        try:
            pick_device(f"cuda:{layout.ranks - 1}")
        except EnvironmentProblem as error:
            raise EnvironmentProblem(
                f"gpus: must be at most the GPUs of this machine, got {layout.ranks}. {error}"
            ) from None
    return layout


def described(layout: Layout, options: Mapping[str, Any]) -> str:
    """The layout for --dry-run, with the exchange as far as it is known before the ranks have tried it."""
    if layout.context == 1:
        return str(layout)
    exchange = options["exchange"]
    if exchange == "auto" and options["device"] != "cpu":
        exchange = "auto: copies if they prove themselves at the start, else collectives"
    return f"{layout}, exchange {exchange}"


def tell_exchange(mesh: Mesh, report: Callable[[str], None]) -> None:
    """One line on how GPUs that share tokens pass them on."""
    if mesh.context.size > 1 and mesh.device.type == "cuda":
        report(mesh.notes[0] if mesh.notes else f"exchange: by {mesh.exchange}.")


@contextlib.contextmanager
def told_once(team: Solo) -> Iterator[None]:
    """What ends the run is printed by one process: the parent, or under torchrun the rank that met it first."""
    if team.started == 1:
        yield
        return
    from .team import Elsewhere, Team

    assert isinstance(team, Team)
    try:
        yield
    except Elsewhere as error:
        os._exit(error.exit_code)
    except CosmosFastError as error:
        problems = getattr(error, "problems", [str(error)])
        code = 2 if isinstance(error, (SpecError, MediaError)) else getattr(error, "exit_code", 3)
        if team.fatal(problems, code):
            for problem in problems:
                click.echo(f"error: rank {team.ranks.rank}: {problem}", err=True)
        os._exit(code)  # a clean exit would wait for ranks that wait for this one


def spread(
    layout: Layout, batch: BatchPlan, shared: dict[str, Any], folder: OutputFolder, stop: StopFlag, grace_s: float,
    report: Callable[[str], None],
) -> Outcome:  # fmt: skip
    """Run this same command on the ranks of a layout."""
    from .launch import Supervisor

    arguments = click.get_current_context().find_root().obj
    supervisor = Supervisor(
        arguments, layout, batch.clips, folder, shared=shared, report=report, grace_s=grace_s
    )
    return supervisor.run(stop)
