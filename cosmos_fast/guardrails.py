"""Screens prompts before and frames after generation. What cannot be checked is never taken for safe.

    guardrails = Guardrails.open()                  # packages and weights are there, or an error says what is not
    guardrails.read(prompts)                        # judges all prompts, then frees the judges
    guardrails.admit(clip_prompts)                  # raises Refused for a blocked prompt
    watch = guardrails.watch(frames=186)
    shown = watch.screen(part)                      # part by part; raises Refused when the clip is over the limit
    record = watch.finish()

Verdicts depend on prompts, frames and weights alone. With several processes one of them judges and the others get
its verdict: two that judge for themselves could disagree, and one would then wait for the other for ever.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from . import registry
from .dispatch import pick_device
from .formats import CheckpointError, ClipError, CosmosFastError, EnvironmentProblem, Refused
from .guardrails_faces import FaceFilter
from .guardrails_frames import MAX_SHARE, UNSAFE, ContentFilter, class_name, is_over
from .guardrails_text import WITHOUT, Blocklist, PromptJudge, Verdict, need_packages

OFF_BY_REQUEST = "switched off by the caller"
OFF_FOR_OWN_WEIGHTS = "off by default: these are not the published weights"


class TextCheck(Protocol):
    name: str

    def judge(self, prompt: str) -> Verdict: ...


def screening(
    choice: Guardrails | bool | None, is_published: bool, device: str | None = None
) -> tuple[Guardrails | None, str | None]:
    """(guardrails, or why there are none): the caller's own, else by choice, else on for published weights alone.

    Raises what `Guardrails.open` raises.
    """
    if isinstance(choice, Guardrails):
        return choice, None
    if choice or (choice is None and is_published):
        return Guardrails.open(device=device), None
    return None, OFF_BY_REQUEST if choice is False else OFF_FOR_OWN_WEIGHTS


def record_off(reason: str) -> dict[str, Any]:
    """The sidecar's record of a clip that was not screened."""
    return {"requested": False, "run": False, "reason": reason}


@dataclass(frozen=True)
class _Read:
    """What became of one prompt: the verdicts up to the first that blocks, or the fault that ended the reading."""

    verdicts: tuple[Verdict, ...]
    fault: str | None = None


@dataclass
class Guardrails:
    """All checks of a run. Weights are located by `open`; models are in memory only while they are used.

    folder: word lists, classifier and face detector; prompt_judge and frame_tower: model folders of the transformers
    layout.
    """

    folder: Path
    prompt_judge: Path
    frame_tower: Path
    device: torch.device
    versions: Mapping[str, str]
    _read: dict[str, _Read] = field(default_factory=dict)
    _filters: tuple[ContentFilter, FaceFilter] | None = None

    @classmethod
    def open(
        cls,
        folder: str | Path = "guardrail",
        *,
        prompt_judge: str | Path = "guardrail-prompts",
        frame_tower: str | Path = "guardrail-frames",
        device: str | None = None,
    ) -> Guardrails:
        """Find packages and weights, downloading published ones. Folders may be local.

        Raises EnvironmentProblem or CheckpointError that name what is missing, the command for it, and the way
        without guardrails.
        """
        versions = need_packages()
        try:
            home = registry.resolve_folder(folder, ())
            judge = registry.resolve_folder(prompt_judge, ("config.json",))
            tower = registry.resolve_folder(frame_tower, ("config.json",))
            made = cls(home, judge, tower, pick_device(device), versions)
            for path in (made.blocklist, made.classifier, made.face_weights):
                if not path.exists():
                    raise CheckpointError(f"{home}: must hold {path.relative_to(home)}, got none.")
        except EnvironmentProblem as error:
            raise EnvironmentProblem(f"guardrails: {error} {WITHOUT}") from None
        except CheckpointError as error:
            raise CheckpointError(f"guardrails: {error} {WITHOUT}") from None
        return made

    @property
    def blocklist(self) -> Path:
        return self.folder / "blocklist"

    @property
    def classifier(self) -> Path:
        return self.folder / "video_content_safety_filter" / "safety_filter.pt"

    @property
    def face_weights(self) -> Path:
        return self.folder / "face_blur_filter" / "Resnet50_Final.pth"

    # --- prompts ---

    def text_checks(self) -> Iterable[TextCheck]:
        """The judges in their order, each made when its turn comes."""
        yield Blocklist(self.blocklist)
        yield PromptJudge(self.prompt_judge, self.device)

    def read(self, prompts: Iterable[str]) -> None:
        """Judge every prompt that is new, once. A judge that fails on one prompt fails that prompt, not the others.

        Raises CheckpointError or EnvironmentProblem when a judge cannot be made.
        """
        waiting: dict[str, tuple[Verdict, ...]] = {p: () for p in prompts if p not in self._read}
        if not waiting:
            return
        self._judge(waiting)
        _free(self.device)  # the judges are gone with the call above

    def _judge(self, waiting: dict[str, tuple[Verdict, ...]]) -> None:
        for check in self.text_checks():
            for prompt in list(waiting):
                try:
                    verdict = check.judge(prompt)
                except Exception as error:  # any fault means "not checked", which is not "safe"
                    fault = (
                        str(error)
                        if isinstance(error, CosmosFastError)
                        else f"{type(error).__name__}: {error}"
                    )
                    self._read[prompt] = _Read(waiting.pop(prompt), f"{check.name}: {fault}")
                    continue
                waiting[prompt] += (verdict,)
                if not verdict.is_safe:
                    self._read[prompt] = _Read(waiting.pop(prompt))
            if not waiting:
                break
        self._read |= {prompt: _Read(verdicts) for prompt, verdicts in waiting.items()}

    def admit(self, prompts: Mapping[str, str]) -> dict[str, Any]:
        """The record of a clip's prompts by spec key. Raises Refused for a blocked one, ClipError for an unread one.

        An empty negative prompt means "none", and there is nothing in it to judge.
        """
        told = {key: prompt for key, prompt in prompts.items() if prompt or key == "prompt"}
        self.read(told.values())
        record = {}
        for key, prompt in told.items():
            read = self._read[prompt]
            if read.fault is not None:
                raise ClipError(f"guardrails: {key} could not be checked, {read.fault}")
            for verdict in read.verdicts:
                if not verdict.is_safe:
                    raise Refused(f"guardrails: {key} is blocked by the {verdict.check}: {verdict.reason}.")
            record[key] = {verdict.check: verdict.detail or "Safe" for verdict in read.verdicts}
        return record

    # --- frames ---

    def watch(self, frames: int, text: Mapping[str, Any] | None = None) -> Watch:
        """A new watch over a clip of `frames` frames; the models are read now, before the clip costs anything.

        text: the record of `admit`, to be part of the clip's record.
        """
        if self._filters is None:
            content = ContentFilter(self.frame_tower, self.classifier, self.device)
            self._filters = content, FaceFilter(self.face_weights, self.device)
        content, faces = self._filters
        base = {"requested": True, "run": True, "reason": None, "text": dict(text or {})}
        weights = {
            "guardrail": str(self.folder), "prompt judge": str(self.prompt_judge),
            "frame tower": str(self.frame_tower),
        }  # fmt: skip
        return Watch(
            frames, content.classify, faces.cover, base, {"versions": dict(self.versions), "weights": weights}
        )

    def close(self) -> None:
        """Free the frame models; a later watch reads them again."""
        self._filters = None
        _free(self.device)


@dataclass
class Watch:
    """Counts unsafe frames of one clip and pixelates its faces. One batch of frames is held, never the clip."""

    frames: int
    classify: Callable[[np.ndarray], list[int]]
    cover: Callable[[np.ndarray], list[int]]
    base: Mapping[str, Any]
    made_with: Mapping[str, Any]
    seen: int = 0
    classes: Counter[str] = field(default_factory=Counter)
    faces: int = 0
    frames_with_faces: int = 0

    def screen(self, frames_FHW3: np.ndarray) -> np.ndarray:
        """A copy of the frames (F, H, W, 3) uint8 with faces pixelated.

        Raises Refused as soon as the frames seen so far are too many for the whole clip: more cannot make it safe.
        """
        found = self.classify(frames_FHW3)
        if len(found) != len(frames_FHW3):
            raise ClipError(f"guardrails: {len(frames_FHW3)} frames must get a class each, got {len(found)}.")
        self.seen += len(found)
        self.classes.update(map(class_name, found))
        if is_over(self.unsafe, self.frames):
            kinds = ", ".join(f"{n} {name}" for name, n in self.classes.items() if name in UNSAFE.values())
            raise Refused(
                f"guardrails: video is blocked by the content filter: at most {MAX_SHARE:.0%} of {self.frames} frames "
                f"may be unsafe, got {self.unsafe} in the first {self.seen} ({kinds})."
            )
        shown = frames_FHW3.copy()
        faces = self.cover(shown)
        self.faces += sum(faces)
        self.frames_with_faces += sum(count > 0 for count in faces)
        return shown

    @property
    def unsafe(self) -> int:
        return sum(self.classes[name] for name in UNSAFE.values())

    def finish(self) -> dict[str, Any]:
        """The sidecar's record of the clip. ClipError unless every frame was seen."""
        if self.seen != self.frames:
            raise ClipError(f"guardrails: all {self.frames} frames must be checked, got {self.seen}.")
        video = {
            "frames": self.seen, "unsafe": self.unsafe, "limit": MAX_SHARE, "classes": dict(self.classes),
            "faces": self.faces, "frames_with_faces": self.frames_with_faces,
        }  # fmt: skip
        return {**self.base, "video": video, **self.made_with}


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
