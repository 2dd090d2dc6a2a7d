"""Find out everything about one media file in one complete decode, and refuse what would go wrong later.

A file that passes has frames of one size, evenly spaced in time, all decodable, of standard dynamic range and
within the limits. Whatever was odd but could be dealt with is a line in `Probe.notes`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from fractions import Fraction
from math import gcd
from pathlib import Path
from typing import Any, Literal

import av

from .formats import MediaError
from .video_decode import (
    Decoder,
    Limits,
    Orientation,
    check_transfer,
    display_size,
    even_size,
    has_alpha,
    is_full_range,
    is_transparent,
    orientation_of,
)
from .video_sniff import IMAGE_FORMATS, image_facts, sniff, stat_regular

_STANDARD_RATES = sorted(
    {Fraction(n) for n in (*range(1, 61), 72, 75, 90, 100, 119, 120, 144, 240)}
    | {Fraction(n * 1000, 1001) for n in (24, 30, 48, 60, 120)}
    | {Fraction(25, 2), Fraction(15, 2)}
)
_TS_PACKET = 188
OnCorrupt = Literal["fail", "warn"]
_DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Probe:
    """What a file holds, from one complete decode.

    width, height: display size in pixels, upright with square pixels. fps: exact; 1 for images.
    notes: everything odd that was found or decided. corrupt: frames damaged, undecodable or missing
    (only with on_corrupt="warn"; else they are an error). mtime_ns: 0 where the time of change says nothing.
    """

    kind: Literal["video", "image"]
    frames: int
    width: int
    height: int
    fps: Fraction
    notes: tuple[str, ...] = ()
    corrupt: int = 0
    path: Path = field(default_factory=Path)
    file_bytes: int = 0
    mtime_ns: int = 0
    demuxer: str = ""
    threaded: bool = True
    orientation: Orientation = Orientation()
    limits: Limits = _DEFAULT_LIMITS

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.width, self.height


def probe(
    path: str | os.PathLike[str], on_corrupt: OnCorrupt = "fail", *, limits: Limits = _DEFAULT_LIMITS
) -> Probe:
    """Decode a video or image once, without keeping pixels, and say what it holds.

    on_corrupt: "fail" raises if any frame is damaged or missing; "warn" counts them in `corrupt`.
    Raises MediaError naming the file, the rule and what was found.
    """
    if on_corrupt not in ("fail", "warn"):
        raise ValueError(f"probe: on_corrupt must be 'fail' or 'warn', got {on_corrupt!r}.")
    path = Path(path)
    info = stat_regular(path)
    demuxer = sniff(path)
    is_image = demuxer in IMAGE_FORMATS
    for threaded in (True, False):
        with Decoder(path, demuxer, limits, threaded) as decoder:  # streams must not be touched after close
            found = _Pass(decoder)
            corrupt = found.check_damage()
            if corrupt and threaded:
                continue  # count again in the way that gives the same answer every time
            if corrupt and on_corrupt == "fail":
                raise MediaError(
                    f"{path}: every frame must decode cleanly, got {found.damage}. "
                    "Use on_corrupt='warn' to go on with the frames that decode."
                )
            if corrupt:
                found.notes.append(f"damaged: {found.damage}")
            fps = Fraction(1) if is_image else found.frame_rate(corrupt)
            break
    return Probe(
        kind="image" if is_image else "video",
        frames=1 if is_image else found.frames,
        width=found.size[0],
        height=found.size[1],
        fps=fps,
        notes=tuple(found.notes),
        corrupt=corrupt,
        path=path,
        file_bytes=info.st_size,
        mtime_ns=info.st_mtime_ns,
        demuxer=demuxer,
        threaded=threaded,
        orientation=found.orientation,
        limits=limits,
    )


class _Pass:
    """Everything one decode pass finds out about a file."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.path = decoder.path
        self.stream = decoder.stream
        self.is_image = decoder.demuxer in IMAGE_FORMATS
        self.notes: list[str] = []
        self.damage = ""
        self.frames = self.flagged = self.interlaced = 0
        self.times: list[int | None] = []
        check_transfer(self.path, int(self.stream.codec_context.color_trc or 0))
        self._note_streams()
        for frame in decoder:
            if self.frames == 0:
                self._first(frame)
            self._next(frame)
            if self.is_image and self.frames == 2:
                self.frames = 1
                self.notes.append("animated image: only its first frame is used")
                break
        self.promised = self._promise()
        if self.interlaced:
            self.notes.append(f"{self.interlaced} interlaced frames: decoded as they are, not deinterlaced")

    def _promise(self) -> int | None:
        """Frames the file itself says it has, if it says so."""
        stream = self.stream
        if self.is_image:
            return None
        entries = stream.index_entries
        if self.decoder.demuxer == "mov" and stream.frames:
            # An edit list may drop samples: those stay in the index, marked.
            kept = sum(not entries[i].is_discard for i in range(len(entries)))
            return kept or stream.frames
        if stream.frames:
            return stream.frames
        if self.decoder.demuxer == "matroska":
            return self._promise_by_duration()
        return None

    def _promise_by_duration(self) -> int | None:
        """Matroska states when the stream ends, not how many frames it has; call after the pass."""
        stream, container = self.stream, self.decoder.container
        rate, tick = _fraction(stream.average_rate), _fraction(stream.time_base)
        times = [time for time in self.times if time is not None]
        end = _clock(stream.metadata.get("DURATION", ""))
        if end is None and len(container.streams.get()) == 1 and container.duration:
            end = Fraction(container.duration, 1_000_000)
        if end is None or not rate or not tick or not times:
            return None
        return self.frames + max(0, round((end - max(times) * tick) * rate) - 1)

    def _note_streams(self) -> None:
        decoder = self.decoder
        if len(decoder.videos) > 1:
            self.notes.append(f"{len(decoder.videos)} video streams: the first is used")
        if decoder.pictures:
            self.notes.append("attached cover art is skipped")
        if decoder.container.streams.audio:
            self.notes.append("audio is not kept")

    def _first(self, frame: av.VideoFrame) -> None:
        self.coded = (frame.width, frame.height)
        self.orientation = orientation_of(self.path, frame)
        if self.decoder.demuxer == "jpeg_pipe":
            facts = image_facts(self.path, self.decoder.demuxer)
            self.orientation = Orientation.from_exif(facts.orientation)
            self.flagged += not facts.complete
        sar = self.stream.sample_aspect_ratio or self.stream.codec_context.sample_aspect_ratio
        sar = Fraction(sar.numerator, sar.denominator) if sar else Fraction(1)
        self.size = display_size(frame.width, frame.height, sar if sar > 0 else Fraction(1), self.orientation)
        check_transfer(self.path, int(frame.color_trc))
        if self.orientation:
            self.notes.append(f"display matrix applied: frames are {self.orientation}")
        if sar not in (0, 1):
            shown = f"{self.size[0]}x{self.size[1]}"
            self.notes.append(f"pixel aspect {sar.numerator}:{sar.denominator} applied: shown as {shown}")
        depth = max(part.bits for part in frame.format.components)
        if depth > 8 and frame.format.name != "pal8":
            self.notes.append(f"{depth}-bit pixels are reduced to 8 bits")
        if is_transparent(frame) if self.is_image else has_alpha(frame):
            self.notes.append(f"transparency is laid over {'white' if self.is_image else 'black'}")
        if not frame.format.is_rgb and frame.format.name != "pal8" and not self.is_image:
            if frame.colorspace == 2 and frame.height >= 720 and len(frame.format.components) > 2:
                self.notes.append("no colour matrix tag: read as BT.601, as the published system does")
            if frame.colorspace in (9, 10):
                self.notes.append("BT.2020 colours: converted by matrix only, primaries kept")
            if is_full_range(frame):
                self.notes.append("full-range pixels")
        if not self.is_image and even_size(self.size) != self.size:
            even = even_size(self.size)
            self.notes.append(
                f"odd size {self.size[0]}x{self.size[1]}: results are written at {even[0]}x{even[1]}"
            )

    def _next(self, frame: av.VideoFrame) -> None:
        if (frame.width, frame.height) != self.coded:
            raise MediaError(
                f"{self.path}: all frames must have one size, got {self.coded[0]}x{self.coded[1]} and "
                f"{frame.width}x{frame.height} from frame {self.frames}. Re-encode it at one size."
            )
        self.frames += 1
        self.flagged += bool(frame.is_corrupt)
        self.interlaced += bool(frame.interlaced_frame)
        self.times.append(frame.pts)
        self.decoder.limits.check(self.path, *self.coded, self.frames)
        if self.frames == 1:
            self.decoder.limits.check(self.path, *self.size, 1)

    def check_damage(self) -> int:
        """Number of frames damaged or missing; `damage` then says it in words. No frame at all is an error."""
        decoder = self.decoder
        of = f" of {self.promised}" if self.promised is not None else ""
        if self.frames == 0:
            why = f" ({decoder.errors[0]})" if decoder.errors else ""
            raise MediaError(
                f"{self.path}: must have readable frames, got 0{of}{why}. It is cut off or damaged."
            )
        damaged = self.flagged + len(decoder.errors)
        missing = 0
        if self.promised is not None:
            missing = abs(self.promised - self.frames)
        # Packets count frames too, but not for VP8, which has packets that show nothing.
        if not self.is_image and not missing and self.stream.codec_context.name != "vp8":
            missing = max(0, decoder.packets - self.frames)
            of = f" of {decoder.packets}" if missing else of
        if decoder.demuxer == "mpegts":
            self.notes.append("MPEG-TS does not say how long it is: a missing end cannot be noticed")
            damaged += self.path.stat().st_size % _TS_PACKET != 0  # cut inside a packet
        self.damage = f"{self.frames}{of} frames readable, {damaged} damaged"
        return max(damaged, missing)

    def frame_rate(self, corrupt: int) -> Fraction:
        """Exact frames per second; raises if the timing is uneven or unknown.

        With `corrupt` frames (accepted by the caller) the gaps they leave are no reason to refuse.
        """
        stream = self.stream
        rates = (stream.average_rate, stream.guessed_rate, stream.base_rate)
        tick = _fraction(stream.time_base)
        declared = [rate for rate in map(_fraction, rates) if rate]
        if tick and self.decoder.demuxer == "matroska":
            declared = [
                rate for rate in declared if rate * tick != 1
            ]  # FFmpeg's guess where nothing is stated
        times = [time for time in self.times if time is not None]
        gaps = [later - time for time, later in zip(times, times[1:])]
        backward = sum(gap <= 0 for gap in gaps)
        if tick and times and times[0] * tick > Fraction(1, 2):
            self.notes.append(f"starts at {float(times[0] * tick):.3g} s: timestamps are moved to 0")
        if not tick or not gaps or backward or len(times) < len(self.times) or corrupt:
            if not declared:
                raise MediaError(
                    f"{self.path}: must state a frame rate, got 0. Re-encode it with one (ffmpeg -r 25)."
                )
            if backward:
                self.notes.append(f"{backward} timestamps run backwards: frames are taken as evenly spaced")
            elif len(times) < len(self.times):
                self.notes.append("frames without timestamps: taken as evenly spaced")
            return declared[0]
        span = (times[-1] - times[0]) * tick
        measured = (len(times) - 1) / span
        if min(gaps) == max(gaps) and measured in declared:
            return measured
        stated = (declared or [measured])[0]
        nearby = sorted(_STANDARD_RATES, key=lambda rate: abs(rate - stated))[:2]
        # Matroska states the rate, rounded to nanoseconds; MP4 only implies it by its rounded timestamps, so there
        # the standard rate that explains them is meant.
        trust = Fraction(1, 1000) if self.decoder.demuxer == "mov" else Fraction(1, 10**6)
        meant = [rate for rate in nearby if abs(rate / stated - 1) < trust]
        for rate in (*meant, *declared, *nearby, measured):
            if self._fits(times, tick, rate):
                return rate
        shown = f"{float(min(gaps) * tick):.4g} to {float(max(gaps) * tick):.4g} s"
        raise MediaError(
            f"{self.path}: frames must be evenly spaced, got gaps of {shown} (variable frame rate). "
            "Re-encode it at a constant rate (ffmpeg -r)."
        )

    @staticmethod
    def _fits(times: list[int], tick: Fraction, rate: Fraction) -> bool:
        """Whether every timestamp lies on an even grid, give or take rounding at both ends of a gap.

        Timestamps may have been rounded more coarsely than the file's own tick, typically to milliseconds.
        """
        grain = gcd(*(time - times[0] for time in times))
        slack = max(Fraction(1), min(Fraction(grain), Fraction(1, 1000) / tick))
        step = 1 / (rate * tick)
        return all(abs(time - times[0] - index * step) <= slack for index, time in enumerate(times))


def _fraction(value: Any) -> Fraction | None:
    """Exact Fraction of PyAV's rational (its own class since PyAV 19); None if absent or not positive."""
    if not value or value.denominator == 0 or value.numerator <= 0:
        return None
    return Fraction(value.numerator, value.denominator)


def _clock(text: str) -> Fraction | None:
    """Seconds of a `HH:MM:SS.fraction` tag."""
    try:
        hours, minutes, seconds = text.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + Fraction(seconds.strip())
    except ValueError:
        return None
