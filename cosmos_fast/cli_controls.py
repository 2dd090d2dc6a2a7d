"""The command that makes controls alone, and the options that say what makes them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli_options import (
    PATHS,
    checked_batch,
    known_configs,
    output_folder,
    overrides,
    together,
    with_cache_dir,
    with_model_options,
)

if TYPE_CHECKING:
    from .clip_plan import ClipPlan
    from .guards import StopFlag
    from .makers import Makers
    from .outputs import OutputFolder
    from .progress import Progress

with_maker_options = together(
    click.option("--depth-model", help="What makes depth: a Video Depth Anything file, hf://org/repo/file, or, frame by frame, "
                 "a Depth Anything folder or id; default: the published small one."),
    click.option("--detector-model", help="What finds objects by words: a folder; default: grounding-dino-base."),
    click.option("--tracker-model", help="What follows objects: sam2.1-hiera-large (default), sam2-hiera-large or a folder."),
    click.option("--detect-every", type=int, help="Frames between searches for new objects; default: the first frame alone."),
)  # fmt: skip
"""The options that `open_makers` reads, but for --device and --cache-dir."""


def open_makers(options: Mapping[str, Any]) -> Makers:
    """What computes missing controls and masks, as the options say. Loads nothing."""
    from .clip_maker import MakerOptions
    from .disk_cache import DiskCache
    from .dispatch import pick_device
    from .makers import Makers

    chosen = MakerOptions(
        depth_model=options["depth_model"], detector_model=options["detector_model"],
        tracker_model=options["tracker_model"], detect_every=options["detect_every"],
    )  # fmt: skip
    folder = Path(options["cache_dir"]) / "controls"
    return Makers(pick_device(options["device"]), chosen, DiskCache(folder))


@click.command()
@click.argument("specs", nargs=-1, required=True, type=PATHS)
@click.option(
    "-o", "--output-dir", "folder", type=PATHS, help="Folder for results; default: output_dir of the spec."
)
@click.option("--checkpoint", help="Plan for these weights, as generate takes them; default: the tiny model.")
@click.option("--device", help="cuda, cuda:N or cpu; default: a GPU when there is one.")
@with_cache_dir
@click.option(
    "--codec", type=click.Choice(["libx264", "libx265", "libsvtav1"]), default="libx264", show_default=True
)
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
@with_maker_options
@with_model_options
@overrides
def controls(specs: tuple[Path, ...], **options: Any) -> None:
    """Make the controls and masks of SPECS alone, at working size, without any generating network.

    A file saved here can be given back as control_path or mask_path. What needs the whole clip (depth, segments, masks
    from words) stays in the cache, where generate finds it.
    """
    from .guards import StopFlag, Stopped
    from .outputs import OutputFolder
    from .progress import Progress

    checkpoint = options["checkpoint"]
    batch, some_invalid, found = checked_batch(
        specs, options, checkpoint=checkpoint, configs=known_configs(checkpoint, options["model"]),
    )  # fmt: skip
    makers = open_makers(options)
    makers.check(batch.clips)
    folder = OutputFolder(output_folder(options["folder"], found))
    with StopFlag(30.0) as stop, Progress(batch.clips, quiet=options["quiet"]) as progress:
        try:
            paths, failed = _make(batch.clips, makers, folder, options["codec"], stop, progress)
        except Stopped as stopped:
            progress.line(str(stopped))
            sys.exit(stopped.exit_code)
    for path in paths:
        click.echo(path)
    sys.exit(1 if failed or some_invalid else 0)


def _make(
    clips: tuple[ClipPlan, ...], makers: Makers, folder: OutputFolder, codec: str, stop: StopFlag,
    progress: Progress,
) -> tuple[list[Path], int]:  # fmt: skip
    """(files written, clips that failed)."""
    from .guards import Stopped
    from .media_files import ControlFiles
    from .runner import describe

    def on_frame(name: str, what: str, done: int, total: int) -> None:
        stop.check()
        progress.made(name, what, done, total)

    paths, failed = [], 0
    prepared = makers.prepare(clips, on_frame)
    for name, clip in prepared.items():
        try:
            if isinstance(clip, Exception):
                raise clip
            with ControlFiles(clip, folder.clip(name), codec) as files:
                written = files.save(lambda done, total: on_frame(name, "chunk", done, total))  # noqa: B023
        except Stopped:
            raise
        except Exception as error:  # whatever it is, the other clips are not to pay for it
            failed += 1
            progress.line(f"{name}: failed: {describe(error)}")
            continue
        for note in clip.notes:
            progress.line(f"{name}: {note}")
        paths += written
    return paths, failed
