"""Check a whole batch before anything is loaded, and say what it will make and cost.

`preflight` probes every file of every clip and collects every fault into one SpecError. It needs no GPU and
no weights. What it accepts, the engine can run as planned: sizes, chunks, network and steps are decided here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from . import costs
from .chunking import chunk_plan, read_label_mask
from .clip_plan import BatchPlan, ClipPlan
from .config import NetworkConfig
from .control_spec import Control
from .formats import (
    CHUNK_FRAMES,
    CONTROLS,
    DISTILLED,
    MODELS,
    CosmosFastError,
    MediaError,
    SpecError,
    model_size,
)
from .outputs import name_problems
from .recipe import Plan, Recipe
from .spec import Spec
from .video import Probe, probe
from .video_sniff import stat_regular

MAKERS = ("edge", "vis", "depth", "seg", "mask", "style")
"""What can be computed here from the input: controls by name, "mask" from a mask_prompt, "style" images."""

UNGUIDED = {"guidance", "negative_prompt"}
"""Keys of a request that the few-step model does not read."""


def model_for(spec: Spec, model: str = "auto") -> str:
    """The network for one clip: the single-control one for one control, "multi" for more.

    `model` other than "auto" is taken if it can do what the spec asks; SpecError says what it cannot.
    """
    if model != "auto" and model not in MODELS:
        raise SpecError(f"model: must be auto or one of {', '.join(MODELS)}, got {model!r}.")
    given = tuple(spec.controls)
    chosen = (given[0] if len(given) == 1 else "multi") if model == "auto" else model
    takes = ("edge",) if chosen == DISTILLED else CONTROLS if chosen == "multi" else (chosen,)
    if not set(given) <= set(takes):
        raise SpecError(
            f"model: {chosen} takes the {takes[0]} control alone, got {', '.join(given)}. "
            "Use model auto, or remove the other controls."
        )
    return chosen


def config_for(model: str) -> NetworkConfig:
    """Published sizes of a network of MODELS."""
    if model == "multi":
        return NetworkConfig.multi()
    return NetworkConfig.distilled() if model == DISTILLED else NetworkConfig.single()


@dataclass
class Files:
    """Each file is probed once, however many clips share it, and again when its size or time of change is another."""

    on_corrupt: Literal["fail", "warn"] = "fail"
    seen: dict[Path, tuple[tuple[int, int], Probe | str]] = field(default_factory=dict)

    def probe(self, path: Path) -> Probe | str:
        """The probe, or why there is none."""
        try:
            info = stat_regular(path)
        except MediaError as error:
            return str(error)
        state = info.st_size, info.st_mtime_ns
        if path not in self.seen or self.seen[path][0] != state:
            found: Probe | str
            try:
                found = probe(path, self.on_corrupt)
            except (CosmosFastError, OSError) as error:
                found = str(error)
            self.seen[path] = state, found
        return self.seen[path][1]


class _Check:
    """Every rule of one clip; problems and notes pile up in the order of the spec's keys."""

    def __init__(self, spec: Spec, files: Files, makers: Collection[str]) -> None:
        self.spec, self.files, self.makers = spec, files, makers
        self.problems: list[str] = []
        self.notes: list[str] = list(spec.notes)

    def file(self, key: str, path: Path) -> Probe | None:
        found = self.files.probe(path)
        if isinstance(found, str):
            self.problems.append(f"{key}: {found}")
            return None
        self.notes += [f"{key}: {note}" for note in found.notes]
        if found.corrupt:
            self.notes.append(f"{key}: {found.corrupt} damaged or missing frames are tolerated.")
        return found

    def fits(self, key: str, size: tuple[int, int], frames: int, source: Probe, needed: int) -> None:
        """A control or mask must work at the input's model size and last as long as the input."""
        resolution = self.spec.resolution
        here, there = model_size(*size, resolution), model_size(*source.size, resolution)
        if here != there:
            self.problems.append(
                f"{key}: must have the aspect of the input, got {size[0]}x{size[1]} (works at "
                f"{here[0]}x{here[1]}) for an input of {source.width}x{source.height} (works at "
                f"{there[0]}x{there[1]}). Resize or crop one of them."
            )
        elif size != source.size:
            self.notes.append(f"{key}: {size[0]}x{size[1]} is resized to {here[0]}x{here[1]} like the input.")
        if frames < needed:
            self.problems.append(
                f"{key}: must be at least as long as the input, got {frames} frames for {needed}. "
                f"Make it longer or set max_frames to {frames}."
            )
        elif frames > needed:
            self.notes.append(f"{key}: only the first {needed} of {frames} frames are used.")

    def companion(self, key: str, path: Path, source: Probe, needed: int) -> Probe | None:
        found = self.file(key, path)
        if found is None:
            return None
        self.fits(key, found.size, found.frames, source, needed)
        is_video = found.kind == source.kind == "video" and needed > 1
        if is_video and abs(found.fps - source.fps) * 1000 > source.fps:
            self.problems.append(
                f"{key}: must have the frame rate of the input, got {found.fps} fps for {source.fps} "
                f"({float(found.fps):.3f} and {float(source.fps):.3f}). Convert one of them."
            )
        return found

    def needs_maker(self, key: str, control: Control) -> None:
        """A control or mask without a file needs something that computes it."""
        if control.control_path is None and key not in self.makers:
            self.problems.append(
                f"{key}: control_path is required, got none. Nothing here computes {key} from the input."
            )
        if control.mask_prompt is not None and control.mask_path is None and "mask" not in self.makers:
            self.problems.append(
                f"{key}.mask_prompt: mask_path is required, got a prompt alone. "
                "Nothing here segments the input by text."
            )

    def guided(self, model: str, source: Probe | None, needed: int) -> tuple[int, int, int] | None:
        path, key = self.spec.guided_generation_mask, "guided_generation_mask"
        if path is None:
            return None
        if model == DISTILLED:
            self.problems.append(
                f"{key}: must not be set for {DISTILLED}, got {path}. That model ignores it."
            )
        if path.suffix.lower() == ".npz":
            try:
                labels = read_label_mask(path, self.spec.guided_generation_foreground_labels)
            except CosmosFastError as error:
                self.problems.append(f"{key}: {error}")
                return None
            count, height, width = labels.shape
            if source is not None:
                self.fits(key, (width, height), count, source, needed)
            return count, width, height
        found = self.companion(key, path, source, needed) if source else self.file(key, path)
        return (found.frames, *found.size) if found else None

    def style(self, model: str, source: Probe | None, has_image: bool) -> Probe | int | None:
        """The style image's probe, or the index of the input frame that serves as one."""
        index, path = self.spec.context_frame_index, self.spec.image_context_path
        if index is None and path is None:
            return None
        key = "image_context_path" if index is None else "context_frame_index"
        value = path if index is None else index
        if model in ("multi", DISTILLED):
            self.problems.append(
                f"{key}: must not be set for the {model} model, got {value}. It takes no style image."
            )
        elif not has_image:
            self.problems.append(
                f"{key}: must not be set for this checkpoint, got {value}. It takes no style image."
            )
        elif "style" not in self.makers:
            self.problems.append(
                f"{key}: must not be set, got {value}. No encoder for style images is available; the one of the "
                "published models needs: pip install 'cosmos-fast[style]'."
            )
        if index is None:
            return self.file(key, path) if path else None
        if source is not None and index >= source.frames:
            self.problems.append(f"{key}: must be below the input's {source.frames} frames, got {index}.")
        return index


def _frames(spec: Spec, source: Probe, check: _Check) -> int:
    """Frames to make, which is also the frames every control and mask must have."""
    frames = min(source.frames, spec.max_frames or source.frames)
    if spec.num_video_frames_per_chunk == 1 and frames > 1:
        check.notes.append(f"num_video_frames_per_chunk: 1 makes one image of the first of {frames} frames.")
        return 1
    if spec.max_frames is not None and spec.max_frames > source.frames:
        check.notes.append(f"max_frames: {spec.max_frames} asked for, the input has {source.frames}.")
    if frames == 1 and spec.num_video_frames_per_chunk > 1:
        length = spec.num_video_frames_per_chunk
        check.notes.append(
            f"num_video_frames_per_chunk: one frame is repeated to {length} and cut again; 1 is far cheaper."
        )
    return frames


def _with_defaults(spec: Spec, defaults: Mapping[str, Any], model: str) -> tuple[Spec, list[str]]:
    """The spec with the model's own values where it names none, and a note about each that differs."""
    unread = UNGUIDED if model == DISTILLED else set()
    changes = {
        key: value
        for key, value in defaults.items()
        if key not in spec.model_fields_set | unread and getattr(spec, key) != value
    }
    notes = [
        f"{key}: {value!r}, which is this model's own, since the request names none."
        for key, value in changes.items()
    ]
    return spec.model_copy(update=changes), notes


def _plan_clip(
    check: _Check, model: str, chunk_lengths: Collection[int], configs: Mapping[str, NetworkConfig],
    recipe: Recipe, plan: Plan, rates: Mapping[str, Any] | None,
) -> ClipPlan | None:  # fmt: skip
    spec = check.spec
    try:
        model = model_for(spec, model)
    except SpecError as error:
        check.problems.append(str(error))
    source = check.file("video_path", spec.video_path)
    length = spec.num_video_frames_per_chunk
    if length not in chunk_lengths:
        check.problems.append(
            "num_video_frames_per_chunk: must be a length the models were trained for "
            f"({', '.join(map(str, chunk_lengths))}), got {length}. Leave it out, or name other weights."
        )
    frames = _frames(spec, source, check) if source else 0
    controls: dict[str, Probe | None] = {}
    masks: dict[str, Probe] = {}
    for key, control in spec.controls.items():
        controls[key] = None
        check.needs_maker(key, control)
        for name, path in (("control_path", control.control_path), ("mask_path", control.mask_path)):
            if path is None:
                continue
            label = f"{key}.{name}"
            found = check.companion(label, path, source, frames) if source else check.file(label, path)
            if name == "control_path":
                controls[key] = found
            elif found is not None:
                masks[key] = found
    config = configs.get(model) or (config_for(model) if model in MODELS else NetworkConfig.single())
    guided = check.guided(model, source, frames)
    style = check.style(model, source, config.image_width is not None)
    if source is not None and spec.keep_input_resolution and min(source.size) < 2:
        check.problems.append(f"video_path: must be at least 2x2 pixels, got {source.width}x{source.height}.")
    if check.problems or source is None:
        return None

    steps = spec.num_steps or (4 if model == DISTILLED else 35)
    chunks = tuple(chunk_plan(frames, length, spec.num_conditional_frames))
    _note_habits(check, model, steps, len(chunks), bool(masks))
    size = model_size(*source.size, spec.resolution)
    passes = 1 if model == DISTILLED or spec.guidance == 0 else 2
    calls = len(chunks) * steps * passes
    count = costs.tokens(length, *size)
    encodes = len(chunks) * (len(controls) + (guided is not None))
    conditions = len(chunks) - 1 if spec.num_conditional_frames else 0
    tflop = {
        "encode": (
            encodes * costs.vae_encode_flop(length, *size) + conditions * costs.vae_encode_flop(1, *size)
        )
        / 1e12,
        "denoise": calls * costs.network_flop(count, config, len(controls)) / 1e12,
        "decode": len(chunks) * costs.vae_decode_flop(length, *size) / 1e12,
    }
    seconds = None if rates is None else sum(tflop[stage] / float(rates[stage]) for stage in tflop)
    output = (source.width // 2 * 2, source.height // 2 * 2) if spec.keep_input_resolution else size
    return ClipPlan(
        name=spec.name, spec=spec, model=model, steps=steps, source=source, controls=controls, masks=masks,
        guided=guided, style=style, frames=frames, fps=source.fps, model_size=size, output_size=output,
        tiles=spec.show_input + spec.show_control_condition * len(controls), chunk_frames=length,
        chunks=chunks, tokens=count, network_calls=calls, tflop=tflop | {"total": sum(tflop.values())},
        memory=costs.memory_bytes(config, recipe, plan, length, *size), seconds=seconds,
        notes=tuple(check.notes),
    )  # fmt: skip


def _note_habits(check: _Check, model: str, steps: int, chunks: int, has_masks: bool) -> None:
    """What runs, but perhaps not as its author expects."""
    spec, notes = check.spec, check.notes
    if model == DISTILLED:
        if steps != 4:
            notes.append(f"num_steps: {DISTILLED} was trained for 4 steps, {steps} asked for.")
        if chunks > 1:
            notes.append(f"frames: {DISTILLED} was trained for one chunk, the input takes {chunks}.")
        for key in sorted(UNGUIDED & spec.model_fields_set):
            notes.append(f"{key}: has no effect, {DISTILLED} runs without guidance.")
    weights = [control.control_weight for control in spec.controls.values()]
    if len(weights) > 1 and sum(weights) > 1:
        how = (
            "capped at a sum of 1 where masks are used" if has_masks else "added as they are, not normalised"
        )
        notes.append(f"control_weight: the weights sum to {sum(weights):g}; they are {how}.")


def preflight(
    specs: Sequence[Spec], model: str = "auto", *, chunk_lengths: Collection[int] = (CHUNK_FRAMES, 1),
    makers: Collection[str] = MAKERS, configs: Mapping[str, NetworkConfig] | None = None,
    recipe: Recipe | None = None, plan: Plan | None = None, on_corrupt: Literal["fail", "warn"] = "fail",
    resolutions: Collection[str] | None = None, defaults: Mapping[str, Any] | None = None,
    rates: Mapping[str, Any] | None = None, strict: bool = True, files: Files | None = None,
) -> BatchPlan:  # fmt: skip
    """Plan every clip; raise one SpecError with every problem of every clip, each led by the clip's name.

    model: "auto" or one of MODELS for all clips. configs: network sizes by model where they are not the
    published ones. makers: what can be computed from the input, see MAKERS. rates: TFLOP/s of this machine
    for "encode", "denoise" and "decode", and their "source". resolutions: the keys the model was trained for,
    None for all. defaults: the model's own values of keys that a spec leaves out. strict=False returns the clips that can run,
    with the problems of the others in `BatchPlan.problems`. files: what was probed for batches before, in place of
    `on_corrupt`.
    """
    if model != "auto" and model not in MODELS:
        raise SpecError(f"model: must be auto or one of {', '.join(MODELS)}, got {model!r}.")
    problems, plans = name_problems([spec.name for spec in specs]), []
    files = files or Files(on_corrupt)
    for spec in specs:
        spec, notes = _with_defaults(spec, defaults or {}, model)
        check = _Check(spec, files, makers)
        check.notes += notes
        if resolutions is not None and spec.resolution not in resolutions:
            check.problems.append(
                f"resolution: must be one the model was trained for ({', '.join(resolutions)}), got "
                f"{spec.resolution}. Leave it out, or name other weights with --checkpoint."
            )
        made = _plan_clip(
            check, model, chunk_lengths, configs or {}, recipe or Recipe(), plan or Plan(), rates
        )
        problems += [f"{spec.name}: {problem}" for problem in check.problems]
        plans += [made] if made else []
    if problems and strict:
        text = problems[0] if len(problems) == 1 else f"{len(problems)} problems:\n  " + "\n  ".join(problems)
        raise SpecError(text, problems)
    source = None if rates is None else str(rates.get("source", "the given rates"))
    return BatchPlan(tuple(plans), tuple(problems), source)
