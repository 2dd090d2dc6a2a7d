"""A batch of clips, made one after another: written, checked, recorded, resumable.

One bad clip costs one clip. A clip counts as done when its media have been reopened and counted, the picture
passed its checks and its sidecar is on disk; until then only part files exist.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import dispatch
from .clip_parts import Opening, Piece
from .clip_plan import BatchPlan, ClipPlan
from .engine import Engine, Progress, Step
from .formats import ClipError, CosmosFastError, EnvironmentProblem, MediaError, Refused
from .guardrails import Guardrails, record_off
from .guards import Claim, FrameChecks, StopFlag, Stopped
from .makers import Makers, OnMade
from .media_files import Media
from .outputs import ClipOutputs, OutputFolder, exit_code, sha256
from .sidecar import build_sidecar
from .solo import Solo
from .spec import NEGATIVE_PROMPT
from .text import describe_encoder, unread
from .video_sniff import stat_regular
from .worker import Worker

if TYPE_CHECKING:
    from .team import Team

ALONE = Solo()
MOST_DISK_FAILURES = 3
"""Clips in a row that may fail because the output folder refuses, before the batch stops."""
MOST_WAITING = 8
"""Decoded windows that may wait for the thread that writes them: 11 MB each at 720p."""


@dataclass
class Summary:
    """What became of every clip of a batch, by name. elsewhere: another process is making it. failed and refused: why."""

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        return exit_code(name for name, clips in vars(self).items() if clips)


@dataclass(frozen=True)
class Options:
    """How a batch is written. resume: keep clips that are finished and unchanged.

    made_with: what a kept clip must have been made with besides its spec, by model: its recipe and weight
    files as the sidecar records them. guardrails: what screens the prompts before any model is loaded; pass the
    same to the engines. makers: what computes missing controls and masks, also before any model is loaded.
    """

    codec: str = "libx264"
    resume: bool = False
    made_with: Callable[[str], dict[str, Any]] = lambda model: {}
    guardrails: Guardrails | None = None
    makers: Makers | None = None


def run_batch(
    batch: BatchPlan,
    open_engine: Callable[[str], Engine],
    folder: OutputFolder,
    *,
    options: Options,
    stop: StopFlag,
    progress: Progress | None = None,
    on_made: OnMade | None = None,
    report: Callable[[str], None] = lambda line: None,
    team: Solo = ALONE,
) -> Summary:
    """Make every clip of a checked batch that falls to this group of ranks, those of one model together.

    report gets one line per clip, on_made one call per frame of a computed control. team: the ranks this process leads,
    by default none. Raises Stopped when asked to stop; everything finished stays finished.
    """
    summary, disk_failures = Summary(), 0
    prepared: dict[str, ClipPlan | Exception] | None = None
    engine: Engine | None = None
    model, made_with = None, {}
    for clip in team.order(batch.clips):
        if clip.model != model:
            engine = None
            gc.collect()  # two networks need not fit
            model, made_with = clip.model, options.made_with(clip.model) if options.resume else {}
        outputs = folder.clip(clip.spec.name)
        stop.check()
        with contextlib.ExitStack() as held:
            claim = Claim.take(outputs.claim_path, folder.locked)
            if claim is None:
                summary.elsewhere.append(clip.spec.name)
                report(f"{clip.spec.name}: another process is making it")
                team.told(clip, "elsewhere")
                continue
            held.enter_context(claim)
            # Asked with the claim held: another process may have finished the clip a moment ago.
            reason = redo_reason(clip, outputs, options, made_with) if options.resume else ""
            if reason is None:
                summary.skipped.append(clip.spec.name)
                report(f"{clip.spec.name}: already done")
                team.told(clip, "skipped")
                continue
            if options.resume and outputs.sidecar.exists():
                report(f"{clip.spec.name}: made again: {reason}")
            fault = blocked(options.guardrails, batch, clip)
            if fault is None and prepared is None:
                prepared = prepare(batch, folder, options, stop, on_made, team)
            if fault is None and prepared is not None:
                ready = prepared.get(clip.name, clip)
                clip, fault = (clip, ready) if isinstance(ready, Exception) else (ready, None)
            if fault is None:
                engine = engine or open_engine(clip.model)
                cut = unread(engine.text, own_prompts(clip))
                for note in cut:
                    report(f"{clip.spec.name}: {note}")
                clip = replace(clip, notes=(*clip.notes, *cut))
                try:
                    record = make_clip(engine, clip, outputs, claim, options, stop, progress, team)
                except Stopped:
                    outputs.remove_parts()
                    raise
                except Exception as error:  # whatever it is, the other clips are not to pay for it
                    fault = error
            if fault is not None:
                message, status = describe(fault), "refused" if isinstance(fault, Refused) else "failed"
                (summary.refused if status == "refused" else summary.failed)[clip.spec.name] = message
                report(f"{clip.spec.name}: {status}: {message}")
                with contextlib.suppress(OSError, EnvironmentProblem):
                    outputs.fail(message, status, spec_hash=clip.spec.hash())
                team.told(clip, status, message)
                disk_failures = disk_failures + 1 if is_disk_trouble(fault) else 0
                if disk_failures >= MOST_DISK_FAILURES:
                    report(f"stopping: {disk_failures} clips in a row could not be written")
                    return summary
                continue
            disk_failures = 0
            summary.done.append(clip.spec.name)
            seconds = sum(stage["seconds"] for stage in record["stages"].values())
            report(f"{clip.spec.name}: done in {seconds:.1f} s: {folder.root / record['output']['file']}")
            team.told(clip, "done")
    return summary


def follow(team: Team, open_engine: Callable[[str], Engine]) -> None:
    """What a rank does that does not lead: its share of every clip that its leader makes. It writes nothing."""
    engine: Engine | None = None
    for task, given in team.tasks():
        if task == "open":
            engine = None
            gc.collect()
            engine = open_engine(given)
            continue
        assert engine is not None, "follow: a clip came before its model"
        with team.following(given, describe), contextlib.closing(  # type: ignore[type-var]
            engine.pieces(given, lambda step: team.heed(is_step=True))
        ) as pieces:  # fmt: skip
            for _ in pieces:
                team.heed(is_step=False)


def redo_reason(
    clip: ClipPlan, outputs: ClipOutputs, options: Options, made_with: dict[str, Any]
) -> str | None:
    """Why a clip must be made (again), or None when it is done."""
    made = options.makers.identities(clip) if options.makers is not None else {}
    is_screened = options.guardrails is not None
    try:
        inputs = hashes(clip)
    except MediaError as error:  # making it says the same, and costs this clip alone
        return f"an input cannot be read: {error}"
    return outputs.redo_reason(
        clip.spec.hash(), is_screened=is_screened, made=made or None, inputs=inputs, **made_with
    )


def own_prompts(clip: ClipPlan) -> dict[str, str]:
    """What the request itself says: the published negative prompt is longer than a small encoder reads, for everybody."""
    return {key: text for key, text in clip.prompts.items() if text != NEGATIVE_PROMPT}


def hashes(clip: ClipPlan) -> dict[str, str]:
    """SHA-256 of every file the request names, by its key. Raises MediaError for one that cannot be read."""
    found = {}
    for key, path in clip.inputs.items():
        info = stat_regular(path)
        found[key] = _sha256(path, info.st_size, info.st_mtime_ns)
    return found


@functools.lru_cache(maxsize=4096)  # many clips may share a file, and resuming asks twice
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise MediaError(f"{path}: must be readable, got: {error.strerror}.") from None


def waiting(clips: Sequence[ClipPlan], folder: OutputFolder, options: Options) -> list[ClipPlan]:
    """Those of `clips` that a batch will make: all, or when it is resumed those that are not done."""
    if not options.resume:
        return list(clips)
    made = {model: options.made_with(model) for model in dict.fromkeys(clip.model for clip in clips)}
    return [c for c in clips if redo_reason(c, folder.clip(c.name), options, made[c.model]) is not None]


def prepare(
    batch: BatchPlan, folder: OutputFolder, options: Options, stop: StopFlag, on_made: OnMade | None,
    team: Solo = ALONE,
) -> dict[str, ClipPlan | Exception]:  # fmt: skip
    """Plans with files for every control, or why there is none, by clip; only of clips that will be made.

    Of several groups each makes the files of its share of the clips, and finds those of the others in the cache.
    """

    def on_frame(clip: str, what: str, done: int, total: int) -> None:
        stop.check()
        if on_made is not None:
            on_made(clip, what, done, total)

    makers = options.makers
    if makers is None:
        return {}
    clips = [clip for clip in batch.clips if makers.needs(clip)]
    for model in dict.fromkeys(clip.model for clip in clips):
        options.made_with(model)  # finds the weights: what is missing shows before controls are made
    clips = waiting(clips, folder, options)
    clips = [clip for clip in clips if blocked(options.guardrails, batch, clip) is None]
    if team.layout.groups > 1:
        makers.prepare(team.split(clips), on_frame)
        team.meet("controls", stop.check)
    return makers.prepare(clips, on_frame)


def blocked(guardrails: Guardrails | None, batch: BatchPlan, clip: ClipPlan) -> Exception | None:
    """Why the clip's prompts may not be used. All prompts of the batch are read at the first clip that is made,
    before a model is loaded; raises what keeps the judges from being made."""
    if guardrails is None:
        return None
    guardrails.read(prompt for other in batch.clips for prompt in other.prompts.values())
    try:
        guardrails.admit(clip.prompts)
    except ClipError as error:
        return error
    return None


def describe(error: BaseException) -> str:
    """One line for a person: what happened, for memory what to change, for the unexpected where."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of GPU memory. Try a lower resolution; `cosmos-fast plan` tells what fits."
    text = str(error).strip() or type(error).__name__
    if isinstance(error, CosmosFastError):
        return text
    places = traceback.extract_tb(error.__traceback__)
    where = f" (at {Path(places[-1].filename).name}:{places[-1].lineno})" if places else ""
    return f"{type(error).__name__}: {text}{where}"


def is_disk_trouble(error: BaseException) -> bool:
    return isinstance(error, OSError) or isinstance(error.__cause__, OSError)


def make_clip(
    engine: Engine,
    clip: ClipPlan,
    outputs: ClipOutputs,
    claim: Claim,
    options: Options,
    stop: StopFlag,
    progress: Progress | None,
    team: Solo = ALONE,
) -> dict[str, Any]:
    """Make one clip and put it in its place; returns its sidecar."""
    outputs.remove_parts()

    def on_step(step: Step) -> None:
        stop.check()
        writer.check()
        team.step()
        if progress is not None:
            progress(step)

    def write(piece: Piece) -> None:
        """What is done with a piece in a thread of its own, while the device makes the next."""
        with engine.stages.beside("write"):
            if isinstance(piece, Opening):
                seeds.append(piece.seed)
                media.open(piece)
                return
            pictures = media.pictures(piece)
            checks.update(pictures.result, pictures.source)
        if watch is not None:
            with engine.stages.beside("guardrails"):
                pictures.shown = watch.screen(pictures.shown)
        with engine.stages.beside("write"):
            media.write(pictures)

    seams = list(np.cumsum([chunk.keep for chunk in clip.chunks])[:-1])
    checks = FrameChecks(clip.spec.name, clip.frames, clip.output_size, seams=[int(s) for s in seams])
    seeds: list[int] = []
    inputs = hashes(clip)  # now: what changes while frames are read is noticed by who reads them
    watch = engine.watch(clip)
    with Media(clip, outputs, options.codec) as media, Worker(write, MOST_WAITING, "writer") as writer:
        with team.making(clip, lambda reason: outputs.fail(reason, spec_hash=clip.spec.hash())):
            for piece in team.parts(engine.pieces(clip, on_step)):
                with engine.stages.waiting("write"):
                    writer.put(piece)
        with engine.stages.waiting("write"):
            writer.finish()
            figures = checks.finish()
            guardrail = record_off(engine.unguarded or "") if watch is None else watch.finish()
            files = media.close()
    return outputs.finish(
        build_sidecar(
            name=clip.spec.name, spec=clip.spec.resolved(), spec_hash=clip.spec.hash(), inputs=inputs,
            recipe=engine.recipe, plan=engine.plan_record, model=engine.model, checkpoint=engine.files,
            text=describe_encoder(engine.text), made=clip.made, weights_sha256=engine.weights_sha256(), kernels=dispatch.used(), seeds=seeds, chunks=clip.chunks, stages=engine.stages.record(),
            output={
                "frames": clip.frames, "width": media.size[0], "height": media.size[1], "fps": str(clip.fps),
            },
            checks=figures, notes=[*clip.notes, *engine.notes, *engine.mesh.notes, *engine.clip_notes, *checks.notes], guardrail=guardrail,
        ),
        files=files, claim=claim,
    )  # fmt: skip
