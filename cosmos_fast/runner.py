"""A batch of clips, made one after another: written, checked, recorded, resumable.

One bad clip costs one clip. A clip counts as done when its media have been reopened and counted, the picture
passed its checks and its sidecar is on disk; until then only part files exist.
"""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from . import controls, dispatch
from .clip_plan import BatchPlan, ClipPlan
from .engine import Engine, Part, Progress, Step
from .formats import ClipError, CosmosFastError, EnvironmentProblem, Refused
from .guardrails import Guardrails, record_off
from .guards import Claim, FrameChecks, StopFlag, Stopped
from .outputs import ClipOutputs, OutputFolder
from .sidecar import build_sidecar
from .text import describe_encoder
from .video import Writer, resize, write_image

MOST_DISK_FAILURES = 3
"""Clips in a row that may fail because the output folder refuses, before the batch stops."""


@dataclass
class Summary:
    """What became of every clip of a batch, by name. elsewhere: another process is making it."""

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """How a batch is written. resume: keep clips that are finished and unchanged.

    made_with: what a kept clip must have been made with besides its spec, by model: its recipe and weight
    files as the sidecar records them. guardrails: what screens the prompts before any model is loaded; pass the
    same to the engines.
    """

    codec: str = "libx264"
    resume: bool = False
    made_with: Callable[[str], dict[str, Any]] = lambda model: {}
    guardrails: Guardrails | None = None


def run_batch(
    batch: BatchPlan,
    open_engine: Callable[[str], Engine],
    folder: OutputFolder,
    *,
    options: Options,
    stop: StopFlag,
    progress: Progress | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Summary:
    """Make every clip of a checked batch, one model after another so that each is loaded once.

    report gets one line per clip. Raises Stopped when asked to stop; everything finished stays finished.
    """
    summary, disk_failures = Summary(), 0
    for model in dict.fromkeys(clip.model for clip in batch.clips):
        waiting = [clip for clip in batch.clips if clip.model == model]
        engine: Engine | None = None
        made_with = options.made_with(model) if options.resume else {}
        for clip in waiting:
            outputs = folder.clip(clip.spec.name)
            stop.check()
            with contextlib.ExitStack() as held:
                claim = Claim.take(outputs.claim_path, folder.locked)
                if claim is None:
                    summary.elsewhere.append(clip.spec.name)
                    report(f"{clip.spec.name}: another process is making it")
                    continue
                held.enter_context(claim)
                # Asked with the claim held: another process may have finished the clip a moment ago.
                is_screened = options.guardrails is not None
                if options.resume and (
                    (reason := outputs.redo_reason(clip.spec.hash(), is_screened=is_screened, **made_with))
                    is None
                ):
                    summary.skipped.append(clip.spec.name)
                    report(f"{clip.spec.name}: already done")
                    continue
                if options.resume and outputs.sidecar.exists():
                    report(f"{clip.spec.name}: made again: {reason}")
                fault = blocked(options.guardrails, batch, clip)
                if fault is None:
                    engine = engine or open_engine(model)
                    try:
                        record = make_clip(engine, clip, outputs, claim, options, stop, progress)
                    except Stopped:
                        outputs.remove_parts()
                        raise
                    except Exception as error:  # whatever it is, the other clips are not to pay for it
                        fault = error
                if fault is not None:
                    message, status = describe(fault), "refused" if isinstance(fault, Refused) else "failed"
                    summary.failed[clip.spec.name] = message
                    report(f"{clip.spec.name}: {status}: {message}")
                    with contextlib.suppress(OSError, EnvironmentProblem):
                        outputs.fail(message, status, spec_hash=clip.spec.hash())
                    disk_failures = disk_failures + 1 if is_disk_trouble(fault) else 0
                    if disk_failures >= MOST_DISK_FAILURES:
                        report(f"stopping: {disk_failures} clips in a row could not be written")
                        return summary
                    continue
                disk_failures = 0
                summary.done.append(clip.spec.name)
                seconds = sum(stage["seconds"] for stage in record["stages"].values())
                report(f"{clip.spec.name}: done in {seconds:.1f} s: {folder.root / record['output']['file']}")
        del engine
        gc.collect()
    return summary


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
) -> dict[str, Any]:
    """Make one clip and put it in its place; returns its sidecar."""
    outputs.remove_parts()

    def on_step(step: Step) -> None:
        stop.check()
        if progress is not None:
            progress(step)

    seams = list(np.cumsum([chunk.keep for chunk in clip.chunks])[:-1])
    checks = FrameChecks(clip.spec.name, clip.frames, clip.output_size, seams=[int(s) for s in seams])
    seeds = []
    watch = engine.watch(clip)
    with Media(clip, outputs, options) as media:
        for part in engine.parts(clip, on_step):
            with engine.stages("write"):
                pictures = media.pictures(part)
                checks.update(pictures.result, pictures.source)
            if watch is not None:
                with engine.stages("guardrails"):
                    pictures.shown = watch.screen(pictures.shown)
            with engine.stages("write"):
                media.write(pictures)
            seeds.append(part.seed)
        figures = checks.finish()
        guardrail = record_off(engine.unguarded or "") if watch is None else watch.finish()
        with engine.stages("write"):
            files = media.close()
    return outputs.finish(
        build_sidecar(
            name=clip.spec.name, spec=clip.spec.resolved(), spec_hash=clip.spec.hash(), recipe=engine.recipe,
            plan=engine.plan, model=engine.model, checkpoint=engine.files,
            text=describe_encoder(engine.text), weights_sha256=engine.weights_sha256(), kernels=dispatch.used(), seeds=seeds, chunks=clip.chunks, stages=engine.stages.record(),
            output={
                "frames": clip.frames, "width": media.size[0], "height": media.size[1], "fps": str(clip.fps),
            },
            checks=figures, notes=[*clip.notes, *engine.notes, *checks.notes], guardrail=guardrail,
        ),
        files=files, claim=claim,
    )  # fmt: skip


@dataclass
class Pictures:
    """One chunk at output size, (F, H, W, 3) uint8: the result alone, the input, what the main file shows, the
    controls. guided: (F, H, W) float at model size, or None."""

    result: np.ndarray
    source: np.ndarray
    shown: np.ndarray
    controls: dict[str, np.ndarray]
    guided: np.ndarray | None


class Media:
    """The files of one clip while they are written: the result, its controls, its guided mask.

    Leaving the `with` block before `close` aborts them all: no file appears under its final name.
    """

    def __init__(self, clip: ClipPlan, outputs: ClipOutputs, options: Options) -> None:
        self.clip, self.outputs, self.options = clip, outputs, options
        self.size = (clip.output_size[0] * (1 + clip.tiles), clip.output_size[1])
        self._open: dict[Path, Writer] = {}
        self._images: dict[Path, np.ndarray] = {}

    def pictures(self, part: Part) -> Pictures:
        """One chunk as it will be written, all at output size."""
        spec = self.clip.spec
        fit = {name: self._fit(self._shown(part, name)) for name in part.controls}
        result, source = self._fit(part.frames), self._fit(part.source)
        panels = [*fit.values()] if spec.show_control_condition else []
        panels += [source] if spec.show_input else []
        return Pictures(result, source, controls.side_by_side([*panels, result]), fit, part.guided)

    def write(self, pictures: Pictures) -> None:
        """Append one chunk to every file."""
        self._append(self.outputs.media(self.clip.frames), pictures.shown)
        for name, frames in pictures.controls.items():
            self._append(self.outputs.control(name, self.clip.frames), frames)
        if pictures.guided is not None:
            grey = (pictures.guided * 255).round().astype(np.uint8)[..., None].repeat(3, axis=3)
            self._append(self.outputs.guided_mask(self.clip.frames), grey)

    @staticmethod
    def _shown(part: Part, name: str) -> np.ndarray:
        control, mask = part.controls[name], part.masks.get(name)
        return control if mask is None else controls.masked_preview(control, mask)

    def _fit(self, frames: np.ndarray) -> np.ndarray:
        return resize(frames, self.clip.output_size, "lanczos")

    def _append(self, path: Path, frames: np.ndarray) -> None:
        if self.clip.frames == 1:
            self._images[path] = frames[0]
            return
        if path not in self._open:
            size = (frames.shape[2], frames.shape[1])
            self._open[path] = Writer(path, size, self.clip.fps, codec=self.options.codec)
        self._open[path].write(frames)

    def close(self) -> list[Path]:
        """Finish, reopen and count every file, the result last; returns those beside it."""
        main = self.outputs.media(self.clip.frames)
        beside = [path for path in (*self._open, *self._images) if path != main]
        for path in (*beside, main):
            if path in self._open:
                self._open[path].close()
            else:
                write_image(path, self._images[path])
        return beside

    def __enter__(self) -> Media:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            for writer in self._open.values():
                writer.abort()
