"""What to make: one request per clip, checked in full before anything is loaded.

A spec file is JSON (comments and trailing commas allowed) with the keys of `Spec`; a .jsonl file holds one
such object per line. Paths in a file are relative to its folder; the working directory is never changed.
Every fault of every file is collected, with file, line and key, into one SpecError.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    WithJsonSchema,
)

from . import jsonc, rules
from .control_spec import MODELS, Control, DepthControl, EdgeControl, MediaFile, SegControl, Text, VisControl
from .formats import CHUNK_FRAMES, CONTROLS, RESOLUTIONS, SpecError

NEGATIVE_PROMPT: Final = (
    "The video captures a game playing, with bad crappy graphics and cartoonish frames. It represents a "
    "recording of old outdated games. The lighting looks very fake. The textures are very raw and basic. "
    "The geometries are very primitive. The images are very pixelated and of poor CG quality. There are many "
    "subtitles in the footage. Overall, the video is unrealistic at all."
)
"""The published default, used for the unconditional branch."""

CONTROL_PROMPT_WORDS: Final = 128

Problem = tuple[jsonc.KeyPath, str]
"""Key path and the sentence about it."""

_NUMBER = BeforeValidator(rules.number)
Integer = Annotated[int, _NUMBER]
_Labels = Annotated[tuple[Integer, ...], Field(min_length=1, max_length=65536)]
_MAX_FAULTS: Final = 100
_PATH_ENDINGS: Final = ("_path", "_mask", "_dir")
_RESOLUTION_SCHEMA = {"enum": [*RESOLUTIONS, *(int(key) for key in RESOLUTIONS if key.isdigit())]}
_SIGMA_SCHEMA = {"type": ["string", "number", "null"], "minimum": 0, "maximum": 200}


class _Faults(SpecError):
    """SpecError of one object; `found` keeps the key path of each problem."""

    def __init__(self, found: list[Problem]) -> None:
        self.found = found
        problems = [text for _, text in found]
        super().__init__(_summary(problems), problems)


def _summary(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"spec: {len(problems)} problems:\n" + "\n".join(f"  {problem}" for problem in problems)


class Spec(BaseModel):
    """One clip to make. Frozen; built only when every rule holds, else SpecError names all that do not.

    `Spec(video_path=..., prompt=..., edge={})` takes paths relative to the current folder.
    After construction `prompt` always holds the text, also when it came from `prompt_path`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    _source: Path | None = PrivateAttr(None)

    name: Annotated[str, AfterValidator(rules.name)] = Field(
        description="Stem of the output files; taken from the spec file's name when absent."
    )
    prompt: Text = Field(description="What the result should show; required unless prompt_path is given.")
    prompt_path: Annotated[Path, BeforeValidator(rules.prompt_file)] | None = Field(
        None, description='Text file with the prompt, or .json with a string or {"prompt": "..."}.'
    )
    negative_prompt: Text = Field(
        NEGATIVE_PROMPT, description="What guidance leads away from; ignored by distilled models."
    )
    seed: Integer = Field(2025, ge=-(2**63), lt=2**63, description="Start of the chain of chunk seeds.")
    guidance: Integer = Field(
        3,
        ge=0,
        le=7,
        description="Whole guidance scale g in cond + g * (cond - uncond); ignored when distilled.",
    )
    video_path: MediaFile = Field(description="Input video or image: sets size, frame rate and frame count.")
    max_frames: Annotated[int, Field(ge=1, lt=2**31), _NUMBER] | None = Field(
        None, description="Use only the first so many frames of the input; null uses all."
    )
    context_frame_index: Annotated[int, Field(ge=0, lt=2**31), _NUMBER] | None = Field(
        None, description="Input frame used as style image; goes before image_context_path."
    )
    image_context_path: MediaFile | None = Field(
        None, description="Style image, or a video whose first frame is used; not together with vis."
    )
    num_conditional_frames: Annotated[Literal[0, 1, 2], BeforeValidator(rules.whole)] = Field(
        1, description="Frames that each later chunk shares with the one before."
    )
    resolution: Annotated[str, BeforeValidator(rules.resolution), WithJsonSchema(_RESOLUTION_SCHEMA)] = Field(
        "720", description="Row of the size table; the column is the aspect nearest to the input."
    )
    sigma_max: Annotated[str | None, BeforeValidator(rules.sigma_max), WithJsonSchema(_SIGMA_SCHEMA)] = Field(
        None, description="Kept for compatibility, 0 to 200; has no effect on any published model."
    )
    num_video_frames_per_chunk: Annotated[Integer, AfterValidator(rules.chunk_frames)] = Field(
        CHUNK_FRAMES, ge=1, lt=2**31, description="Frames per chunk, 4k+1: 93 for video, 1 for images."
    )
    num_steps: Annotated[int, Field(ge=1, le=250), _NUMBER] | None = Field(
        None, description="Sampling steps; null takes the model's own: 35, or 4 when distilled."
    )
    show_control_condition: bool = Field(False, description="Show the controls to the left of the result.")
    show_input: bool = Field(False, description="Show the input to the left of the result.")
    keep_input_resolution: bool = Field(
        True, description="Resize the result to the size of the input; false keeps the model's size."
    )
    edge: EdgeControl | None = Field(None, description="Edge control.")
    vis: VisControl | None = Field(None, description="Blur control.")
    depth: DepthControl | None = Field(None, description="Depth control.")
    seg: SegControl | None = Field(None, description="Segmentation control.")
    guided_generation_mask: Annotated[Path, BeforeValidator(rules.mask_file)] | None = Field(
        None, description="Video or .npz of labels marking what is held to the input in the early steps."
    )
    guided_generation_step_threshold: Integer = Field(
        25,
        ge=-(2**31),
        lt=2**31,
        description="Last step index, counted from 0, that guided generation acts on.",
    )
    guided_generation_foreground_labels: _Labels | None = Field(
        None, description="Labels of the .npz that are foreground; null takes all but 0."
    )
    output_dir: Annotated[Path, BeforeValidator(rules.folder)] | None = Field(
        None, description="Folder for the results when none is given on the command line."
    )

    def __init__(self, /, **fields: Any) -> None:
        found = _cross_problems(fields)
        data = {**fields, "prompt": _prompt(fields, found)}
        try:
            super().__init__(**data)
        except ValidationError as error:
            known: dict[jsonc.KeyPath, list[str]] = {
                (key,): list(MODELS[key].model_fields) for key in CONTROLS
            }
            known[()] = list(Spec.model_fields)
            faults = error.errors(include_url=False)
            found += [rules.explain(fault, known) for fault in faults[:_MAX_FAULTS]]
            if len(faults) > _MAX_FAULTS:
                found.append(((), f"spec: {len(faults) - _MAX_FAULTS} more problems are not listed."))
        if found:
            raise _Faults(found)

    @classmethod
    def load(cls, path: str | os.PathLike[str], /, **overrides: Any) -> Spec:
        """The one spec in a file. Overrides are as in `load_specs`."""
        specs = load_specs([path], overrides)
        if len(specs) != 1:
            raise SpecError(f"spec: file must hold one request, got {len(specs)} in {path}. Use load_specs.")
        return specs[0]

    @property
    def controls(self) -> dict[str, Control]:
        """The controls that are set, in model order."""
        return {name: control for name in CONTROLS if (control := getattr(self, name)) is not None}

    @property
    def source(self) -> Path | None:
        """The file this spec was read from."""
        return self._source

    @property
    def segmentation_prompt(self) -> str | None:
        """Text for the on-the-fly segmentation control; None when seg is absent."""
        if self.seg is None:
            return None
        words = self.prompt.split()[:CONTROL_PROMPT_WORDS]
        return " ".join(words) if self.seg.control_prompt is None else self.seg.control_prompt

    @property
    def notes(self) -> tuple[str, ...]:
        """What was asked for and has no effect, one sentence each."""
        notes = []
        if self.sigma_max is not None:
            notes.append("sigma_max: has no effect on any published model.")
        if self.context_frame_index is not None and self.image_context_path is not None:
            notes.append("image_context_path: not used, context_frame_index goes before it.")
        if len(self.controls) > 1 and (
            self.context_frame_index is not None or self.image_context_path is not None
        ):
            notes.append("style image: not used, only single-control models take one.")
        for key, control in self.controls.items():
            if control.mask_path is not None and control.mask_prompt is not None:
                notes.append(f"{key}.mask_prompt: not used, mask_path goes before it.")
            if control.control_path is not None:
                recipe = {"preset_edge_threshold", "preset_blur_strength", "control_prompt"}
                for field in sorted(control.model_fields_set & recipe):
                    notes.append(f"{key}.{field}: not used, control_path goes before it.")
        return tuple(notes)

    def resolved(self) -> dict[str, Any]:
        """JSON-ready fields, defaults filled, paths absolute; `Spec(**spec.resolved())` is the same request.

        The prompt stands as text, so `prompt_path` is left out, as are absent controls.
        """
        fields = self.model_dump(mode="json", exclude={"prompt_path"})
        return {key: value for key, value in fields.items() if value is not None or key not in CONTROLS}

    def hash(self) -> str:
        """SHA-256 of everything in the spec that affects the picture; files count by path, not by content.

        Left out: name, output_dir, where the prompt came from, and sigma_max. A `num_steps` of null and the
        model's own number written out are different requests.
        """
        fields = self.resolved()
        for key in ("name", "output_dir", "sigma_max"):
            del fields[key]
        text = json.dumps(
            ["cosmos-fast spec 1", fields], sort_keys=True, separators=(",", ":"), allow_nan=False
        )
        return hashlib.sha256(text.encode()).hexdigest()


def _cross_problems(fields: Mapping[str, Any]) -> list[Problem]:
    """Rules between keys, judged on what was written, so they are reported beside faults of single keys."""
    found: list[Problem] = []
    given = {key for key, value in fields.items() if value is not None}
    if not given.intersection(CONTROLS):
        rule = f"spec: at least one control of {', '.join(CONTROLS)} is required, got none."
        found.append(((), f'{rule} An empty object such as "edge": {{}} computes it from the video.'))
    for key in ("image_context_path", "context_frame_index"):
        if "vis" in given and key in given:
            found.append(((key,), f"{key}: must not be set together with vis, got both. Remove one of them."))
    labels, mask = "guided_generation_foreground_labels", fields.get("guided_generation_mask")
    if labels in given and not str(mask).lower().endswith(".npz"):
        found.append(((labels,), rules.sentence(f"{labels}: needs an .npz guided_generation_mask", mask)))
    return found


def _prompt(fields: Mapping[str, Any], found: list[Problem]) -> Any:
    """The prompt, read from prompt_path if that is what is given; problems are added to `found`."""
    prompt, path = fields.get("prompt"), fields.get("prompt_path")
    if prompt is not None:
        if path is not None:
            found.append(
                (("prompt",), "prompt: must not be set together with prompt_path, got both. Remove one.")
            )
        return prompt
    if path is None:
        found.append((("prompt",), "prompt: prompt or prompt_path is required, got neither."))
        return ""
    try:
        file = rules.prompt_file(path)
    except rules.Rule:  # the field's own check reports it
        return ""
    try:
        return rules.read_prompt(file)
    except rules.Rule as rule:
        found.append((("prompt_path",), rules.sentence(f"prompt_path: {rule.rule}", path, rule.hint)))
        return ""


def control_union(specs: Iterable[Spec]) -> tuple[str, ...]:
    """Controls that any of the specs uses, in model order: they decide which network a batch needs."""
    used = {name for spec in specs for name in spec.controls}
    return tuple(name for name in CONTROLS if name in used)


def json_schema() -> dict[str, Any]:
    """JSON Schema (Draft 2020-12) of a spec file, with a description on every key."""
    schema = Spec.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "cosmos-fast spec"
    schema["description"] = "One clip to make; paths are relative to the folder of this file."
    schema["required"] = ["video_path"]
    schema["allOf"] = [
        {"anyOf": [{"required": [key]} for key in ("prompt", "prompt_path")]},
        {"anyOf": [{"required": [key], "properties": {key: {"type": "object"}}} for key in CONTROLS]},
    ]
    properties = schema["properties"]
    properties["name"]["pattern"] = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
    for key in ("name", "prompt"):
        properties[key] = {
            "anyOf": [properties[key], {"type": "null"}],
            "description": properties[key]["description"],
        }
    return schema


def load_specs(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    overrides: Mapping[str, Any] | None = None,
    cwd: str | os.PathLike[str] | None = None,
) -> list[Spec]:
    """Every spec of the files and folders in `paths`; raises one SpecError with every problem of all of them.

    `overrides` replace keys in every spec: any key but name and the controls themselves, and keys inside a
    control with a dot (`{"edge.control_weight": 0.5}`, which adds the control where it is absent). None means
    no override. Paths in `paths` and `overrides` are relative to `cwd` (default: the current folder).
    """
    specs, problems = load_valid_specs(paths, overrides, cwd)
    if problems:
        raise SpecError(_summary(problems), problems)
    return specs


def load_valid_specs(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    overrides: Mapping[str, Any] | None = None,
    cwd: str | os.PathLike[str] | None = None,
) -> tuple[list[Spec], list[str]]:
    """(specs that are valid, every problem). Of specs with equal names the first counts as valid.

    A fault in `overrides` leaves no spec valid: they would not be what was asked for.
    """
    base = os.path.realpath(os.getcwd() if cwd is None else cwd)
    changes, problems = _overrides(overrides or {}, base)
    is_sound = not problems
    files = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not files:
        problems.append("spec: at least one spec file is required, got none.")
    specs: list[Spec] = []
    owners: dict[str, str] = {}
    for file in files:
        for record in jsonc.records(Path(rules.local_path(file, base)), problems):
            try:
                spec = _build(record, changes)
            except _Faults as faults:
                for path, text in sorted(faults.found, key=lambda fault: record.document.where(fault[0])):
                    is_override = ".".join(map(str, path)) in changes or (path and path[0] in changes)
                    problems.append(f"override {text}" if is_override else f"{record.where(path)}: {text}")
                continue
            place = record.where(("name",))
            if clash := next((owners[stem] for stem in _stems(spec) if stem in owners), None):
                rule = "name: outputs must not share a file name in the batch, upper or lower case,"
                problems.append(f"{place}: {rule} got {rules.shown(spec.name)}. See {clash}.")
                continue
            owners.update(dict.fromkeys(_stems(spec), place))
            specs.append(spec)
    return (specs if is_sound else []), list(dict.fromkeys(problems))


def _stems(spec: Spec) -> list[str]:
    """Lower-case stems of the files a spec writes, so that `a_control_edge` cannot meet the edges of `a`."""
    kinds = [f"{kind}_{control}" for control in CONTROLS for kind in ("control", "mask")]
    endings = ["", *(f"_{kind}" for kind in (*kinds, "mask_guided_generation", "side_by_side", "preview"))]
    return [spec.name.lower() + ending for ending in endings]


def _overrides(overrides: Mapping[str, Any], base: str) -> tuple[dict[str, Any], list[str]]:
    """Overrides that are set, with paths made absolute, and what is wrong with their keys."""
    allowed = [key for key in Spec.model_fields if key not in ("name", *CONTROLS)]
    allowed += [f"{control}.{key}" for control in CONTROLS for key in MODELS[control].model_fields]
    given = {key: _rebase(key, value, base) for key, value in overrides.items() if value is not None}
    changes = {key: value for key, value in given.items() if key in allowed}
    unknown = [key for key in given if key not in allowed]
    problems = [f"override: unknown key '{key}'. {rules.did_you_mean(key, allowed)}" for key in unknown]
    if "prompt" in changes and "prompt_path" in changes:
        problems.append("override prompt: must not be set together with prompt_path, got both. Remove one.")
    return changes, problems


def _rebase(key: str, value: Any, base: str) -> Any:
    return rules.local_path(value, base) if key.endswith(_PATH_ENDINGS) and rules.is_path(value) else value


def _build(record: jsonc.Record, changes: Mapping[str, Any]) -> Spec:
    """The spec of one record after overrides."""
    if not isinstance(record.value, dict):
        rule = rules.sentence("spec: must be one object {...}", record.value)
        raise _Faults([((), f"{rule} Several requests go into a .jsonl file, one per line.")])
    base = os.path.dirname(record.file)
    fields = {key: _rebase(key, value, base) for key, value in record.value.items()}
    for control in CONTROLS:
        if isinstance(inner := fields.get(control), dict):
            fields[control] = {key: _rebase(key, value, base) for key, value in inner.items()}
    if fields.get("name") is None:
        fields["name"] = record.name
    for key, other in (("prompt", "prompt_path"), ("prompt_path", "prompt")):
        if key in changes:
            fields.pop(other, None)
    for key, value in changes.items():
        control, dot, inner_key = key.partition(".")
        if not dot:
            fields[key] = value
        elif isinstance(inner := fields.get(control) or {}, dict):
            fields[control] = {**inner, inner_key: value}
    spec = Spec(**fields)
    spec._source = record.file
    return spec
