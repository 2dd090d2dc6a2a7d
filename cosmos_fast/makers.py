"""Controls and masks that are computed from a whole clip, before any network is loaded.

    with Makers(device) as makers:
        made = makers.prepare(batch.clips)      # {name: its plan, now with files for everything, or the error}

Depth is scaled over the whole clip and objects are followed through it, so neither can be made chunk by chunk.
What is made goes, without loss and at working size, into a disk cache under the content of the input, the maker and
its weights, and the words; the plan then points at those files as if the request had named them. A clip made again,
at another seed or strength, finds them there and loads no maker.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np
import torch

from . import controls
from .clip_maker import ClipMaker, ClipTask, MakerOptions, NothingFound
from .clip_plan import ClipPlan
from .disk_cache import CACHE_HOME, DiskCache, content_key
from .formats import CheckpointError, ClipError, CosmosFastError, EnvironmentProblem, MediaError
from .guards import Stopped
from .outputs import sha256
from .video import Probe, Writer, probe, resize

Factory = Callable[[torch.device, MakerOptions], ClipMaker]
OnMade = Callable[[str, str, int, int], None]
"""Called with (clip, what is made: "depth", "edge.mask_prompt", ..., frames done, frames in all)."""

CACHE_FOLDER: Final = CACHE_HOME / "controls"
PROMPT_WORDS: Final = 128
"""Words of the prompt that say what to segment, where the request does not."""

_FPS: Final = 25  # of cached files, which nobody plays: frames are counted, never timed


def _depth(device: torch.device, options: MakerOptions) -> ClipMaker:
    from . import depth

    return depth.open_depth(device, options)


def _seg(device: torch.device, options: MakerOptions) -> ClipMaker:
    from . import segmentation

    return segmentation.open_seg(device, options)


def _mask(device: torch.device, options: MakerOptions) -> ClipMaker:
    from . import segmentation

    return segmentation.open_mask(device, options)


CLIP_MAKERS: Final[Mapping[str, Factory]] = MappingProxyType({"depth": _depth, "seg": _seg, "mask": _mask})
"""What makes a control, or a mask from words, out of a whole clip."""


@dataclass(frozen=True)
class Need:
    """One thing a clip lacks. maker: of CLIP_MAKERS. control: the control it is for."""

    maker: str
    control: str
    task: ClipTask

    @property
    def label(self) -> str:
        """Its key in the request."""
        return f"{self.control}.mask_prompt" if self.maker == "mask" else self.control

    @property
    def filter(self) -> str:
        return controls.MASK_FILTER if self.maker == "mask" else controls.CONTROL_FILTER[self.control]


def _needs(clip: ClipPlan) -> list[Need]:
    """What has to be made of the whole clip: controls without a file, masks that are words alone."""
    found = []
    for name, control in clip.spec.controls.items():
        if clip.controls[name] is None and name in CLIP_MAKERS:
            text = ""
            if name == "seg":
                words = clip.spec.prompt.split()[:PROMPT_WORDS]
                text = getattr(control, "control_prompt", None) or " ".join(words)
            found.append(Need(name, name, ClipTask(clip.source, clip.model_size, text)))
        if name in clip.masks_in_words:
            found.append(
                Need("mask", name, ClipTask(clip.source, clip.model_size, clip.masks_in_words[name]))
            )
    return found


class Makers:
    """Makes what clips lack, and keeps it. Loads one maker at a time and frees it before it returns.

    cache: where results stay, CACHE_FOLDER by default. factories: as CLIP_MAKERS, to replace makers; `without`
    those of these names, for controls that something else makes.
    """

    def __init__(
        self,
        device: torch.device,
        options: MakerOptions | None = None,
        cache: DiskCache | None = None,
        factories: Mapping[str, Factory] = CLIP_MAKERS,
        without: Collection[str] = (),
    ) -> None:
        self.device, self.options = device, options or MakerOptions()
        self.cache = cache or DiskCache(CACHE_FOLDER)
        self.factories = {name: make for name, make in factories.items() if name not in without}
        self._open: dict[str, ClipMaker] = {}
        self._digests: dict[tuple[Path, int, int], str] = {}
        self._used: set[str] = set()

    def needs(self, clip: ClipPlan) -> list[Need]:
        """What these makers make for a clip; of a complete plan nothing."""
        return [need for need in _needs(clip) if need.maker in self.factories]

    def check(self, clips: Sequence[ClipPlan]) -> None:
        """Raise EnvironmentProblem if a package that these clips need is missing. Reads and downloads nothing."""
        for need in (need for clip in clips for need in self.needs(clip)):
            self._maker(need.maker)

    def identities(self, clip: ClipPlan) -> dict[str, str]:
        """What makes each thing the clip lacks, by its key in the request. May download weights to know."""
        return {need.label: self._maker(need.maker).identity for need in self.needs(clip)}

    def complete(self, clip: ClipPlan, on_made: OnMade | None = None) -> ClipPlan:
        """The plan with a file for everything; raises what stands in the way. A complete plan comes back as it is."""
        if not self.needs(clip):
            return clip
        made = self.prepare([clip], on_made)[clip.name]
        if isinstance(made, Exception):
            raise made
        return made

    def prepare(
        self, clips: Sequence[ClipPlan], on_made: OnMade | None = None
    ) -> dict[str, ClipPlan | Exception]:
        """Every clip's plan with a file for everything, by name, or the error that is its own.

        Missing weights are found or downloaded before anything is made. Raises CheckpointError and
        EnvironmentProblem, which concern every clip, and whatever `on_made` raises as Stopped.
        """
        self.check(clips)
        ready: dict[str, ClipPlan | Exception] = {clip.name: clip for clip in clips}
        work = [(clip, need) for clip in clips for need in self.needs(clip)]
        for name in dict.fromkeys(need.maker for clip, need in work if not self._is_cached(need)):
            self._maker(name).locate()
        try:
            # One maker after the other, so that one at a time is in memory.
            for name in self.factories:
                for clip, need in work:
                    plan = ready[clip.name]
                    if need.maker == name and isinstance(plan, ClipPlan):
                        ready[clip.name] = self._with(plan, need, on_made)
                self._free(name)
        finally:
            self.close()
        return ready

    def close(self) -> None:
        for name in list(self._open):
            self._free(name)

    def __enter__(self) -> Makers:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- one thing ---

    def _with(self, clip: ClipPlan, need: Need, on_made: OnMade | None) -> ClipPlan | Exception:
        """The plan with one need met. Errors of this clip come back; those of the machine are raised."""

        def on_frame(done: int, total: int) -> None:
            if on_made is not None:
                on_made(clip.name, need.label, done, total)

        identity = self._maker(need.maker).identity
        try:
            start = time.perf_counter()
            file = self._cached(need)
            how = f"from the cache {self.cache.folder}"
            if file is None:
                file = self._make(need, on_frame)
                how = f"made in {time.perf_counter() - start:.1f} s"
        except NothingFound as error:
            if need.maker != "mask":
                return ClipError(f"{need.label}: {error}")
            note = f"{need.label}: {error} The control applies everywhere."
            return replace(clip, notes=(*clip.notes, note), made={**clip.made, need.label: identity})
        except (Stopped, EnvironmentProblem, CheckpointError):
            raise
        except Exception as error:  # whatever it is, the other clips are not to pay for it
            if isinstance(error, CosmosFastError):
                return type(error)(f"{need.label}: {error}")
            return error
        note = f"{need.label}: {how}"
        plan = replace(clip, notes=(*clip.notes, note), made={**clip.made, need.label: identity})
        if need.maker == "mask":
            return replace(plan, masks={**plan.masks, need.control: file})
        return replace(plan, controls={**plan.controls, need.control: file})

    def _is_cached(self, need: Need) -> bool:
        key = self._key(need)
        return any(self.cache.get(f"{key}.{kind}") is not None for kind in ("mkv", "txt"))

    def _cached(self, need: Need) -> Probe | None:
        """The file of an earlier run; None if there is none, or none that reads back. Raises NothingFound."""
        key = self._key(need)
        if (said := self.cache.get(f"{key}.txt")) is not None:
            with contextlib.suppress(OSError):
                raise NothingFound(said.read_text(encoding="utf-8"))
        if (path := self.cache.get(f"{key}.mkv")) is None:
            return None
        try:
            return self._checked(path, need)
        except (MediaError, OSError):
            self.cache.discard(f"{key}.mkv")
            return None

    def _make(self, need: Need, on_frame: Callable[[int, int], None]) -> Probe:
        key, maker = self._key(need), self._maker(need.maker)

        def write(path: Path) -> None:
            with Writer(path, need.task.size, _FPS, codec="ffv1") as writer:
                with contextlib.closing(_closable(maker.make(need.task, on_frame))) as parts:
                    for part in parts:
                        writer.write(resize(part, need.task.size, need.filter))
                if writer.frames != need.task.source.frames:
                    raise ClipError(
                        f"{need.maker}: must make {need.task.source.frames} frames, got {writer.frames}."
                    )

        try:
            path = self.cache.put(f"{key}.mkv", write, keep=self._used)
        except NothingFound as error:
            text = str(error)
            self.cache.put(f"{key}.txt", lambda path: _write_text(path, text))
            raise
        self._used.add(path.name)
        return self._checked(path, need)

    def _checked(self, path: Path, need: Need) -> Probe:
        found = probe(path)
        expected = (need.task.source.frames, need.task.size)
        if (found.frames, found.size) != expected:
            raise MediaError(f"{path}: must have {expected}, got {(found.frames, found.size)}.")
        self._used.add(path.name)
        # The cache moves the time of an entry at every use, and never changes its content.
        return replace(found, mtime_ns=0)

    def _key(self, need: Need) -> str:
        source = need.task.source
        state = (source.path, source.file_bytes, source.mtime_ns)
        if state not in self._digests:
            self._digests[state] = sha256(source.path)
        return content_key(
            need.maker, self._maker(need.maker).identity, self._digests[state], source.frames,
            list(need.task.size), need.task.text,
        )  # fmt: skip

    def _maker(self, name: str) -> ClipMaker:
        if name not in self._open:
            self._open[name] = self.factories[name](self.device, self.options)
        return self._open[name]

    def _free(self, name: str) -> None:
        if name in self._open:
            self._open[name].close()


def _closable(windows: Iterator[np.ndarray]) -> Generator[np.ndarray, None, None]:
    """Closing this closes `windows`: after an error its files are not left to the garbage collector."""
    yield from windows


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
