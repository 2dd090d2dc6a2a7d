"""Shared vocabulary: constants of the published system, shape rules, error types, number formats.

Imports nothing but the standard library, so every layer may use it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

CONTROLS: Final = ("edge", "vis", "depth", "seg")
"""Control names in model order: the branch order of the multi-control network."""

DISTILLED: Final = "edge/distilled"
MODELS: Final = (*CONTROLS, "multi", DISTILLED)
"""Networks a clip can run on: one per control, the four-branch one, and the few-step edge one."""

CHUNK_FRAMES: Final = 93
"""Video frames in one generated chunk (24 latent frames)."""

LATENT_CHANNELS: Final = 16
SPATIAL: Final = 8
"""Pixels per latent element along height and width."""

TEMPORAL: Final = 4
"""Video frames per latent frame, after the first, which stands alone."""

PATCH: Final = 2
"""Latent elements per token along height and width."""

ASPECTS: Final[dict[str, float]] = {"16:9": 16 / 9, "4:3": 4 / 3, "1:1": 1.0, "3:4": 3 / 4, "9:16": 9 / 16}

RESOLUTIONS: Final[dict[str, dict[str, tuple[int, int]]]] = {
    key: dict(zip(ASPECTS, sizes, strict=True))
    for key, sizes in {
        "1080": ((1920, 1056), (1440, 1056), (1024, 1024), (1056, 1440), (1056, 1920)),
        "1024": ((1280, 768), (1280, 1024), (1024, 1024), (1024, 1280), (768, 1280)),
        "720": ((1280, 704), (960, 704), (960, 960), (704, 960), (704, 1280)),
        "720p": ((1280, 720), (960, 720), (960, 960), (720, 960), (720, 1280)),
        "720robocasa": ((1280, 720), (960, 720), (720, 720), (720, 960), (720, 1280)),
        "512": ((640, 384), (640, 512), (512, 512), (512, 640), (384, 640)),
        "480": ((768, 432), (640, 480), (480, 480), (480, 640), (432, 768)),
        "480p": ((832, 480), (640, 480), (640, 640), (480, 640), (480, 832)),
        "256": ((320, 192), (320, 256), (256, 256), (256, 320), (192, 320)),
    }.items()
}
"""Model sizes (width, height) in pixels by resolution key and aspect; all are multiples of 16."""


class CosmosFastError(Exception):
    """Base of every error this package raises on purpose."""


class SpecError(CosmosFastError, ValueError):
    """A request that cannot be made as written. `problems` lists every fault found, not just the first."""

    def __init__(self, message: str, problems: list[str] | None = None) -> None:
        super().__init__(message)
        self.problems = problems or [message]


class MediaError(CosmosFastError, ValueError):
    """A video, image or mask file that cannot be used."""


class CheckpointError(CosmosFastError):
    """Weights that are missing, damaged, or of another model."""


class EnvironmentProblem(CosmosFastError):
    """Something about this machine must change first: device, package, disk, permission, licence."""


class ClipError(CosmosFastError):
    """One clip failed while running; the rest of the batch is not affected."""


class Refused(ClipError):
    """Guardrails blocked the prompt or the picture of one clip."""


class GivenUp(ClipError):
    """A rank on which this one depends gave the clip up, or is gone. Why is for that rank to tell."""


TOLD_CHARACTERS: Final = 8000
"""Of an error's text, what other ranks are told."""


def told_by(rank: int, error: BaseException) -> CosmosFastError:
    """What the other ranks raise for an error of one: of the nearest class above, or ClipError that names rank and class."""
    kind = next((kind for kind in type(error).__mro__ if kind.__module__ == __name__), None)
    text = str(error) if kind is not None else f"rank {rank}: {type(error).__name__}: {error}"
    return (kind or ClipError)(text[:TOLD_CHARACTERS])


def latent_frames(frames: int) -> int:
    """Latent frames of `frames` video frames; `frames` must be 4k+1."""
    if frames < 1 or frames % TEMPORAL != 1:
        raise ValueError(f"latent_frames: frames must be 4k+1, got {frames}. Pad the clip first.")
    return 1 + (frames - 1) // TEMPORAL


def cuts(heads: int, parts: int) -> list[slice]:
    """`heads` heads in at most `parts` runs of nearly equal length, none empty."""
    parts = min(parts, heads)
    ends = [heads * (i + 1) // parts for i in range(parts)]
    return [slice(start, stop) for start, stop in zip([0, *ends], ends)]


def aspect_of(width: int, height: int) -> str:
    """Name of the table aspect nearest to width/height (squared distance; ties take the first)."""
    if width < 1 or height < 1:
        raise ValueError(f"aspect_of: sizes must be positive, got {width}x{height}.")
    ratio = width / height
    return min(ASPECTS, key=lambda name: (ratio - ASPECTS[name]) ** 2)


def model_size(width: int, height: int, resolution: str) -> tuple[int, int]:
    """Working size (width, height) in pixels for a source of width x height at a resolution key."""
    if resolution not in RESOLUTIONS:
        raise SpecError(f"resolution: must be one of {', '.join(RESOLUTIONS)}, got {resolution!r}.")
    return RESOLUTIONS[resolution][aspect_of(width, height)]


@dataclass(frozen=True)
class Rows:
    """How a token finds its modulation row: `(token_offset + row) // tokens_per_frame`."""

    tokens_per_frame: int
    token_offset: int = 0
